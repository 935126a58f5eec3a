#include "attention_launch_dual_backward.h"

namespace fastseq::FASTSEQ_ISA::attention {
template const char* launch_dual_backward<Float16Math>(DualCall& call, const GpuAttentionPlan& plan);
}  // namespace fastseq::FASTSEQ_ISA::attention
