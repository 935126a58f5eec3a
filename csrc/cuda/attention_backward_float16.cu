#include "attention_launch_backward.h"

namespace fastseq::FASTSEQ_ISA::attention {
template const char* launch_backward<Float16Math>(Call& call, const GpuAttentionPlan& plan);
}
