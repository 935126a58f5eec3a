// The persistent kernels, what a step of each costs, and which of them a plan means.
//
// All of them are one template, ForwardPass or BackwardPass over a StepEngine; they differ in where the weights are
// (registers, then shared memory, then L2) and in how operands come to the blocks. Numbers are for an H200: 132
// multiprocessors at 1.7 GHz, 227 KiB of shared memory a block at 128 B a cycle, 60 MB of L2 from which each
// multiprocessor gets 24 B a cycle while all of them read, 4.8 TB/s of memory. 256 threads, one block a
// multiprocessor. Registers as ptxas reports them for bfloat16; no kernel spills, or the build fails.
//
// cluster, forward     LSTM, H = 512, bfloat16, 16 blocks, a tile of 8 rows
//   operations   4 H^2 B = 8.4 M multiply-adds a group, 256 mma.m16n8k16 a block, 64 a sub-core: 512 cycles
//   bytes        weights none (128 KB a block, in registers); shared memory 33 KB of operand read by four rows of
//                warps, 16 KB of sums: 400 cycles; 7.5 KB of messages received: 540 cycles; from memory 2 KB of W x,
//                to memory 0.5 KB of h and 2.5 KB of what is saved, neither waited for
//   has          250 registers, 27 KB of shared memory
//   implies      512 cycles of mma, then sums and gates (400), then messages (500 to 1000): 1.2 us a step
// cluster, backward    the same layer
//   operations   256 mma a block again, with U transposed: k is 128 own gates, m all 512 units
//   bytes        8 KB of operand from shared memory; 15 KB of messages (H B floats, where d itself would be 30 KB):
//                1100 cycles; 6 KB of what was saved and gradients from memory, 2 KB to it
//   has          247 registers, 41 KB of shared memory
//   implies      1.6 us a step; the messages are the larger half
//   d gathered   what an RNN does instead, and a reset-before GRU: 2 bytes a unit, row and gate received, not 4 a unit
// grid, forward        LSTM, H = 1024, bfloat16, 64 blocks for each of two tiles of 8 rows
//   operations   256 mma a block, 64 a sub-core: 512 cycles
//   bytes        16 KB of operand from L2 into each of 128 blocks, 2 MB in all: 680 cycles; weights none from L2;
//                shared memory 33 KB of operand and 16 KB of sums: 380 cycles
//   has          246 registers, 26 KB of shared memory
//   implies      flags through L2 (about 1.1 us) and the above: 2.1 us a step
// grid, backward       the same layer; d is gathered
//   operations   256 mma a block: 512 cycles
//   bytes        64 KB of d from L2 into each block, 8 MB in all: 2700 cycles; shared memory as much again
//   has          247 registers, 119 KB of shared memory (64 KB of them weights)
//   implies      3.7 us a step, most of it d on its way
// stream, backward     LSTM, H = 2048, bfloat16, 128 blocks, a tile of 16 rows
//   operations   512 mma for each of two columns of tiles, 256 a sub-core: 2050 cycles
//   bytes        60 KB of weights from L2 into each block, one unit ahead: 2500 cycles; 256 KB of d from L2: 10900
//   has          244 registers, 226 KB of shared memory (168 KB of them weights)
//   implies      9.9 us a step, most of it d; forward (grid: all 256 KB of weights of a block fit) 4.5 us
// With tf32 a tile is half as deep: twice the mma and bytes. Strict float32 and float64 have 2048 multiply-adds a
// pair of tiles and row instead, 16 and 32 cycles a sub-core, 235 to 255 registers.
//
// Two products (GRU that resets before, projection) have two exchanges, and one set of registers for the weights of
// both: with 8 rows 4 or 5 units of the larger product and 4 of the other. They stream only in the stream kernel.
// grid, forward        reset-before GRU, H = 1024, bfloat16, 64 blocks for each of two tiles of 8 rows
//   operations   128 and 64 mma a block: 256 and 128 cycles
//   bytes        16 KB of operand from L2 into each of 128 blocks, twice: 680 cycles each; weights none (96 KB a
//                block, in registers); shared memory 60 KB of operand and sums: 470 cycles in all
//   has          246 registers, 48 KB of shared memory
//   implies      twice the flags through L2 (2.2 us) and the above: 3.7 us a step
// grid, backward       the same layer; d_n is gathered, then d_r and d_z
//   operations   64 and 128 mma a block
//   bytes        16 KB and 32 KB from L2 into each block: 680 and 1360 cycles; 24 KB of weights from shared memory
//   has          255 registers, 84 KB of shared memory
//   implies      4.2 us a step
// cell                 see recurrent_cell.h; weights into tiles, and the rest around: recurrent_prepare.h
//
// loop_plan() (plan.cpp) has this arithmetic for every shape, and takes the least.
#pragma once

