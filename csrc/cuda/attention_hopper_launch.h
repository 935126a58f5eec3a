// The launch of the forward kernel for sm_90a of one arithmetic. Included by the files that compile it.
#pragma once

#include <launch.h>

#include "attention.h"
#include "attention_hopper.h"
#include "tensor_map.h"

namespace fastseq::FASTSEQ_ISA::attention {

// Q as (feature, head of pack, row, pack, batch), boxes of a tile's rows.
inline TiledTensor tiles_of_queries(const Call& call, int rows) {
  const AttentionArgs& a = call.a;
  const int64_t batch = a.cu_seqlens_q ? 1 : a.batch, *const stride = a.query.stride;
  return {a.query.data,
          5,
          {a.head_size, call.group, a.queries, a.heads / call.group, batch},
          {2, 2 * stride[1], 2 * stride[2], 2 * stride[1] * call.group, 2 * stride[0]},
          {kTileColumns, call.group, rows / call.group, 1, 1}};
}
// K or V as (feature, row, head, batch).
inline TiledTensor tiles_of_keys(const AttentionArgs& a, const HeadTensor& t, int64_t size, int rows) {
  const int64_t batch = a.cu_seqlens_q ? 1 : a.batch;
  return {t.data,
          4,
          {size, a.keys, a.kv_heads, batch},
          {2, 2 * t.stride[2], 2 * t.stride[1], 2 * t.stride[0]},
          {kTileColumns, rows, 1, 1}};
}

template <class Kernel>
const char* launch_hopper_kernel(const Call& call, const GpuAttentionPlan& plan) {
  const TilePass& pass = plan.forward;
  if (pass.threads != Kernel::kThreads || pass.shared_bytes != Kernel::kSharedBytes)
    return "the plan is another kernel's";
  if (pass.blocks == 0) return nullptr;
  HopperArgs args;
  args.call = call;
  const AttentionArgs& a = call.a;
  args.call.group = plan.pack, args.call.slots = pass.slots;
  args.packs = call.group / plan.pack, args.queries = Kernel::kRows / plan.pack;
  args.units = int(a.kv_heads * args.packs * (a.cu_seqlens_q ? 1 : a.batch));
  args.tiles = int(args.units * pass.slots);
  // Alternating is for tiles of different weight, pairs for those that see the more the later their rows are.
  args.units_at_once = a.right >= 0 ? plan.units_at_once : 1;
  args.pairs = a.right >= 0 && a.left < 0 ? int(plan.pairs) : 0;
  const char* error = make_tensor_map(args.query, tiles_of_queries(args.call, Kernel::kRows));
  if (!error) error = make_tensor_map(args.key, tiles_of_keys(a, a.key, a.head_size, Kernel::kKeys));
  if (!error) error = make_tensor_map(args.value, tiles_of_keys(a, a.value, a.value_size, Kernel::kKeys));
  if (error) return error;
  return launch<Kernel>({pass.blocks, pass.threads, size_t(pass.shared_bytes), 1, false, a.stream}, args);
}

template <class M>
const char* launch_hopper(Call& call, const GpuAttentionPlan& plan) {
  return with_hopper_shape(plan.hopper_features, plan.options, [&](auto shape, auto masked) -> const char* {
    return launch_hopper_kernel<HopperForward<M, decltype(shape), decltype(masked)::value>>(call, plan);
  });
}

}  // namespace fastseq::FASTSEQ_ISA::attention
