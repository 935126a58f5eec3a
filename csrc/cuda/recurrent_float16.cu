#include "recurrent_kernels.h"

namespace fastseq::FASTSEQ_ISA {
FASTSEQ_GRID_KERNELS(Float16Math)
}
