// Attention on CUDA: from a plan to launches. Each function returns null, or what the CUDA runtime says is wrong.
#pragma once

#include "../fastseq.h"
#include "attention_plan.h"

namespace fastseq::FASTSEQ_ISA {

const char* attention_forward(const AttentionArgs& args, const GpuAttentionPlan& plan);
const char* attention_backward(const AttentionArgs& args, const GpuAttentionPlan& plan);
const char* attention_dual_forward(const AttentionDualArgs& args, const GpuAttentionPlan& plan);
// The tangents of gradients alone; what is wanted of the gradients themselves attention_backward() makes.
const char* attention_dual_backward(const AttentionDualArgs& args, const GpuAttentionPlan& plan);

namespace attention {

struct Call;
struct DualCall;

// Of one arithmetic, in files of their own, which are compiled side by side. First what no sequence has, if packed.
template <class M>
const char* launch_outside(const Call& call);
template <class M>
const char* launch_outside_grads(const Call& call);
template <class M>
const char* launch_forward(Call& call, const GpuAttentionPlan& plan);
// The same but for the weights on sm_90a, of bfloat16 and float16; and those.
template <class M>
const char* launch_hopper(Call& call, const GpuAttentionPlan& plan);
template <class M>
const char* launch_weights(Call& call, const GpuAttentionPlan& plan);
template <class M>
const char* launch_backward(Call& call, const GpuAttentionPlan& plan);
template <class M>
const char* launch_dual_forward(DualCall& call, const GpuAttentionPlan& plan);
template <class M>
const char* launch_dual_backward(DualCall& call, const GpuAttentionPlan& plan);

// The kernels for compute capability 9.0 of one 16-bit dtype.
template <class E>
const char* launch_hopper_grad_queries(const Call& call, const TilePass& pass);
template <class E>
const char* launch_hopper_grad_keys(const Call& call, const TilePass& pass);
template <class E>
const char* launch_hopper_one_pass(const Call& call, const TilePass& pass);

}  // namespace attention
}  // namespace fastseq::FASTSEQ_ISA
