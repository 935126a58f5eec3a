// The shapes of the backward kernels of attention for compute capability 9.0, for the plan and for the kernels.
//
// A block is a warpgroup that brings tiles and two that multiply. Registers of these, at most 240: the gradients that
// they add up (features / 2 for each 64 rows) and two tiles of scores (other / 2 each). Shared memory, at most 227 KB:
// two tiles of what the block owns, and two for each stage of what it goes over. Products of a tile begin before the
// one before is done with, so that with two stages its loading is waited for; three do not always fit.
#pragma once

namespace fastseq::attention {

// Of heads up to 256 features: 64, 128, 192 or 256. Not 96: the last 64 columns of a right operand that is read transposed
// would be used by half, an encoding that nobody is known to use.
constexpr int hopper_backward_features(int features) {
  return features <= 64 ? 64 : features <= 128 ? 128 : features <= 192 ? 192 : 256;
}
// Tiles are 64 features wide.
constexpr int hopper_tile_bytes(int features, int rows) { return (features + 63) / 64 * 64 * rows * 2; }

// `own` and `other` as in TilePass of attention_plan.h. From 192 features on, the gradients of 64 keys and those of 64
// values fill the registers of a warpgroup each: then the two have the same 64 keys (`split`), and both make the
// scores.
struct HopperBackwardShape {
  int features, own, other;
  bool split;
  int stages;
  int statistics;  // numbers of a row that goes through shared memory
  bool one_pass = false;

  // The gradients of the scores of a tile, in the one-pass form.
  constexpr int score_bytes() const { return one_pass ? hopper_tile_bytes(other, own) : 0; }

  constexpr int tile_bytes() const {
    return 2 * hopper_tile_bytes(features, own) + 2 * stages * hopper_tile_bytes(features, other);
  }
  constexpr int statistics_bytes() const { return stages * statistics * other * 4; }
  // And barriers, and a flag for each of eight warps and each stage.
  constexpr int shared_bytes() const {
    return tile_bytes() + stages * score_bytes() + statistics_bytes() + (1 + 2 * stages) * 8 + stages * 8 * 4;
  }
};
constexpr int kHopperBackwardThreads = 384;

// With a mask tiles are smaller, for its addresses need registers too.
constexpr HopperBackwardShape hopper_grad_keys(int features, bool masked) {
  const int queries = features == 64 && !masked ? 96 : 64;
  return {features, features > 128 ? 64 : 128, queries, features > 128, features == 256 ? 2 : 3, 3};
}
// Of the form that makes all gradients; see the head of attention_hopper_backward_keys.h.
constexpr bool hopper_has_one_pass(int features, bool masked) { return features <= 128 && !masked; }
constexpr HopperBackwardShape hopper_one_pass(int features) { return {features, 128, 64, false, 3, 3, true}; }
constexpr HopperBackwardShape hopper_grad_queries(int features, bool masked) {
  const int keys = features == 64 && !masked ? 128 : features <= 128 ? 96 : features == 192 ? 80 : 48;
  return {features, 128, keys, false, features > 128 ? 2 : 3, 0};
}

}  // namespace fastseq::attention
