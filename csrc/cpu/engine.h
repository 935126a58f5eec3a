// The seam between what is compiled once and what is compiled for each instruction set.
#pragma once

#include "../fastseq.h"
#include "attention_plan.h"
#include "plan.h"

namespace fastseq {

struct Engine {
  const char* isa;
  // False, and nothing was done, if there were fewer threads than the plan has.
  bool (*recurrent_forward)(const RecurrentArgs& args, const RecurrentPlan& plan);
  bool (*recurrent_backward)(const RecurrentArgs& args, const RecurrentPlan& plan);
  bool (*attention_forward)(const AttentionArgs& args, const AttentionPlan& plan);
  bool (*attention_backward)(const AttentionArgs& args, const AttentionPlan& plan);
  bool (*attention_dual_forward)(const AttentionDualArgs& args, const AttentionPlan& plan);
  bool (*attention_dual_backward)(const AttentionDualArgs& args, const AttentionPlan& plan);
  // Multiply-adds of a register-only loop, in operations per second, on the calling thread.
  double (*fma_peak)(DType dtype, double seconds);
};

// The engine in use: the best that this CPU runs, or the one that FASTSEQ_ISA names. Throws
// std::runtime_error if that one is unknown or not to be had.
const Engine& engine();

// Comma-separated: all that were compiled, and those of them that this CPU runs.
const char* compiled_isas();
const char* available_isas();

void recurrent_forward(const RecurrentArgs& args);
void recurrent_backward(const RecurrentArgs& args);
void attention_forward(const AttentionArgs& args);
void attention_backward(const AttentionArgs& args);
void attention_dual_forward(const AttentionDualArgs& args);
void attention_dual_backward(const AttentionDualArgs& args);
double fma_peak(DType dtype, int threads, double seconds);

}  // namespace fastseq
