// Launches of the kernels of one arithmetic. Included by the files that compile these.
#pragma once

#include <launch.h>

#include "attention.h"
#include "attention_shapes.h"

namespace fastseq::FASTSEQ_ISA::attention {

template <class Kernel>
const char* launch_pass(typename Kernel::Args& call, const TilePass& pass) {
  if (pass.blocks == 0) return nullptr;
  if (pass.threads != Kernel::kThreads || pass.shared_bytes != Kernel::kSharedBytes)
    return "the plan is another kernel's";
  call.slots = pass.slots;
  return launch<Kernel>({pass.blocks, pass.threads, size_t(pass.shared_bytes), 1, false, call.a.stream},
                        call);
}

// For each of `rows`, of which a block has some.
template <class Kernel>
const char* launch_rows(const typename Kernel::Args& call, int64_t rows, int shared_bytes = 0) {
  if (rows == 0) return nullptr;
  const int64_t blocks = (rows + Kernel::kRows - 1) / Kernel::kRows;
  return launch<Kernel>({blocks, Kernel::kThreads, size_t(shared_bytes), 1, false, call.a.stream}, call);
}

// Whether a row may see only a few keys: see kFewKeys.
inline bool may_see_few(const AttentionArgs& a) {
  return a.keys <= kFewKeys || a.key_lengths || a.cu_seqlens_k || a.left >= 0 || a.right >= 0;
}

// Calls body(features) with the plan's as a constant.
template <class Body>
const char* with_features(const GpuAttentionPlan& plan, const Body& body) {
  switch (plan.features) {
    case 64:
      return body(std::integral_constant<int, 64>());
    case 128:
      return body(std::integral_constant<int, 128>());
    default:
      return body(std::integral_constant<int, 256>());
  }
}

}  // namespace fastseq::FASTSEQ_ISA::attention
