#include "attention_launch_forward.h"

namespace fastseq::FASTSEQ_ISA::attention {
template const char* launch_outside<Bfloat16Math>(const Call& call);
template const char* launch_weights<Bfloat16Math>(Call& call, const GpuAttentionPlan& plan);
template const char* launch_forward<Bfloat16Math>(Call& call, const GpuAttentionPlan& plan);
}  // namespace fastseq::FASTSEQ_ISA::attention
