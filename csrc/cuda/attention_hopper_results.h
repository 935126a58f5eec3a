// What the kernels for sm_90a write of their sums.
#pragma once

#include <prim_hopper.h>

namespace fastseq::FASTSEQ_ISA::attention {

// 64 rows of sums times a factor, rounded: the row of accumulator 0 and the one 8 below it, null where there is none.
// With `pairs` rows begin at a multiple of two elements.
template <class E, int kCount>
FS_DEVICE void write_features(E* const (&to)[2], const float (&d)[kCount], int features, float factor,
                              bool pairs) {
  const int first = column_of_accumulator(thread_index(), 0), mine = features - first;
  const auto for_pairs = [&](auto write) {
    FS_UNROLL
    for (int half = 0; half < 2; ++half) {
      if (!to[half]) continue;
      E* const row = to[half] + first;
      FS_UNROLL
      for (int n = 0; n < kCount / 4; ++n) {
        const int i = 4 * n + 2 * half;
        if (8 * n < mine) write(row + 8 * n, pack(d[i] * factor, d[i + 1] * factor, E{}), 8 * n + 1 < mine);
      }
    }
  };
  // One instruction for two elements is the rule; which it is, is asked once.
  if (pairs && features % 2 == 0) {
    for_pairs([](E* at, uint32_t two, bool) { *reinterpret_cast<uint32_t*>(at) = two; });
  } else {
    for_pairs([](E* at, uint32_t two, bool both) {
      at[0].bits = uint16_t(two);
      if (both) at[1].bits = uint16_t(two >> 16);
    });
  }
}

}  // namespace fastseq::FASTSEQ_ISA::attention
