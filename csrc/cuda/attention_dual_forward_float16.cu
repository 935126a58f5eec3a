#include "attention_launch_dual_forward.h"

namespace fastseq::FASTSEQ_ISA::attention {
template const char* launch_dual_forward<Float16Math>(DualCall& call, const GpuAttentionPlan& plan);
}  // namespace fastseq::FASTSEQ_ISA::attention
