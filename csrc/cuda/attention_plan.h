// Which kernels of attention, which tiles, how many blocks: a pure function of the problem and of the GPU's facts.
#pragma once

#include <string>

#include "../fastseq.h"
#include "plan.h"

namespace fastseq {

// kTiles: attention_forward.h; kDecode: the same with one warp a block, for up to 16 rows of a key head; kHopper:
// attention_hopper.h, of sm_90a.
enum class AttentionKernelKind : int { kTiles = 0, kDecode = 1, kHopper = 2 };
constexpr const char* kAttentionKernelNames[] = {"tiles", "decode", "hopper"};

constexpr int element_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// A scale up to which products cannot stand for scores: in attention.cu.
constexpr double kSmallScale = 1e-6;

struct AttentionProblem {
  DType dtype;
  bool tf32, packed, backward;
  int64_t batch, heads, kv_heads, queries, keys, head_size, value_size;
  bool options;      // anything between product and weight, or weights that have a gradient
  bool only_mask;    // of the options there is none but a mask, or a scale that needs scores
  bool tma;          // query, key and value fit tensor maps: see unfit() in tensor_map.h
  bool weights;      // forward: they are wanted
  bool of_mask;      // backward: whether the mask's gradient is wanted, and
  bool mask_has[4];  // which of batch, head, query and key it has
  bool one_pass;     // backward: grad_query may be summed up in any order
  bool dual;         // over dual numbers
  DeviceFacts device;
  int forced_kernel, forced_parts;  // -1, 0: not forced
};

// A kernel whose blocks own `own` rows or keys and go over `other` keys or rows at a time.
struct TilePass {
  int own, other, threads, shared_bytes;
  int64_t slots;  // tiles of a key head, see place_of_block() in attention_call.h
  int64_t blocks;
};

struct GpuAttentionPlan {
  AttentionKernelKind kernel;
  int features;  // of the tiles: head_size and value_size at most
  bool options;
  bool hopper;             // backward: attention_hopper_backward_keys.h and its like
  std::string not_hopper;  // why the pass has no kernel of attention_hopper*.h, empty if it has
  std::string
      not_tiles;  // over dual numbers: why it has none at all, and the caller no kernel; empty if it has
  int parts, part_keys;  // of the forward pass
  // kHopper: features of its tiles; heads in a tile of rows; packs of heads, of all sequences, whose keys and values are
  // worked on at the same time; pairs of tiles under causality, 0: each is alone.
  int hopper_features, pack, units_at_once;
  int64_t pairs;
  TilePass forward, weights, grad_queries, grad_keys, grad_mask;
  int mask_parts;
  bool one_pass;  // of the backward pass
  // Where things lie in the workspace.
  int64_t output_at, highest_at, sum_at, delta_at, delta_tangent_at, mask_at, sums_at, workspace_bytes;
};

// Throws std::runtime_error, in three lines, if nothing fits or the forced plan does not.
GpuAttentionPlan attention_plan(const AttentionProblem& problem);

}  // namespace fastseq
