// What CUDA says of this machine. Its kernel does nothing: the build compiles this file first, by itself, to see
// whether nvcc works.
#include <cuda_runtime.h>

#include "probe.h"

static_assert(CUDART_VERSION >= 12010,
              "CUDA 12.1 or later is needed, for messages between blocks (st.async)");

namespace fastseq {

__global__ void noop_kernel() {}

int cuda_device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

namespace {

// Part of a GPU, or one with fewer multiprocessors in a group, may not hold 16 blocks side by side.
int most_cluster_blocks(int device, int shared_bytes) {
  int before = 0;
  cudaGetDevice(&before);
  cudaSetDevice(device);
  cudaFuncSetAttribute(noop_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  cudaFuncSetAttribute(noop_kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  int blocks = 16;
  for (; blocks > 1; blocks /= 2) {
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {unsigned(blocks), 1, 1};
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(blocks)), config.blockDim = dim3(kLoopThreads);
    config.dynamicSmemBytes = size_t(shared_bytes);
    config.attrs = &attribute, config.numAttrs = 1;
    int clusters = 0;
    if (cudaOccupancyMaxActiveClusters(&clusters, noop_kernel, &config) == cudaSuccess && clusters > 0) break;
  }
  cudaGetLastError();
  cudaSetDevice(before);
  return blocks;
}

}  // namespace

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
  facts = {asked[0].value, asked[1].value, asked[2].value, asked[3].value, asked[4].value, 1};
  if (facts.major == 9) facts.most_cluster_blocks = most_cluster_blocks(device, asked[3].value);
  return nullptr;
}

}  // namespace fastseq
