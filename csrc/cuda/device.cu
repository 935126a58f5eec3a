// What CUDA says of this machine. Its kernel does nothing: the build compiles this file first, by itself, to see
// whether nvcc works.
#include <cuda_runtime.h>

#include "probe.h"

namespace fastseq {

__global__ void noop_kernel() {}

int cuda_device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

const char* cuda_device_facts(int device, DeviceFacts& facts) {
  struct {
    cudaDeviceAttr attribute;
    int value;
  } asked[] = {{cudaDevAttrComputeCapabilityMajor, 0},
               {cudaDevAttrComputeCapabilityMinor, 0},
               {cudaDevAttrMultiProcessorCount, 0},
               {cudaDevAttrMaxSharedMemoryPerBlockOptin, 0},
               {cudaDevAttrL2CacheSize, 0}};
  for (auto& a : asked) {
    const cudaError_t error = cudaDeviceGetAttribute(&a.value, a.attribute, device);
    if (error != cudaSuccess) {
      cudaGetLastError();
      return cudaGetErrorString(error);
    }
  }
  facts = {asked[0].value, asked[1].value, asked[2].value, asked[3].value, asked[4].value};
  return nullptr;
}

}  // namespace fastseq
