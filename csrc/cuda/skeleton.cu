// The kernel that does nothing, in every architecture of the build: whichever image of it a device would run,
// it would run of the real kernels too, and where it finds none it will find none of theirs.
#include <cuda_runtime.h>

#include "probe.h"

namespace fastseq {
namespace {

__global__ void noop_kernel() {}

}  // namespace

int cuda_device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

int cuda_kernel_architecture(int device) {
  int previous = 0;
  cudaFuncAttributes attributes{};
  if (cudaGetDevice(&previous) != cudaSuccess || cudaSetDevice(device) != cudaSuccess) return 0;
  const bool found = cudaFuncGetAttributes(&attributes, noop_kernel) == cudaSuccess;
  cudaSetDevice(previous);
  return found ? attributes.binaryVersion : 0;
}

}  // namespace fastseq
