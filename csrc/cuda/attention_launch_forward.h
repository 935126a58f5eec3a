// The forward pass of one arithmetic.
#pragma once

#include "attention_forward.h"
#include "attention_launch.h"
#include "attention_matrices.h"

namespace fastseq::FASTSEQ_ISA::attention {

template <class M>
const char* launch_outside(const Call& call) {
  return call.a.cu_seqlens_q ? launch_rows<Outside<M, false>>(call, call.a.heads * call.a.queries) : nullptr;
}

template <class M>
const char* launch_forward(Call& call, const GpuAttentionPlan& plan) {
  constexpr int kSize = sizeof(typename M::Element);
  call.parts = plan.parts, call.part_keys = plan.part_keys;
  const char* error = with_features(plan, [&](auto features) {
    constexpr int kFeatures = decltype(features)::value;
    if (plan.kernel == AttentionKernelKind::kDecode)
      return launch_pass<Forward<M, DecodeShape<kSize, kFeatures>, true>>(call, plan.forward);
    if (plan.options)
      return launch_pass<Forward<M, ForwardShape<kSize, kFeatures, true>, true>>(call, plan.forward);
    return launch_pass<Forward<M, ForwardShape<kSize, kFeatures, false>, false>>(call, plan.forward);
  });
  if (error) return error;
  const AttentionArgs& a = call.a;
  if (plan.parts > 1) {
    error = launch_rows<Combine<M>>(call, a.batch * a.heads * a.queries, Combine<M>::kSharedBytes);
    if (error) return error;
  }
  return launch_weights<M>(call, plan);
}

// After the forward pass, if they are wanted.
template <class M>
const char* launch_weights(Call& call, const GpuAttentionPlan& plan) {
  constexpr int kSize = sizeof(typename M::Element);
  const AttentionArgs& a = call.a;
  if (!a.weights.data) return nullptr;
  // A mean over the heads is one tile for all of them.
  TilePass weights = plan.weights;
  if (a.weights.stride[1] == 0 && a.heads > 1) weights.blocks /= a.heads;
  return with_features(plan, [&](auto features) {
    return launch_pass<Weights<M, PairShape<kSize, decltype(features)::value>>>(call, weights);
  });
}

}  // namespace fastseq::FASTSEQ_ISA::attention
