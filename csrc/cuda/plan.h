// Which kernel, how many blocks, which tiles: a pure function of the problem and of the GPU's facts.
#pragma once

#include <string>

#include "../fastseq.h"
#include "layout.h"

namespace fastseq {

// kCluster, kGrid, kStream: persistent kernels, see step_engine.h. kSteps: no loop kernel, but a product of the
// caller's and a kernel of recurrent_cell.h for every step; for products so large that they are worth a launch.
enum class LoopKernelKind : int { kCluster = 0, kGrid = 1, kStream = 2, kSteps = 3 };
constexpr const char* kLoopKernelNames[] = {"cluster", "grid", "stream", "steps"};

struct DeviceFacts {
  int major, minor;  // compute capability
  int multiprocessors;
  int64_t shared_bytes;  // that a block may ask for
  int64_t l2_bytes;
  int most_cluster_blocks;  // that run together, with all the shared memory; 1: no clusters
};

// What the user, or a test, wants of a plan; -1 and 0: not forced.
struct ForcedLoopPlan {
  int kernel = -1;
  int blocks = 0;   // of a group
  int columns = 0;  // of tiles
};

struct LoopProblem {
  CellKind cell;
  DType dtype;
  bool tf32;
  int64_t steps, batch, hidden_size, proj_size;
  int directions;
  bool packed, backward;
  DeviceFacts device;
  ForcedLoopPlan forced;
};

// The weights that a product multiplies by: gates of `rows_of_gate` rows and `columns` columns. Transposed, its
// results belong to columns.
struct ProductWeights {
  bool projection;  // weight_hr, not weight_hh
  bool transposed;
  int first_gate;
  int64_t rows_of_gate, columns;
  int64_t outputs, inputs;  // units that there are
};

struct LoopPlan {
  LoopKernelKind kernel;
  int columns;             // of tiles: the batch tile is this times 8 rows (4 in float64)
  int64_t groups;          // directions times batch tiles
  int64_t groups_at_once;  // of a launch
  double microseconds;     // of a step of all groups, by arithmetic for an H200
  LoopLayout layout;
  ProductWeights weights[kMaxProducts];
};

// Kernels differ in these; the plan must know them too.
constexpr bool uses_tensor_cores(DType dtype, bool tf32) {
  return dtype == DType::kBFloat16 || dtype == DType::kFloat16 || (dtype == DType::kFloat32 && tf32);
}
constexpr int kLoopThreads = 256;  // so that a thread may have 255 registers
constexpr int register_units(bool tensor, int products, int columns, LoopKernelKind kernel, bool backward) {
  if (products == 2) return 0;
  if (kernel == LoopKernelKind::kStream) return tensor ? (columns == 4 ? 2 : 4) : 2;
  if (!tensor) return 4;
  if (columns > 1) return columns == 4 ? 4 : 6;
  return kernel == LoopKernelKind::kCluster && !backward ? 8 : 7;
}
constexpr int most_tiles(bool tensor, int products) { return tensor || products == 1 ? 2 : 1; }
constexpr bool may_stream(int products, LoopKernelKind kernel) {
  return products == 2 || kernel == LoopKernelKind::kStream;
}

// Throws std::runtime_error, in three lines, if nothing fits or the forced plan does not.
LoopPlan loop_plan(const LoopProblem& problem);

}  // namespace fastseq
