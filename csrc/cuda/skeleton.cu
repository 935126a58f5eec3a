// The CUDA side of the build before its kernels: one that does nothing, compiled for every architecture.
#include <cuda_runtime.h>

#include "probe.h"

namespace fastseq {

__global__ void noop_kernel() {}

int cuda_device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

}  // namespace fastseq
