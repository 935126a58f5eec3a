// The CUDA engine as the bindings see it. Compiled twice: for the GPU, and for the host twin.
#pragma once

#include "../fastseq.h"
#include "plan.h"

namespace fastseq::FASTSEQ_ISA {

// Null, or what is wrong. Everything is on args.stream when they return, and nothing has been waited for.
const char* recurrent_loop_forward(const RecurrentLoopArgs& args, const LoopPlan& plan);
const char* recurrent_loop_backward(const RecurrentLoopArgs& args, const LoopPlan& plan);
const char* cell_forward(const CellStepArgs& args);
const char* cell_backward(const CellGradArgs& args);
const char* cell_dual_forward(const CellStepDualArgs& args);
const char* cell_dual_backward(const CellGradDualArgs& args);

}  // namespace fastseq::FASTSEQ_ISA
