#include <launch.h>

#include <algorithm>

#include "recurrent.h"
#include "recurrent_cell.h"

namespace fastseq::FASTSEQ_ISA {
namespace {

template <class Kernel>
const char* run_everywhere(const typename Kernel::Args& args, int64_t threads) {
  const int64_t blocks = std::min<int64_t>((threads + Kernel::kThreads - 1) / Kernel::kThreads, 1 << 20);
  if (blocks == 0) return nullptr;
  return launch<Kernel>({blocks, Kernel::kThreads, 0, 1, false, args.stream}, args);
}

// Threads that have something to do.
template <class Args>
int64_t units_of(const Args& args) {
  int64_t rows = 0;
  for (int d = 0; d < args.directions; ++d) rows = std::max(rows, args.direction[d].now.rows);
  return args.directions * rows * args.hidden_size;
}

// Calls body(S{}) for the storage type of a dtype.
template <class Body>
const char* with_storage(DType dtype, Body body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float{});
    case DType::kFloat64:
      return body(double{});
    case DType::kBFloat16:
      return body(bfloat16{});
    case DType::kFloat16:
      return body(float16{});
  }
  return "unknown dtype";
}

}  // namespace

const char* cell_forward(const CellStepArgs& args) {
  const DeviceGuard guard(args.device);
  return with_storage(args.dtype, [&](auto storage) {
    using S = decltype(storage);
    if (args.weight_hh) return run_everywhere<FusedCellKernel<S>>(args, args.hidden_size * kWarp);
    return run_everywhere<CellKernel<S, CellStepArgs>>(args, units_of(args));
  });
}

const char* cell_backward(const CellGradArgs& args) {
  const DeviceGuard guard(args.device);
  return with_storage(args.dtype, [&](auto storage) {
    return run_everywhere<CellGradKernel<decltype(storage), CellGradArgs>>(args, units_of(args));
  });
}

const char* cell_dual_forward(const CellStepDualArgs& args) {
  const DeviceGuard guard(args.device);
  return with_storage(args.dtype, [&](auto storage) {
    return run_everywhere<CellKernel<decltype(storage), CellStepDualArgs>>(args, units_of(args));
  });
}

const char* cell_dual_backward(const CellGradDualArgs& args) {
  const DeviceGuard guard(args.device);
  return with_storage(args.dtype, [&](auto storage) {
    return run_everywhere<CellGradKernel<decltype(storage), CellGradDualArgs>>(args, units_of(args));
  });
}

}  // namespace fastseq::FASTSEQ_ISA
