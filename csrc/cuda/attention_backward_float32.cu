#include "attention_launch_backward.h"

namespace fastseq::FASTSEQ_ISA::attention {
template const char* launch_outside_grads<Float32Math>(const Call& call);
template const char* launch_backward<Float32Math>(Call& call, const GpuAttentionPlan& plan);
}  // namespace fastseq::FASTSEQ_ISA::attention
