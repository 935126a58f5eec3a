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

// What blocks of a group exchange for a product: its operand, each block then making the results of its own units from
// all of it; or, in the backward pass of a cluster, parts of the results of all units, each block's from its own part
// of the operand.
enum class Exchange : int { kOperand = 0, kSums = 1 };
constexpr const char* kExchangeNames[] = {"operand", "sums"};

struct DeviceFacts {
  int major, minor;  // compute capability
  int multiprocessors;
  int64_t shared_bytes;  // that a block may ask for
  int64_t l2_bytes;
  int most_cluster_blocks;  // that run together, with all the shared memory; 1: no clusters
  int clusters[4];          // of 2, 4, 8, 16 blocks, that run at the same time; 0: not known
};

// What the user, or a test, wants of a plan; -1 and 0: not forced.
struct ForcedLoopPlan {
  int kernel = -1;
  int blocks = 0;     // of a group
  int columns = 0;    // of tiles
  int exchange = -1;  // of a cluster's backward pass
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
  Exchange exchange;
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
// Units of a warp that stay in registers, of a step's product: as many as ptxas finds room for, whatever the
// arithmetic and the architecture. Of two products the larger, which comes first forward, last backward, has the more.
constexpr int register_units(bool tensor, int products, int columns, LoopKernelKind kernel, Exchange exchange,
                             bool backward, int product) {
  const bool streams = kernel == LoopKernelKind::kStream, cluster = kernel == LoopKernelKind::kCluster;
  if (products == 2) {
    const bool larger = product == int(backward);
    if (!tensor) {
      const bool room = !backward || (cluster && exchange == Exchange::kOperand);
      return streams ? 1 : larger && room ? 3 : 2;
    }
    if (streams) return larger ? 4 - columns : columns == 2 && backward ? 1 : 2;
    if (columns == 1) return larger && cluster != backward ? 5 : 4;
    return cluster && backward && !larger ? (exchange == Exchange::kSums ? 3 : 2) : 4;
  }
  if (!tensor) return streams ? 3 : 5;
  if (streams) return columns == 4 ? 3 : columns == 2 ? 5 : 6;
  return columns == 4 ? 5 : columns == 2 ? 7 : backward ? 8 : 9;
}
constexpr int most_columns(bool tensor, int products) { return !tensor ? 1 : products == 2 ? 2 : 4; }
constexpr bool may_stream(LoopKernelKind kernel) { return kernel == LoopKernelKind::kStream; }

// Throws std::runtime_error, in three lines, if nothing fits or the forced plan does not.
LoopPlan loop_plan(const LoopProblem& problem);

}  // namespace fastseq
