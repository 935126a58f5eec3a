// Launches of the backward kernels for compute capability 9.0. Included by the files that compile these.
#pragma once

#include <launch.h>

#include "attention.h"
#include "attention_hopper_backward_keys.h"
#include "attention_hopper_backward_queries.h"
#include "tensor_map.h"

namespace fastseq::FASTSEQ_ISA::attention {

// Tiles of `box` rows of a tensor [B, heads, rows, features], or packed [rows, heads, features].
inline const char* make_head_map(TensorMap& map, const AttentionArgs& a, const HeadTensor& t,
                                 int64_t features, int64_t rows, int64_t heads, int box) {
  return make_tensor_map(map, {t.data,
                               4,
                               {features, rows, heads, a.cu_seqlens_q ? 1 : a.batch},
                               {2, 2 * t.stride[2], 2 * t.stride[1], 2 * t.stride[0]},
                               {kTileColumns, box, 1, 1}});
}

// Calls body(features) with a constant.
template <class Body>
const char* with_hopper_features_only(const AttentionArgs& a, const Body& body) {
  switch (hopper_backward_features(int(a.head_size > a.value_size ? a.head_size : a.value_size))) {
    case 64:
      return body(std::integral_constant<int, 64>());
    case 128:
      return body(std::integral_constant<int, 128>());
    case 192:
      return body(std::integral_constant<int, 192>());
    default:
      return body(std::integral_constant<int, 256>());
  }
}

// And whether there is a mask, or a scale that needs scores: body(features, masked).
template <class Body>
const char* with_hopper_features(const Call& call, const Body& body) {
  return with_hopper_features_only(call.a, [&](auto features) {
    return call.product_units && call.a.mask.kind == MaskKind::kNone ? body(features, std::false_type())
                                                                     : body(features, std::true_type());
  });
}

template <class Kernel>
const char* launch_hopper_pass(const Call& call, const TilePass& pass, int of_queries, int of_keys) {
  if (pass.blocks == 0) return nullptr;
  if (pass.threads != Kernel::kThreads || pass.shared_bytes != Kernel::kSharedBytes)
    return "the plan is another kernel's";
  const AttentionArgs& a = call.a;
  HopperCall args{{}, {}, {}, {}, call};
  args.call.slots = pass.slots;
  const char* error = make_head_map(args.query, a, a.query, a.head_size, a.queries, a.heads, of_queries);
  if (!error)
    error = make_head_map(args.grad_output, a, a.grad_output, a.value_size, a.queries, a.heads, of_queries);
  if (!error) error = make_head_map(args.key, a, a.key, a.head_size, a.keys, a.kv_heads, of_keys);
  if (!error) error = make_head_map(args.value, a, a.value, a.value_size, a.keys, a.kv_heads, of_keys);
  if (error) return error;
  return launch<Kernel>({pass.blocks, pass.threads, size_t(pass.shared_bytes), 1, false, a.stream}, args);
}

template <class E>
const char* launch_hopper_grad_queries(const Call& call, const TilePass& pass) {
  Call of_heads = call;
  of_heads.parts = call.group;  // a block has one of the query heads
  return with_hopper_features(call, [&](auto features, auto masked) {
    using Kernel = HopperGradQueries<E, decltype(features)::value, decltype(masked)::value>;
    return launch_hopper_pass<Kernel>(of_heads, pass, Kernel::kQueries, Kernel::kKeys);
  });
}
template <class E>
const char* launch_hopper_grad_keys(const Call& call, const TilePass& pass) {
  return with_hopper_features(call, [&](auto features, auto masked) {
    using Kernel = HopperGradKeys<E, decltype(features)::value, decltype(masked)::value>;
    return launch_hopper_pass<Kernel>(call, pass, Kernel::kQueries, Kernel::kKeys);
  });
}
template <class E>
const char* launch_hopper_one_pass(const Call& call, const TilePass& pass) {
  return with_hopper_features_only(call.a, [&](auto features) -> const char* {
    constexpr int kFeatures = decltype(features)::value;
    if constexpr (hopper_has_one_pass(kFeatures, false)) {
      using Kernel = HopperGradKeys<E, kFeatures, false, true>;
      return launch_hopper_pass<Kernel>(call, pass, Kernel::kQueries, Kernel::kKeys);
    } else {
      return "the plan is another kernel's";
    }
  });
}

}  // namespace fastseq::FASTSEQ_ISA::attention
