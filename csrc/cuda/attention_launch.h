// Launches of the kernels of one arithmetic. Included by the files that compile these.
#pragma once

#include <launch.h>

#include "attention.h"
#include "attention_shapes.h"

namespace fastseq::FASTSEQ_ISA::attention {

template <class Kernel>
const char* launch_pass(Call& call, const TilePass& pass) {
  if (pass.blocks == 0) return nullptr;
  if (pass.threads != Kernel::kThreads || pass.shared_bytes != Kernel::kSharedBytes)
    return "the plan is another kernel's";
  call.slots = pass.slots;
  return launch<Kernel>({pass.blocks, pass.threads, size_t(pass.shared_bytes), 1, false, call.a.stream},
                        call);
}

// One warp for each of `rows`.
template <class Kernel>
const char* launch_rows(const Call& call, int64_t rows) {
  if (rows == 0) return nullptr;
  constexpr int kRows = Kernel::kThreads / kWarp;
  return launch<Kernel>({(rows + kRows - 1) / kRows, Kernel::kThreads, 0, 1, false, call.a.stream}, call);
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
