// The backward pass over dual numbers of one arithmetic.
#pragma once

#include "attention_dual_backward.h"
#include "attention_launch.h"

namespace fastseq::FASTSEQ_ISA::attention {

template <class M>
const char* launch_dual_backward(DualCall& call, const GpuAttentionPlan& plan) {
  constexpr int kSize = sizeof(typename M::Element);
  const AttentionArgs& a = call.a;
  const AttentionTangents& wanted = call.tangents;
  const char* error = with_features(plan, [&](auto features) -> const char* {
    constexpr int kFeatures = decltype(features)::value;
    if constexpr (has_dual_backward(kSize, kFeatures)) {
      const int64_t rows = (a.cu_seqlens_q ? 1 : a.batch) * a.heads * a.queries;
      const char* error = launch_rows<DualDelta<M, kFeatures>>(call, rows);
      if (!error && (wanted.grad_query.data || may_see_few(a)))
        error =
            launch_pass<DualGradQueries<M, DualGradQueriesShape<kSize, kFeatures>>>(call, plan.grad_queries);
      if (!error && (wanted.grad_key.data || wanted.grad_value.data))
        error = launch_pass<DualGradKeys<M, DualGradKeysShape<kSize, kFeatures>>>(call, plan.grad_keys);
      return error;
    }
    return "the plan is another kernel's";
  });
  if (error || !wanted.grad_sinks || a.batch * a.heads == 0) return error;
  return launch<DualGradSinks<M>>({a.batch * a.heads, DualGradSinks<M>::kThreads, 0, 1, false, a.stream},
                                  call);
}

}  // namespace fastseq::FASTSEQ_ISA::attention
