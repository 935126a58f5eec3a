#include "attention_plan.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

#include "attention_hopper_backward_shapes.h"
#include "attention_shapes.h"

namespace fastseq {
namespace {

using namespace attention;

constexpr int kDecodeRows = 16, kMostFeatures = 256;
// Rows of a key head up to which its keys are cut into parts, how many keys there are for each row then, and how many a
// part has at least: with more rows there are blocks enough, with fewer keys joining the parts takes as long as reading
// them.
constexpr int kSplitRows = 128, kKeysOfRow = 32, kPartKeys = 256, kMostParts = 64, kPartQuantum = 64;
constexpr int64_t kMaskBlocks = 256;  // about as many as a GPU runs at the same time
constexpr int64_t kMostBlocks = 0x7fffffff;

int64_t ceil_div(int64_t n, int64_t size) { return (n + size - 1) / size; }
int64_t aligned(int64_t bytes) { return ceil_div(bytes, 256) * 256; }

[[noreturn]] void refuse(const std::string& given, const std::string& accepted, const std::string& remedy) {
  throw std::runtime_error("given: " + given + "\naccepted: " + accepted + "\ntry: " + remedy);
}

template <class Shape>
TilePass pass(int size, int own_tiles, int other_tiles) {
  TilePass p = {};
  p.own = Shape::kWarps / Shape::kColumnWarps * Shape::kRowTiles * 16, p.other = Shape::kKeys;
  p.threads = Shape::kWarps * 32;
  p.shared_bytes = own_tiles * tile_bytes(size, Shape::kFeatures, p.own) +
                   other_tiles * tile_bytes(size, Shape::kFeatures, p.other);
  return p;
}

// Tiles of a key head: of a packed sequence's as many as there may be.
int64_t slots(const AttentionProblem& p, int64_t rows, int size) {
  return p.packed ? rows / size + p.batch : ceil_div(rows, size);
}
int64_t heads(const AttentionProblem& p) { return p.packed ? p.kv_heads : p.kv_heads * p.batch; }

int64_t rows_of(const AttentionProblem& p) {  // of a key head
  return p.heads / std::max<int64_t>(p.kv_heads, 1) * p.queries;
}
int64_t sum_size_of(const AttentionProblem& p) { return p.dtype == DType::kFloat64 ? 8 : 4; }

bool cuts_keys(const AttentionProblem& p, int64_t rows) {
  return !p.packed && rows <= kSplitRows && p.keys >= kKeysOfRow * rows;
}

void check(const AttentionProblem& p, const GpuAttentionPlan& plan) {
  const int most =
      std::max({plan.forward.shared_bytes, plan.weights.shared_bytes, plan.grad_queries.shared_bytes,
                plan.grad_keys.shared_bytes, plan.grad_mask.shared_bytes});
  if (most > p.device.shared_bytes) {
    refuse("heads of " + std::to_string(std::max(p.head_size, p.value_size)) + " features, in tiles of " +
               std::to_string(most) + " bytes",
           "tiles of up to " + std::to_string(p.device.shared_bytes) +
               " bytes, which a block of this GPU can have",
           "smaller heads, or a smaller dtype");
  }
  for (const TilePass* t :
       {&plan.forward, &plan.weights, &plan.grad_queries, &plan.grad_keys, &plan.grad_mask}) {
    if (t->blocks > kMostBlocks) {
      refuse("attention that would take " + std::to_string(t->blocks) + " blocks", "up to 2147483647",
             "a smaller batch at a time");
    }
  }
}

// Of the tiles of the general kernels.
int features_of(const AttentionProblem& p) {
  const int64_t most = std::max(p.head_size, p.value_size);
  return most <= 64 ? 64 : most <= 128 ? 128 : 256;
}

TilePass weights_pass(const AttentionProblem& p) {
  TilePass weights = with_sizes(element_size(p.dtype), features_of(p),
                                [&](auto s, auto f) { return pass<PairShape<s, f>>(s, 1, 1); });
  weights.blocks = p.batch * p.heads * ceil_div(p.queries, weights.own) * ceil_div(p.keys, weights.other);
  return weights;
}

// ---- the kernel for sm_90a ----

// What is in the way of the kernels for sm_90a; empty if nothing. plan_words.py says what would change it.
std::string no_hopper(const AttentionProblem& p) {
  if (p.device.major != 9 || p.device.minor != 0)
    return "compute capability " + std::to_string(p.device.major) + "." + std::to_string(p.device.minor);
  if (element_size(p.dtype) != 2) return "elements of more than 16 bits";
  if (p.options && !p.only_mask) return "options other than masks";
  if (p.queries == 0 || p.keys == 0 || p.kv_heads == 0 || p.batch == 0) return "no queries or keys";
  if (!p.tma) return "tensors whose rows do not begin at multiples of 16 bytes";
  return "";
}

const char* const kForced = "another kernel is forced";
const char* const kNoRoom = "the shared memory of a block";
const char* const kFewRows = "few rows of a key head";

[[noreturn]] void refuse_hopper(const std::string& reason) {
  refuse("the kernel hopper, forced, with " + reason,
         "compute capability 9.0; float16 or bfloat16 whose rows begin at multiples of 16 bytes; masks, "
         "sinks, lengths, windows",
         "the kernel tiles, or unset FASTSEQ_CUDA_ATTENTION_PLAN");
}

GpuAttentionPlan hopper_plan(const AttentionProblem& p) {
  GpuAttentionPlan plan = {};
  plan.kernel = AttentionKernelKind::kHopper;
  plan.options = p.options;
  plan.features = features_of(p);
  plan.hopper_features = hopper_features(std::max(p.head_size, p.value_size), p.options);
  plan.parts = 1, plan.part_keys = int(p.keys), plan.mask_parts = 1;
  if (p.weights) plan.weights = weights_pass(p);
  with_hopper_shape(plan.hopper_features, p.options, [&](auto shape, auto) {
    TilePass& t = plan.forward;
    t.own = shape.kRows, t.other = shape.kKeys, t.threads = shape.kThreads,
    t.shared_bytes = shape.kSharedBytes;
  });
  const int64_t group = p.heads / p.kv_heads;
  plan.pack = int(std::gcd(group, int64_t(plan.forward.own)));
  const int64_t units = p.heads / plan.pack * (p.packed ? 1 : p.batch);
  plan.forward.slots = slots(p, plan.pack * p.queries, plan.forward.own);
  const int64_t items = units * plan.forward.slots;
  plan.forward.blocks = std::min<int64_t>(items, std::max(p.device.multiprocessors, 1));
  // Half of the second-level cache for keys and values; their packs are next to each other.
  const int64_t bytes = 2 * p.keys * (p.head_size + p.value_size);
  const int64_t at_once = p.device.l2_bytes / 2 / std::max<int64_t>(bytes, 1) * (group / plan.pack);
  plan.units_at_once = int(std::clamp<int64_t>(at_once, 1, units));
  // Under causality a tile weighs the more the later its rows are. If all units are worked on at the same time, their
  // light tiles come last, and what the blocks have to do ends evenly. In sections it does not, but pairs of a heavy tile
  // and a light one weigh all the same. They are twice as much to wait for, though, where the last turn of the blocks is
  // not full: if that is more than a tenth of the time there are few tiles, and then all units are worked on at once, for
  // blocks of the same unit read its keys at about the same time, whatever the cache holds.
  if (plan.units_at_once < units && !p.packed) {
    const int64_t sections = units / plan.units_at_once, rest = units % plan.units_at_once;
    const int64_t pairs = sections * ceil_div(plan.units_at_once * plan.forward.slots, 2) +
                          ceil_div(rest * plan.forward.slots, 2);
    const int64_t blocks = plan.forward.blocks, places = ceil_div(pairs, blocks) * blocks;
    if (10 * places <= 11 * pairs) {
      plan.pairs = pairs;
    } else {
      plan.units_at_once = int(units);
    }
  }
  constexpr int64_t kMostItems = int64_t(1) << 30;
  if (items > kMostItems) {
    refuse("attention that would take " + std::to_string(items) + " tiles", "up to 1073741824",
           "a smaller batch at a time");
  }
  return plan;
}

// What is in the way of attention_hopper_backward_keys.h and its like; empty if nothing.
std::string no_hopper_backward(const AttentionProblem& p) {
  return p.head_size == 0 || p.value_size == 0 ? "heads without features" : no_hopper(p);
}
void plan_hopper_backward(const AttentionProblem& p, GpuAttentionPlan& plan) {
  const int features = hopper_backward_features(int(std::max(p.head_size, p.value_size)));
  // It adds to memory in pairs; options are a mask, if any.
  plan.one_pass = p.one_pass && p.head_size % 2 == 0 && hopper_has_one_pass(features, p.options);
  const HopperBackwardShape queries = hopper_grad_queries(features, p.options),
                            keys = plan.one_pass ? hopper_one_pass(features)
                                                 : hopper_grad_keys(features, p.options);
  plan.grad_queries = {queries.own, queries.other, kHopperBackwardThreads, queries.shared_bytes(), 0, 0};
  plan.grad_queries.slots = slots(p, p.queries, queries.own);
  plan.grad_queries.blocks = (p.packed ? 1 : p.batch) * p.heads * plan.grad_queries.slots;
  plan.grad_keys = {keys.own, keys.other, kHopperBackwardThreads, keys.shared_bytes(), 0, 0};
  plan.grad_keys.slots = slots(p, p.keys, keys.own);
  plan.grad_keys.blocks = heads(p) * plan.grad_keys.slots;
}
// Whether the backward pass is that one, and then its passes.
bool takes_hopper_backward(const AttentionProblem& p, GpuAttentionPlan& plan) {
  const bool forced = p.forced_kernel == int(AttentionKernelKind::kHopper);
  const std::string reason = no_hopper_backward(p);
  if (forced && !reason.empty()) refuse_hopper(reason);
  plan.not_hopper = p.forced_kernel == int(AttentionKernelKind::kTiles) ? kForced : reason;
  if (!plan.not_hopper.empty()) return false;
  GpuAttentionPlan hopper = plan;
  plan_hopper_backward(p, hopper);
  const int bytes = std::max(hopper.grad_queries.shared_bytes, hopper.grad_keys.shared_bytes);
  if (!forced && p.keys <= kFewKeys) plan.not_hopper = "few keys";
  if (!forced && bytes > p.device.shared_bytes) plan.not_hopper = kNoRoom;
  if (!plan.not_hopper.empty()) return false;
  plan = hopper;
  return true;
}

void plan_forward(const AttentionProblem& p, GpuAttentionPlan& plan) {
  const int size = element_size(p.dtype);
  const int64_t rows = rows_of(p), sum_size = sum_size_of(p);
  const int64_t rows_of_sequence = p.packed ? ceil_div(rows, std::max<int64_t>(p.batch, 1)) : rows;
  plan.kernel = rows_of_sequence <= kDecodeRows ? AttentionKernelKind::kDecode : AttentionKernelKind::kTiles;
  if (p.forced_kernel >= 0) plan.kernel = AttentionKernelKind(p.forced_kernel);
  const std::string reason = no_hopper(p);
  const bool forced = plan.kernel == AttentionKernelKind::kHopper;
  if (forced && (!reason.empty() || p.forced_parts > 1))
    refuse_hopper(reason.empty() ? "parts of the keys" : reason);
  plan.not_hopper = p.forced_kernel >= 0                          ? kForced
                    : !reason.empty()                             ? reason
                    : plan.kernel == AttentionKernelKind::kDecode ? kFewRows
                                                                  : "";
  if (forced || plan.not_hopper.empty()) {
    const GpuAttentionPlan hopper = hopper_plan(p);
    // Few rows leave most of the GPU idle, unless keys are cut into parts. How many of them there are in the batch does
    // not count: a row's bits are not to depend on it.
    const bool few = cuts_keys(p, rows) && p.keys > kPartKeys;
    const bool fits = hopper.forward.shared_bytes <= p.device.shared_bytes;
    if (forced || (fits && !few)) {
      plan = hopper;
      return;
    }
    plan.not_hopper = fits ? kFewRows : kNoRoom;
  }
  plan.forward = with_sizes(size, plan.features, [&](auto s, auto f) {
    if (plan.kernel == AttentionKernelKind::kDecode) return pass<DecodeShape<s, f>>(s, 1, 4);
    return p.options ? pass<ForwardShape<s, f, true>>(s, 1, 4) : pass<ForwardShape<s, f, false>>(s, 1, 4);
  });
  plan.options |= plan.kernel == AttentionKernelKind::kDecode;  // the one kernel that there is
  if (!p.packed && (cuts_keys(p, rows) || p.forced_parts > 0)) {
    int64_t keys = std::max<int64_t>(kPartKeys, ceil_div(p.keys, kMostParts));
    if (p.forced_parts > 0) keys = std::max<int64_t>(ceil_div(p.keys, p.forced_parts), 1);
    keys = ceil_div(keys, kPartQuantum) * kPartQuantum;
    plan.parts = int(std::max<int64_t>(ceil_div(p.keys, keys), 1)), plan.part_keys = int(keys);
  }
  plan.forward.slots = slots(p, rows, plan.forward.own);
  plan.forward.blocks = heads(p) * plan.parts * plan.forward.slots;
  if (plan.parts > 1) {
    const int64_t part_rows = heads(p) * plan.parts * rows;
    plan.highest_at = aligned(part_rows * p.value_size * sum_size);
    plan.sum_at = plan.highest_at + aligned(part_rows * sum_size);
    plan.workspace_bytes = plan.sum_at + aligned(part_rows * sum_size);
  }
  if (p.weights) plan.weights = weights_pass(p);
}

// Over dual numbers: what has no kernel the caller makes in blocks of other operations.
void plan_dual(const AttentionProblem& p, GpuAttentionPlan& plan) {
  const int size = element_size(p.dtype);
  TilePass forward = {}, grad_queries = {}, grad_keys = {};
  with_sizes(size, plan.features, [&](auto s, auto f) {
    if (!p.backward) {
      forward = pass<DualForwardShape<s, f>>(s, 2, 8);
    } else {
      grad_queries = pass<DualGradQueriesShape<s, f>>(s, 4, 8);
      grad_keys = pass<DualGradKeysShape<s, f>>(s, 4, 8);
      grad_keys.shared_bytes += 2 * grad_keys.other * dual_query_bytes(s);
    }
  });
  const int bytes = std::max({forward.shared_bytes, grad_queries.shared_bytes, grad_keys.shared_bytes});
  const bool fits = bytes <= p.device.shared_bytes && (!p.backward || has_dual_backward(size, plan.features));
  plan.not_tiles = p.weights && p.backward                               ? "a gradient of the weights"
                   : p.weights                                           ? "weights that are returned"
                   : p.of_mask                                           ? "a gradient of the mask"
                   : std::max(p.head_size, p.value_size) > kMostFeatures ? "heads of more than 256 features"
                   : !fits                                               ? kNoRoom
                                                                         : "";
  if (!plan.not_tiles.empty()) return;
  plan.kernel = AttentionKernelKind::kTiles, plan.options = true;
  const auto place = [&](TilePass& pass, int64_t all) {
    if (!pass.threads) return;
    pass.slots = slots(p, all, pass.own);
    pass.blocks = heads(p) * pass.slots;
  };
  place(forward, rows_of(p)), place(grad_queries, rows_of(p)), place(grad_keys, p.keys);
  plan.forward = forward, plan.grad_queries = grad_queries, plan.grad_keys = grad_keys;
  if (!p.backward) return;
  plan.delta_tangent_at = aligned((p.packed ? 1 : p.batch) * p.heads * p.queries * sum_size_of(p));
  plan.workspace_bytes = 2 * plan.delta_tangent_at;
}

void plan_backward(const AttentionProblem& p, GpuAttentionPlan& plan) {
  const int size = element_size(p.dtype);
  plan.hopper = takes_hopper_backward(p, plan);
  if (!plan.hopper) {
    plan.one_pass = p.one_pass;
    plan.grad_queries = with_sizes(size, plan.features, [&](auto s, auto f) {
      return p.options ? pass<GradQueriesShape<s, f, true>>(s, 2, 4)
                       : pass<GradQueriesShape<s, f, false>>(s, 2, 4);
    });
    plan.grad_queries.slots = slots(p, rows_of(p), plan.grad_queries.own);
    plan.grad_queries.blocks = heads(p) * plan.grad_queries.slots;
    plan.grad_keys = with_sizes(size, plan.features, [&](auto s, auto f) {
      if (plan.one_pass) return pass<OnePassShape<s, f>>(s, 2, 4);
      return p.options ? pass<GradKeysShape<s, f, true>>(s, 2, 4) : pass<GradKeysShape<s, f, false>>(s, 2, 4);
    });
    plan.grad_keys.shared_bytes += 2 * plan.grad_keys.other * query_bytes(size);
    if (plan.one_pass)
      plan.grad_keys.shared_bytes += score_bytes(size, plan.grad_keys.other, plan.grad_keys.own);
    plan.grad_keys.slots = slots(p, p.keys, plan.grad_keys.own);
    plan.grad_keys.blocks = heads(p) * plan.grad_keys.slots;
  }
  plan.workspace_bytes = aligned((p.packed ? 1 : p.batch) * p.heads * p.queries * sum_size_of(p));
  if (plan.one_pass) {
    plan.grad_queries = {};
    plan.sums_at = plan.workspace_bytes;
    plan.workspace_bytes +=
        aligned((p.packed ? 1 : p.batch) * p.heads * p.queries * p.head_size * sum_size_of(p));
  }
  if (p.of_mask) {
    TilePass& mask = plan.grad_mask;
    mask = with_sizes(size, plan.features, [&](auto s, auto f) { return pass<PairShape<s, f>>(s, 2, 2); });
    const int64_t all[4] = {p.batch, p.heads, ceil_div(p.queries, mask.own), ceil_div(p.keys, mask.other)};
    const int64_t sizes[4] = {p.batch, p.heads, p.queries, p.keys};
    int64_t terms = 1, elements = 1;
    mask.blocks = 1;
    for (int i = 0; i < 4; ++i) {
      (p.mask_has[i] ? mask.blocks : terms) *= all[i];
      if (p.mask_has[i]) elements *= sizes[i];
    }
    const int64_t parts = ceil_div(kMaskBlocks, std::max<int64_t>(mask.blocks, 1));
    plan.mask_parts = int(std::clamp<int64_t>(parts, 1, std::max<int64_t>(terms, 1)));
    mask.blocks *= plan.mask_parts;
    plan.mask_at = plan.workspace_bytes;
    if (plan.mask_parts > 1) plan.workspace_bytes += aligned(plan.mask_parts * elements * sum_size_of(p));
  }
}

}  // namespace

GpuAttentionPlan attention_plan(const AttentionProblem& p) {
  const int64_t most_features = std::max(p.head_size, p.value_size);
  if (most_features > kMostFeatures && !p.dual) {
    refuse("heads of " + std::to_string(most_features) + " features on CUDA", "up to 256",
           "more heads of fewer features, or query.cpu(), key.cpu() and value.cpu()");
  }
  constexpr int64_t kMostRows = int64_t(1) << 30;
  if (p.queries > kMostRows || p.keys > kMostRows) {
    refuse("sequences of " + std::to_string(std::max(p.queries, p.keys)) + " rows on CUDA",
           "up to 1073741824", "shorter sequences");
  }
  GpuAttentionPlan plan = {};
  plan.features = features_of(p);
  plan.options = p.options;
  plan.parts = 1, plan.part_keys = int(p.keys), plan.mask_parts = 1;
  if (p.dual) {
    plan_dual(p, plan);
  } else {
    p.backward ? plan_backward(p, plan) : plan_forward(p, plan);
  }
  check(p, plan);
  return plan;
}

}  // namespace fastseq
