// The forward pass over dual numbers of one arithmetic.
#pragma once

#include "attention_dual_forward.h"
#include "attention_launch.h"

namespace fastseq::FASTSEQ_ISA::attention {

template <class M>
const char* launch_dual_forward(DualCall& call, const GpuAttentionPlan& plan) {
  constexpr int kSize = sizeof(typename M::Element);
  return with_features(plan, [&](auto features) {
    return launch_pass<DualForward<M, DualForwardShape<kSize, decltype(features)::value>>>(call,
                                                                                           plan.forward);
  });
}

}  // namespace fastseq::FASTSEQ_ISA::attention
