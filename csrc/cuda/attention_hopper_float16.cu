#include "attention_hopper_launch.h"

namespace fastseq::FASTSEQ_ISA::attention {
template const char* launch_hopper<Float16Math>(Call& call, const GpuAttentionPlan& plan);
}