#include <launch.h>

#include "plan.h"
#include "recurrent_backward.h"
#include "recurrent_forward.h"

namespace fastseq::FASTSEQ_ISA {

template <class Traits>
struct LoopKernel {
  using Args = LoopKernelArgs;
  static constexpr int kThreads = kLoopThreads;

  static FS_DEVICE void run(const Args& args) {
    if constexpr (Traits::kBackward) {
      BackwardPass<Traits>(args).run();
    } else {
      ForwardPass<Traits>(args).run();
    }
  }
};

template <class M, LoopKernelKind kKind, bool kBackward, int kProducts, int kColumns>
const char* launch_kernel(const LaunchShape& shape, const LoopKernelArgs& args) {
  const auto launch_with = [&](auto exchange) {
    return launch<LoopKernel<KernelTraits<M, kKind, exchange, kBackward, kProducts, kColumns>>>(shape, args);
  };
  if constexpr (kKind == LoopKernelKind::kCluster && kBackward) {
    if (args.layout.product[0].scatter) {
      return launch_with(std::integral_constant<Exchange, Exchange::kSums>{});
    }
  }
  return launch_with(std::integral_constant<Exchange, Exchange::kOperand>{});
}

template <class M, LoopKernelKind kKind, bool kBackward, int kProducts>
const char* launch_columns(const LaunchShape& shape, const LoopKernelArgs& args, int columns) {
  constexpr int kMost = most_columns(M::kTensor, kProducts);
  if constexpr (kMost >= 4) {
    if (columns == 4) return launch_kernel<M, kKind, kBackward, kProducts, 4>(shape, args);
  }
  if constexpr (kMost >= 2) {
    if (columns == 2) return launch_kernel<M, kKind, kBackward, kProducts, 2>(shape, args);
  }
  return launch_kernel<M, kKind, kBackward, kProducts, 1>(shape, args);
}

template <class M, LoopKernelKind kKind, bool kBackward>
const char* launch_products(const LaunchShape& shape, const LoopKernelArgs& args, int columns) {
  return args.layout.products == 2 ? launch_columns<M, kKind, kBackward, 2>(shape, args, columns)
                                   : launch_columns<M, kKind, kBackward, 1>(shape, args, columns);
}

// For recurrent.cu, which launches by name; each is compiled where its kernels are.
template <class M>
const char* launch_cluster(const LaunchShape& shape, const LoopKernelArgs& args, bool backward, int columns);
template <class M>
const char* launch_grid(const LaunchShape& shape, const LoopKernelArgs& args, bool backward, bool streams,
                        int columns);

#define FASTSEQ_CLUSTER_KERNELS(M)                                                                   \
  template <>                                                                                        \
  const char* launch_cluster<M>(const LaunchShape& shape, const LoopKernelArgs& args, bool backward, \
                                int columns) {                                                       \
    return backward ? launch_products<M, LoopKernelKind::kCluster, true>(shape, args, columns)       \
                    : launch_products<M, LoopKernelKind::kCluster, false>(shape, args, columns);     \
  }
#define FASTSEQ_GRID_KERNELS(M)                                                                   \
  template <>                                                                                     \
  const char* launch_grid<M>(const LaunchShape& shape, const LoopKernelArgs& args, bool backward, \
                             bool streams, int columns) {                                         \
    if (streams) {                                                                                \
      return backward ? launch_products<M, LoopKernelKind::kStream, true>(shape, args, columns)   \
                      : launch_products<M, LoopKernelKind::kStream, false>(shape, args, columns); \
    }                                                                                             \
    return backward ? launch_products<M, LoopKernelKind::kGrid, true>(shape, args, columns)       \
                    : launch_products<M, LoopKernelKind::kGrid, false>(shape, args, columns);     \
  }

}  // namespace fastseq::FASTSEQ_ISA
