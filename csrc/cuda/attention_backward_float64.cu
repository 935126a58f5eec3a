#include "attention_launch_backward.h"

namespace fastseq::FASTSEQ_ISA::attention {
template const char* launch_outside_grads<Float64Math>(const Call& call);
template const char* launch_backward<Float64Math>(Call& call, const GpuAttentionPlan& plan);
}  // namespace fastseq::FASTSEQ_ISA::attention
