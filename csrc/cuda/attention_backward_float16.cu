#include "attention_launch_backward.h"

namespace fastseq::FASTSEQ_ISA::attention {
template const char* launch_outside_grads<Float16Math>(const Call& call);
template const char* launch_backward<Float16Math>(Call& call, const GpuAttentionPlan& plan);
}  // namespace fastseq::FASTSEQ_ISA::attention
