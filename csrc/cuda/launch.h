// Starting kernels. Nothing here allocates or waits for the GPU, so that all of it can be captured in a CUDA graph.
#pragma once

#include <cuda_runtime.h>
#include <prim.h>

#include <atomic>

namespace fastseq::FASTSEQ_ISA {

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, 1)
    entry(const __grid_constant__ typename Kernel::Args args) {
  Kernel::run(args);
}

// Null, or what the CUDA runtime says is wrong.
template <class Kernel>
const char* launch(const LaunchShape& shape, const typename Kernel::Args& args) {
  static_assert(sizeof(typename Kernel::Args) <= 4096, "parameters of a kernel on sm_80");
  const auto kernel = entry<Kernel>;
  // All that there is, whatever this launch wants: another thread may be about to launch the same kernel with more.
  static std::atomic<uint64_t> allowed{0};  // a bit for each device
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess && shape.shared_bytes > 48 * 1024 && !(allowed >> (device & 63) & 1)) {
    int most = 0;
    error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error == cudaSuccess) {
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    }
    if (error == cudaSuccess && device < 64) allowed |= uint64_t(1) << device;
  }
  if (error == cudaSuccess && shape.cluster > 8) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  if (error != cudaSuccess) return cudaGetErrorString(cudaGetLastError());
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(shape.blocks));
  config.blockDim = dim3(unsigned(shape.threads));
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = static_cast<cudaStream_t>(shape.stream);
  config.attrs = attributes;
  if (shape.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {unsigned(shape.cluster), 1, 1};
  }
  if (shape.together) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  error = cudaLaunchKernelEx(&config, kernel, args);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // it is reported here and must not surface in somebody else's check
  return cudaGetErrorString(error);
}

inline const char* fill_zero(void* memory, size_t bytes, void* stream) {
  const cudaError_t error = cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(stream));
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // as in launch()
  return cudaGetErrorString(error);
}

// Makes a device current, and the one that was so again.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    if (cudaGetDevice(&before_) != cudaSuccess) before_ = device;
    if (before_ != device) cudaSetDevice(device);
    changed_ = before_ != device;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

}  // namespace fastseq::FASTSEQ_ISA
