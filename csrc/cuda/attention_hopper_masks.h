// What a mask adds to the scores of the kernel for sm_90a, while these are being made.
#pragma once

#include <prim_hopper.h>

#include "attention_scores.h"

namespace fastseq::FASTSEQ_ISA::attention {

// As the accumulators of 64 rows and kKeys keys from first_key on lie; -inf where the mask hides. Of the thread's two rows
// those of the mask begin at these elements. Keys past the last have the last one's: it is for others to hide them.
template <class E, int kKeys>
FS_DEVICE void read_biases(const Call& call, const int64_t (&rows)[2], int first_key,
                           float (&bias)[kKeys / 2]) {
  const AttentionArgs& a = call.a;
  const int first = first_key + column_of_accumulator(thread_index(), 0), keys = int(a.keys);
  const auto read = [&](auto* mask) {
    using X = std::remove_cv_t<std::remove_pointer_t<decltype(mask)>>;
    const X* const row[2] = {mask + rows[0], mask + rows[1]};
    if (call.pairs_of_mask && first_key + kKeys <= keys) {
      FS_UNROLL
      for (int i = 0; i < kKeys / 2; i += 2) {
        const Two<X> two = *reinterpret_cast<const Two<X>*>(row[i / 2 % 2] + first + i / 4 * 8);
        bias[i] = bias_of<float>(two.value[0]), bias[i + 1] = bias_of<float>(two.value[1]);
      }
    } else {
      // One after the other, for addresses of all would take as many registers.
      const int64_t stride = a.mask.stride[3], last = (keys - 1) * stride;
      int64_t at[2] = {first * stride, (first + 1) * stride};
      FS_UNROLL
      for (int i = 0; i < kKeys / 2; ++i) {
        bias[i] = bias_of<float>(row[i / 2 % 2][at[i % 2] < last ? at[i % 2] : last]);
        if (i / 2 % 2) at[i % 2] += 8 * stride;
      }
    }
  };
  if (a.mask.kind == MaskKind::kBool) {
    read(static_cast<const uint8_t*>(a.mask.data));
  } else if (a.mask.kind == MaskKind::kSame) {
    read(static_cast<const E*>(a.mask.data));
  } else {
    read(static_cast<const float*>(a.mask.data));
  }
}

}  // namespace fastseq::FASTSEQ_ISA::attention
