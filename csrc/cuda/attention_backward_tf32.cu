#include "attention_launch_backward.h"

namespace fastseq::FASTSEQ_ISA::attention {
template const char* launch_outside_grads<Tf32Math>(const Call& call);
template const char* launch_backward<Tf32Math>(Call& call, const GpuAttentionPlan& plan);
}  // namespace fastseq::FASTSEQ_ISA::attention
