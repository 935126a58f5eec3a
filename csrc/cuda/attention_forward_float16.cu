#include "attention_launch_forward.h"

namespace fastseq::FASTSEQ_ISA::attention {
template const char* launch_outside<Float16Math>(const Call& call);
template const char* launch_weights<Float16Math>(Call& call, const GpuAttentionPlan& plan);
template const char* launch_forward<Float16Math>(Call& call, const GpuAttentionPlan& plan);
}  // namespace fastseq::FASTSEQ_ISA::attention
