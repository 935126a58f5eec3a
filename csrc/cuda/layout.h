// How a persistent kernel is laid out: plain numbers, made by the plan, read by the kernels.
//
// A *group* of blocks runs one batch tile of one direction through all steps. In each step it computes one matrix
// product, or two (GRU that resets before the product; projected LSTM):
//
//   sums[m, n] = sum over k of weight[m, k] operand[n, k]        n: rows of the batch tile
//
//   gather    a block computes all of k for its own m. Before, every block gets the operand of all units.
//   scatter   a block computes, from its own k, a part of every m, and sends the parts to the owners of m.
//
// The weights stand still. They are cut into tiles of 16 x k, 16 bytes for each lane, in the order in which a warp
// uses them; a *pair* is two tiles side by side, 64 bytes along k, and a *unit* the pairs of the warp's one or two
// rows of tiles. The first units of a warp stay in its registers, the next ones in shared memory, the rest are
// streamed from global memory (that is, from the second-level cache) in each step.
#pragma once

#include <cstdint>

namespace fastseq {

constexpr int kMaxProducts = 2;
constexpr int kMostTiles = 2;     // rows of tiles of a warp at one time
constexpr int kPairBytes = 64;    // of a row of weights, or of operand, along k
constexpr int kTileVectors = 32;  // 16-byte vectors of a tile: one for each lane

// Copies of the flags of a grid, of 4 bytes each. A warp that waits reads a line of 128 bytes at a time, a block waits
// for all flags of its group. With one copy, 132 blocks that wait would read 4 sectors each of a line of which the
// second-level cache gives about 2 in a cycle, and a flag would be set some 260 cycles late. So a block sets its flag
// in 8 copies, by threads side by side, and reads one of them: 33 cycles. (Flags 32 bytes apart would leave a line as
// many reads, and eight times as many lines.)
constexpr int kFlagCopies = 8;

struct ProductLayout {
  bool scatter;
  int segments;          // gates in the operand
  int in_units;          // of a block and gate, a multiple of 8
  int out_gates;         // 1 if scatter
  int out_units;         // of a block and gate, a multiple of 8
  int m_tiles;           // of 16 rows, of the block's part of the product
  int tiles;             // rows of tiles of a warp at one time, 1 to kMostTiles
  int warps_m, warps_k;  // warps share m, and k
  int passes;            // over m, if warps_m * tiles do not cover it
  int pairs;             // of a warp and pass
  int shared_units;      // of a warp
  int chunks;            // pieces of k in which the operand is brought in, chunk_pairs of each warp
  int chunk_pairs;
  int slots;              // parts that a sum comes in: warps_k, times the blocks of the group if scatter
  int sum_stride;         // between rows n of a slot
  int line_stride;        // of the operand as exchanged, in 16-byte vectors; see arithmetic.h
  int chunk_line_stride;  // of a chunk in shared memory
  int64_t tiles_at;       // bytes: the packed weights in the workspace,
  int64_t tiles_bytes;    // of one block, of one direction after another, blocks within
  int64_t images_at;      // grid: the operands of the groups in the workspace, two of each
  int64_t image_bytes;
  int operand_at;  // bytes in shared memory: cluster: one or two operands; grid: one or two chunks
  int sums_at;     // scatter: two sets
  int weights_at;

  constexpr int units() const { return passes * pairs; }
  constexpr int unit_vectors() const { return tiles * 2 * kTileVectors; }
  constexpr int warps() const { return warps_m * warps_k; }
};

struct LoopLayout {
  int gates, saved;  // of the cell, as in the table of cells
  int products;
  int blocks;           // of a group
  int rows;             // of a batch tile
  int units;            // hidden units of a block, a multiple of 8
  int projected_units;  // likewise of the projection, 0 without
  int threads;
  int shared_bytes;
  int arrivals_at;     // bytes in shared memory: two of each product; cluster only
  int state_at;        // likewise: two values of each unit and row
  int bias_at;         // a value of each gate and unit
  int flags_of_copy;   // grid: one of each block of all launches
  int64_t flags_at;    // grid: in the workspace, kFlagCopies copies
  int64_t offsets_at;  // in the workspace: [T + 1], packed sequences only
  int64_t workspace_bytes;
  ProductLayout product[kMaxProducts];
};

}  // namespace fastseq
