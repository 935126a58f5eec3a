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
//   has          251 registers, 28 KB of shared memory
//   implies      512 cycles of mma, then sums and gates (400), then messages (500 to 1000): 1.2 us a step
// cluster, backward    the same layer
//   operations   256 mma a block again, with U transposed: k is 128 own gates, m all 512 units
//   bytes        8 KB of operand from shared memory; 15 KB of messages (H B floats, where d itself would be 30 KB):
//                1100 cycles; 6 KB of what was saved and gradients from memory, 2 KB to it
//   has          247 registers, 58 KB of shared memory (16 KB of them weights)
//   implies      1.6 us a step; the messages are the larger half
// grid, forward        LSTM, H = 1024, bfloat16, 64 blocks for each of two tiles of 8 rows
//   operations   256 mma a block, 64 a sub-core: 512 cycles
//   bytes        16 KB of operand from L2 into each of 128 blocks, 2 MB in all: 680 cycles; weights none from L2;
//                shared memory 33 KB of operand, 16 KB of weights and 16 KB of sums: 500 cycles
//   has          236 registers, 43 KB of shared memory
//   implies      flags through L2 (about 1.1 us) and the above: 2.1 us a step
// grid, backward       the same layer; d is gathered
//   operations   256 mma a block: 512 cycles
//   bytes        64 KB of d from L2 into each block, 8 MB in all: 2700 cycles; shared memory as much again
//   has          247 registers, 130 KB of shared memory (72 KB of them weights)
//   implies      3.7 us a step, most of it d on its way
// stream, backward     LSTM, H = 2048, bfloat16, 128 blocks, a tile of 16 rows
//   operations   512 mma for each of two columns of tiles, 256 a sub-core: 2050 cycles
//   bytes        66 KB of weights from L2 into each block, one unit ahead: 2750 cycles; 256 KB of d from L2: 10900
//   has          240 registers, 227 KB of shared memory (168 KB of them weights)
//   implies      9.9 us a step, most of it d; forward (grid: all 256 KB of weights of a block fit) 4.6 us
// With tf32 a tile is half as deep: twice the mma and bytes. Strict float32 and float64 have 2048 multiply-adds a
// pair of tiles and row instead, 16 and 32 cycles a sub-core, 245 to 255 registers. Two products (GRU that resets
// before, projection): twice the exchanges, weights in shared memory and L2 only, 220 registers.
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
  constexpr Exchange kExchange = kKind == LoopKernelKind::kCluster ? Exchange::kCluster : Exchange::kGrid;
  constexpr int kRegisterUnits = register_units(M::kTensor, kProducts, kColumns, kKind, kBackward);
  constexpr bool kStreams = may_stream(kProducts, kKind);
  return launch<
      LoopKernel<KernelTraits<M, kColumns, kExchange, kBackward, kProducts, kRegisterUnits, kStreams>>>(shape,
                                                                                                        args);
}

template <class M, LoopKernelKind kKind, bool kBackward>
const char* launch_columns(const LaunchShape& shape, const LoopKernelArgs& args, int columns) {
  if constexpr (kKind != LoopKernelKind::kGrid) {
    if (args.layout.products == 2) {
      return launch_kernel<M, kKind, kBackward, 2, M::kTensor ? 2 : 1>(shape, args);
    }
  }
  if constexpr (M::kTensor) {
    if (columns == 2) return launch_kernel<M, kKind, kBackward, 1, 2>(shape, args);
    if (columns == 4) return launch_kernel<M, kKind, kBackward, 1, 4>(shape, args);
  }
  return launch_kernel<M, kKind, kBackward, 1, 1>(shape, args);
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
    return backward ? launch_columns<M, LoopKernelKind::kCluster, true>(shape, args, columns)        \
                    : launch_columns<M, LoopKernelKind::kCluster, false>(shape, args, columns);      \
  }
#define FASTSEQ_GRID_KERNELS(M)                                                                   \
  template <>                                                                                     \
  const char* launch_grid<M>(const LaunchShape& shape, const LoopKernelArgs& args, bool backward, \
                             bool streams, int columns) {                                         \
    if (streams) {                                                                                \
      return backward ? launch_columns<M, LoopKernelKind::kStream, true>(shape, args, columns)    \
                      : launch_columns<M, LoopKernelKind::kStream, false>(shape, args, columns);  \
    }                                                                                             \
    return backward ? launch_columns<M, LoopKernelKind::kGrid, true>(shape, args, columns)        \
                    : launch_columns<M, LoopKernelKind::kGrid, false>(shape, args, columns);      \
  }

}  // namespace fastseq::FASTSEQ_ISA
