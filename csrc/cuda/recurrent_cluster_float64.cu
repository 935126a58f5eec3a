#include "recurrent_kernels.h"

namespace fastseq::FASTSEQ_ISA {
FASTSEQ_CLUSTER_KERNELS(Float64Math)
}
