#include "attention_launch_forward.h"

namespace fastseq::FASTSEQ_ISA::attention {
template const char* launch_outside<Float32Math>(const Call& call);
template const char* launch_forward<Float32Math>(Call& call, const GpuAttentionPlan& plan);
}  // namespace fastseq::FASTSEQ_ISA::attention
