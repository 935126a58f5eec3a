// Which threads do what: a pure function of shape, dtype and thread count.
#pragma once

#include "../fastseq.h"

namespace fastseq {

// Threads form direction_parts x batch_parts x unit_parts. A direction part runs its directions to the end on
// its own. A batch part keeps its rows through all steps and needs no barrier in time. Unit parts share rows,
// own hidden units, and meet at each step.
struct RecurrentPlan {
  int direction_parts;
  int batch_parts;
  int unit_parts;
  int64_t
      chunk_rows;  // rows (steps x batch) whose input projection, or gradients, are in the cache at one time
};

struct RecurrentProblem {
  CellKind cell;
  DType dtype;
  int threads;
  int64_t steps, batch, input_size, hidden_size, proj_size;
  int directions;
  bool backward;
  int planes;              // rows of the kernel for each row: 2 with tangents
  const int* forced_plan;  // [4], see RecurrentArgs
};

// A unit part has so many hidden units at least: one vector of the widest instruction set.
constexpr int64_t kUnitQuantum = 16;

RecurrentPlan recurrent_plan(const RecurrentProblem& problem);

}  // namespace fastseq
