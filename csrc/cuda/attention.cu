#include <launch.h>

#include "attention.h"
#include "attention_call.h"
#include "attention_math.h"

namespace fastseq::FASTSEQ_ISA {
namespace {

using attention::Call;
using attention::DualCall;

// Whether each row of a tensor begins at a multiple of so many elements; not if there is no tensor.
bool rows_at_multiples(const HeadTensor& t, int elements, int size) {
  if (!t.data) return false;
  bool good = reinterpret_cast<uintptr_t>(t.data) % uintptr_t(elements * size) == 0;
  for (const int64_t stride : t.stride) good = good && stride % elements == 0;
  return good;
}
// Whether the keys of a mask are next to each other, and each of its rows begins at a multiple of two elements.
bool pairs_of_mask(const AttentionMask& mask, DType dtype) {
  if (mask.kind == MaskKind::kNone || mask.stride[3] != 1) return false;
  const int size = mask.kind == MaskKind::kBool      ? 1
                   : mask.kind == MaskKind::kFloat32 ? 4
                                                     : element_size(dtype);
  bool good = reinterpret_cast<uintptr_t>(mask.data) % uintptr_t(2 * size) == 0;
  for (int i = 0; i < 3; ++i) good = good && mask.stride[i] % 2 == 0;
  return good;
}
// Of what may have a remainder beside it.
bool pairs_of_output(const HeadTensor& output, const HeadTensor& remainder, int size) {
  return rows_at_multiples(output, 2, size) && (!remainder.data || rows_at_multiples(remainder, 2, size));
}

Call call_of(const AttentionArgs& a, const GpuAttentionPlan& plan) {
  Call call = {};
  call.a = a;
  call.group = int(a.heads / a.kv_heads);
  call.parts = 1, call.mask_parts = plan.mask_parts;
  const bool adds_mask = a.mask.kind == MaskKind::kSame || a.mask.kind == MaskKind::kFloat32;
  // Under a very small scale a sink in units of products might overflow; under a negative one the highest product is
  // not the highest score.
  call.product_units = a.softcap == 0 && !a.alibi.data && !adds_mask && a.scale > kSmallScale;
  const int size = element_size(a.dtype), chunk = 16 / size;
  call.aligned_query = rows_at_multiples(a.query, chunk, size);
  call.aligned_key = rows_at_multiples(a.key, chunk, size);
  call.aligned_value = rows_at_multiples(a.value, chunk, size);
  call.aligned_grad_output = rows_at_multiples(a.grad_output, chunk, size);
  call.aligned_deltas = rows_at_multiples(a.output, chunk, size) && call.aligned_grad_output &&
                        (!a.remainder.data || rows_at_multiples(a.remainder, chunk, size));
  call.pairs_of_output = pairs_of_output(a.output, a.remainder, size);
  call.pairs_of_grad_query = rows_at_multiples(a.grad_query, 2, size);
  call.pairs_of_grad_key = rows_at_multiples(a.grad_key, 2, size);
  call.pairs_of_grad_value = rows_at_multiples(a.grad_value, 2, size);
  call.pairs_of_mask = pairs_of_mask(a.mask, a.dtype);
  auto* const workspace = static_cast<unsigned char*>(a.workspace);
  call.part_output = workspace + plan.output_at;
  call.part_highest = workspace + plan.highest_at;
  call.part_sum = workspace + plan.sum_at;
  call.delta = {workspace + plan.delta_at, {a.heads * a.queries, a.queries}};
  return call;
}

DualCall call_of(const AttentionDualArgs& args, const GpuAttentionPlan& plan) {
  DualCall call = {};
  static_cast<Call&>(call) = call_of(args.primal, plan);
  call.tangents = args;
  const int size = element_size(args.primal.dtype), chunk = 16 / size;
  call.aligned_query_tangent = rows_at_multiples(args.query, chunk, size);
  call.aligned_key_tangent = rows_at_multiples(args.key, chunk, size);
  call.aligned_value_tangent = rows_at_multiples(args.value, chunk, size);
  call.aligned_grad_output_tangent = rows_at_multiples(args.grad_output, chunk, size);
  call.aligned_delta_tangents = call.aligned_deltas && rows_at_multiples(args.output, chunk, size) &&
                                (!args.remainder.data || rows_at_multiples(args.remainder, chunk, size)) &&
                                (!args.grad_output.data || call.aligned_grad_output_tangent);
  call.pairs_of_grad_query_tangent = rows_at_multiples(args.grad_query, 2, size);
  call.pairs_of_grad_key_tangent = rows_at_multiples(args.grad_key, 2, size);
  call.pairs_of_grad_value_tangent = rows_at_multiples(args.grad_value, 2, size);
  call.delta_tangent = call.delta;
  call.delta_tangent.data = static_cast<unsigned char*>(args.primal.workspace) + plan.delta_tangent_at;
  call.pairs_of_output_tangent = pairs_of_output(args.output, args.remainder, size);
  call.pairs_of_mask_tangent = pairs_of_mask(args.mask, args.primal.dtype);
  return call;
}
// Its tangents in the places of results and gradients, for what writes these where nothing is seen: all tangents are zeros
// there, so that of lse is in the place of something that is.
Call call_of_tangents(const DualCall& call) {
  Call of = call;
  of.a.output = call.tangents.output, of.a.remainder = call.tangents.remainder;
  of.a.lse = of.a.inverse_sum = {}, of.a.highest = call.tangents.lse;
  of.a.grad_query = call.tangents.grad_query, of.a.grad_key = call.tangents.grad_key,
  of.a.grad_value = call.tangents.grad_value;
  return of;
}

// Calls run(arithmetic).
template <class Run>
const char* with_arithmetic(const AttentionArgs& a, const Run& run) {
  using namespace attention;
  const DeviceGuard guard(a.device);
  switch (a.dtype) {
    case DType::kBFloat16:
      return run(Bfloat16Math());
    case DType::kFloat16:
      return run(Float16Math());
    case DType::kFloat32:
      return a.tf32 ? run(Tf32Math()) : run(Float32Math());
    case DType::kFloat64:
      return run(Float64Math());
  }
  return "unknown dtype";
}

}  // namespace

const char* attention_forward(const AttentionArgs& args, const GpuAttentionPlan& plan) {
  Call call = call_of(args, plan);
  return with_arithmetic(args, [&](auto m) {
    using M = decltype(m);
    if (const char* const error = attention::launch_outside<M>(call)) return error;
    if constexpr (sizeof(typename M::Element) == 2) {
      if (plan.kernel == AttentionKernelKind::kHopper) {
        const char* const error = attention::launch_hopper<M>(call, plan);
        return error ? error : attention::launch_weights<M>(call, plan);
      }
    }
    return attention::launch_forward<M>(call, plan);
  });
}
const char* attention_backward(const AttentionArgs& args, const GpuAttentionPlan& plan) {
  Call call = call_of(args, plan);
  return with_arithmetic(args, [&](auto m) { return attention::launch_backward<decltype(m)>(call, plan); });
}

const char* attention_dual_forward(const AttentionDualArgs& args, const GpuAttentionPlan& plan) {
  DualCall call = call_of(args, plan);
  return with_arithmetic(args.primal, [&](auto m) {
    using M = decltype(m);
    const char* error = attention::launch_outside<M>(call);
    if (!error) error = attention::launch_outside<M>(call_of_tangents(call));
    return error ? error : attention::launch_dual_forward<M>(call, plan);
  });
}
const char* attention_dual_backward(const AttentionDualArgs& args, const GpuAttentionPlan& plan) {
  DualCall call = call_of(args, plan);
  return with_arithmetic(args.primal, [&](auto m) {
    using M = decltype(m);
    const char* const error = attention::launch_outside_grads<M>(call_of_tangents(call));
    return error ? error : attention::launch_dual_backward<M>(call, plan);
  });
}

}  // namespace fastseq::FASTSEQ_ISA
