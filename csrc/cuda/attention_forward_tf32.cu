#include "attention_launch_forward.h"

namespace fastseq::FASTSEQ_ISA::attention {
template const char* launch_outside<Tf32Math>(const Call& call);
template const char* launch_forward<Tf32Math>(Call& call, const GpuAttentionPlan& plan);
}  // namespace fastseq::FASTSEQ_ISA::attention
