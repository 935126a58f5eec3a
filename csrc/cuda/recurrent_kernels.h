// The persistent kernels, and which of them a plan means. Each kind of arithmetic is compiled in two files of its
// own, one of them for GPUs with clusters only.
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
  constexpr int kRegisterUnits = register_units(M::kTensor, kProducts, kColumns, kKind);
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
