// The small kernels around the persistent one, once a call: weights into tiles, offsets of a packed sequence to the
// device, and the previous state of every row, which the gradient of weight_hh needs. All are bound by memory:
//
//   PackKernel      reads the weights once and writes them once, 4 MB for an LSTM of H = 512 in bfloat16: 1 us at
//                   4.8 TB/s; what it takes is the index arithmetic of each element, some 60 instructions: about 5 us
//   PreviousKernel  reads and writes T B R elements: 14 us for T = 512, B = 64, H = 512 in bfloat16
//   NumbersKernel   496 numbers a launch, so one launch for every 496 steps: a launch, 3 us
#pragma once

#include <prim.h>

#include "../fastseq.h"
#include "arithmetic.h"
#include "plan.h"
#include "recurrent_items.h"

namespace fastseq::FASTSEQ_ISA {

// Weights of one product into the tiles that layout.h describes, for all blocks of a group and all directions.
// A thread makes 16 bytes; it reads the weights once, in the order of the tiles.
template <class M>
struct PackKernel {
  using Storage = typename M::Storage;
  using Element = typename M::Element;
  static constexpr int kThreads = 256;

  struct Args {
    ProductLayout layout;
    ProductWeights weights;
    const void* weight[2];  // of each direction
    int blocks, directions;
    unsigned char* to;
  };

  static FS_DEVICE void run(const Args& args) {
    const ProductLayout& layout = args.layout;
    const int64_t per_warp = int64_t(layout.units()) * layout.unit_vectors(),
                  per_block = layout.warps() * per_warp;
    const int64_t all = args.directions * args.blocks * per_block;
    for (int64_t i = int64_t(block_index()) * thread_count() + thread_index(); i < all;
         i += int64_t(block_count()) * thread_count()) {
      const int direction = int(i / (args.blocks * per_block)), rank = int(i / per_block % args.blocks);
      const int warp = int(i / per_warp % layout.warps()), unit = int(i % per_warp / layout.unit_vectors());
      const int v = int(i % layout.unit_vectors()), lane = v % kWarp, half = v / kWarp % 2, t = v / kWarp / 2;
      const int pass = unit / layout.pairs, im = warp % layout.warps_m, ik = warp / layout.warps_m;
      const int tile = (pass * layout.warps_m + im) * layout.tiles + t;
      const int pair = ik + unit % layout.pairs * layout.warps_k;
      Element elements[M::kVector];
      for (int e = 0; e < M::kVector; ++e) {
        const TilePlace place = M::tile_element(lane, e);
        elements[e] = weight_at(args, direction, rank, tile * 16 + place.row,
                                (pair * 2 + half) * (M::kPair / 2) + place.k);
      }
      Vector16 vector;
      memcpy(&vector, elements, 16);
      const int64_t block = int64_t(direction) * args.blocks + rank;
      reinterpret_cast<Vector16*>(args.to + block * layout.tiles_bytes)[i % per_block] = vector;
    }
  }

  static FS_DEVICE Element weight_at(const Args& args, int direction, int rank, int m, int k) {
    const ProductLayout& layout = args.layout;
    const ProductWeights& w = args.weights;
    const int in_all = layout.scatter ? layout.in_units : args.blocks * layout.in_units;
    const int gate = layout.scatter ? 0 : m / layout.out_units, segment = k / in_all;
    const int out = layout.scatter ? m : rank * layout.out_units + m % layout.out_units;
    const int in = k % in_all + (layout.scatter ? rank * layout.in_units : 0);
    if (gate >= layout.out_gates || segment >= layout.segments || out >= w.outputs || in >= w.inputs) {
      return M::element(0);
    }
    const int64_t row =
        int64_t(w.first_gate + (w.transposed ? segment : gate)) * w.rows_of_gate + (w.transposed ? in : out);
    const int64_t column = w.transposed ? out : in;
    return M::element(widen(static_cast<const Storage*>(args.weight[direction])[row * w.columns + column]));
  }
};

// Numbers from the parameters of a launch to memory: no copy from the host, which would have to be waited for, or
// whose source would have to outlive a CUDA graph.
struct NumbersKernel {
  static constexpr int kThreads = 256, kMost = 496;
  struct Args {
    int64_t* to;
    int64_t count;
    int64_t numbers[kMost];
  };
  static FS_DEVICE void run(const Args& args) {
    for (int64_t i = thread_index(); i < args.count; i += thread_count()) args.to[i] = args.numbers[i];
  }
};

// previous[row] = h_{t-1} of the row: output of the step before, or h0. A block takes a step at a time.
template <class Storage>
struct PreviousKernel {
  static constexpr int kThreads = 256;
  using Args = LoopKernelArgs;
  static FS_DEVICE void run(const Args& args) {
    const RecurrentLoopArgs& loop = args.loop;
    const int64_t width = loop.proj_size ? loop.proj_size : loop.hidden_size;
    const bool packed = loop.shape.batch_sizes != nullptr;
    const int64_t all = loop.shape.steps * loop.directions;
    for (int64_t i = block_index(); i < all; i += block_count()) {
      const int direction = int(i % loop.directions);
      const LoopDirection& tensors = loop.direction[direction];
      const StepRows now = rows_of(args, i / loop.directions);
      const bool reverse = loop.reversed || direction == 1;
      const StepRows before = rows_of(args, reverse ? now.t + 1 : now.t - 1);
      const uint8_t* const resets =
          loop.resets && before.rows ? loop.resets + (reverse ? before : now).offset : nullptr;
      const auto* const h0 = static_cast<const Storage*>(tensors.h0);
      auto* const to = static_cast<Storage*>(tensors.previous) + now.offset * width;
      for (int64_t j = thread_index(); j < now.rows * width; j += thread_count()) {
        const int64_t row = j / width, unit = j % width;
        Storage h{};
        const bool continues = has_step(loop.lengths, before, row);
        if (!has_step(loop.lengths, now, row) || (continues && resets && resets[row])) {
          // zero
        } else if (continues) {
          h = row_at<const Storage>(loop.output, packed, before, row)[direction * width + unit];
        } else if (h0) {
          h = h0[row * width + unit];
        }
        to[j] = h;
      }
    }
  }
};

}  // namespace fastseq::FASTSEQ_ISA
