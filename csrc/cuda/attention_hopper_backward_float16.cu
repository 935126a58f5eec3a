#include "attention_hopper_backward_launch.h"

namespace fastseq::FASTSEQ_ISA::attention {
template const char* launch_hopper_grad_queries<float16>(const Call& call, const TilePass& pass);
template const char* launch_hopper_grad_keys<float16>(const Call& call, const TilePass& pass);
template const char* launch_hopper_one_pass<float16>(const Call& call, const TilePass& pass);
}  // namespace fastseq::FASTSEQ_ISA::attention
