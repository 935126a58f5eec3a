// The backward pass of one arithmetic.
#pragma once

#include "attention_backward.h"
#include "attention_launch.h"
#include "attention_matrices.h"

namespace fastseq::FASTSEQ_ISA::attention {

template <class M>
const char* launch_grad_queries(Call& call, const GpuAttentionPlan& plan) {
  constexpr int kSize = sizeof(typename M::Element);
  if constexpr (kSize == 2) {
    if (plan.hopper) return launch_hopper_grad_queries<typename M::Element>(call, plan.grad_queries);
  }
  return with_features(plan, [&](auto features) {
    constexpr int kFeatures = decltype(features)::value;
    return plan.options ? launch_pass<GradQueries<M, GradQueriesShape<kSize, kFeatures, true>, true>>(
                              call, plan.grad_queries)
                        : launch_pass<GradQueries<M, GradQueriesShape<kSize, kFeatures, false>, false>>(
                              call, plan.grad_queries);
  });
}
template <class M>
const char* launch_grad_keys(Call& call, const GpuAttentionPlan& plan) {
  constexpr int kSize = sizeof(typename M::Element);
  if constexpr (kSize == 2) {
    if (plan.hopper) return launch_hopper_grad_keys<typename M::Element>(call, plan.grad_keys);
  }
  return with_features(plan, [&](auto features) {
    constexpr int kFeatures = decltype(features)::value;
    return plan.options
               ? launch_pass<GradKeys<M, GradKeysShape<kSize, kFeatures, true>, true>>(call, plan.grad_keys)
               : launch_pass<GradKeys<M, GradKeysShape<kSize, kFeatures, false>, false>>(call,
                                                                                         plan.grad_keys);
  });
}

template <class M>
const char* launch_one_pass(Call& call, const GpuAttentionPlan& plan) {
  if constexpr (sizeof(typename M::Element) == 2) {
    if (plan.hopper) return launch_hopper_one_pass<typename M::Element>(call, plan.grad_keys);
  }
  return with_features(plan, [&](auto features) {
    using Shape = OnePassShape<sizeof(typename M::Element), decltype(features)::value>;
    return launch_pass<GradKeys<M, Shape, true, true>>(call, plan.grad_keys);
  });
}

template <class M>
const char* launch_outside_grads(const Call& call) {
  const AttentionArgs& a = call.a;
  if (!a.cu_seqlens_q) return nullptr;
  return launch_rows<Outside<M, true>>(call, a.heads * a.queries + a.kv_heads * a.keys);
}

template <class M>
const char* launch_backward(Call& call, const GpuAttentionPlan& plan) {
  constexpr int kSize = sizeof(typename M::Element);
  const AttentionArgs& a = call.a;
  const int64_t batch = a.cu_seqlens_q ? 1 : a.batch;
  if (const char* error = launch_outside_grads<M>(call)) return error;
  const char* error = with_features(plan, [&](auto features) {
    return launch_rows<Delta<M, decltype(features)::value>>(call, batch * a.heads * a.queries);
  });
  if (error) return error;
  if (plan.one_pass) {
    call.grad_query_sums = static_cast<unsigned char*>(a.workspace) + plan.sums_at;
    const int64_t elements = batch * a.heads * a.queries * a.head_size;
    if (elements)
      error = fill_zero(call.grad_query_sums, size_t(elements) * sizeof(typename M::Sum), a.stream);
    if (!error) error = launch_one_pass<M>(call, plan);
    if (!error) error = launch_rows<FinishQueries<M>>(call, elements);
  } else {
    // Of few keys this pass makes delta too, so that it comes first. Which blocks see few they find out themselves; the
    // others end at once where their gradients are not wanted.
    if (a.grad_query.data || may_see_few(a)) error = launch_grad_queries<M>(call, plan);
    if (!error && (a.grad_key.data || a.grad_value.data)) error = launch_grad_keys<M>(call, plan);
  }
  if (!error && a.grad_mask) {
    call.part_output = static_cast<unsigned char*>(a.workspace) + plan.mask_at;
    error = with_features(plan, [&](auto features) {
      return launch_pass<GradMask<M, PairShape<kSize, decltype(features)::value>>>(call, plan.grad_mask);
    });
  }
  if (error) return error;
  if (a.grad_mask && plan.mask_parts > 1) {
    int64_t elements = 1;
    const int64_t sizes[4] = {a.batch, a.heads, a.queries, a.keys};
    for (int i = 0; i < 4; ++i) elements *= a.grad_mask_stride[i] ? sizes[i] : 1;
    error = launch_rows<SumParts<M>>(call, elements);
    if (error) return error;
  }
  if (!a.grad_sinks || a.batch * a.heads == 0) return nullptr;
  return launch<GradSinks<M>>({a.batch * a.heads, GradSinks<M>::kThreads, 0, 1, false, a.stream}, call);
}

}  // namespace fastseq::FASTSEQ_ISA::attention
