#include "attention_launch_forward.h"

namespace fastseq::FASTSEQ_ISA::attention {
template const char* launch_outside<Float64Math>(const Call& call);
template const char* launch_forward<Float64Math>(Call& call, const GpuAttentionPlan& plan);
}  // namespace fastseq::FASTSEQ_ISA::attention
