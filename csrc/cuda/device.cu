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

// How many clusters of each size run at the same time, with what the loop kernels ask for. They lie within a group of
// multiprocessors, and how large the groups are differs from one GPU to the next; part of a GPU, or one with small
// groups, may not hold 16 blocks side by side.
void count_clusters(int device, DeviceFacts& facts) {
  int before = 0;
  cudaGetDevice(&before);
  cudaSetDevice(device);
  const int shared_bytes = int(facts.shared_bytes);
  cudaFuncSetAttribute(noop_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  cudaFuncSetAttribute(noop_kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  int blocks = 2;
  for (int& count : facts.clusters) {
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {unsigned(blocks), 1, 1};
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(blocks)), config.blockDim = dim3(kLoopThreads);
    config.dynamicSmemBytes = size_t(shared_bytes);
    config.attrs = &attribute, config.numAttrs = 1;
    if (cudaOccupancyMaxActiveClusters(&count, noop_kernel, &config) != cudaSuccess) count = 0;
    if (count > 0) facts.most_cluster_blocks = blocks;
    blocks *= 2;
  }
  cudaGetLastError();
  cudaSetDevice(before);
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
  facts = {asked[0].value, asked[1].value, asked[2].value, asked[3].value, asked[4].value, 1, {}};
  if (facts.major == 9) count_clusters(device, facts);
  return nullptr;
}

}  // namespace fastseq
