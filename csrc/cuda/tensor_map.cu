#include <cuda.h>  // types alone: libcuda is not linked, for a machine without a GPU has none
#include <cuda_runtime.h>

#include "tensor_map.h"

namespace fastseq::FASTSEQ_ISA {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// Null where there is no driver, or one older than CUDA 12.0.
Encode find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t error =
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess) cudaGetLastError();
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) return nullptr;
  return reinterpret_cast<Encode>(function);
}

}  // namespace

const char* make_tensor_map(TensorMap& map, const TiledTensor& t) {
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap), "the driver fills all of it");
  static thread_local std::string error;
  error = unfit(t);
  if (!error.empty()) return error.c_str();
  static const Encode encode = find_encode();
  if (!encode) return "the CUDA driver has no cuTensorMapEncodeTiled\naccepted is one of CUDA 12.0 or later";
  cuuint64_t size[5], stride[4];
  cuuint32_t box[5], step[5];
  for (int i = 0; i < t.rank; ++i) {
    size[i] = cuuint64_t(t.size[i]), box[i] = cuuint32_t(t.box[i]), step[i] = 1;
    if (i > 0) stride[i - 1] = t.size[i] > 1 ? cuuint64_t(t.stride[i]) : 16;
  }
  const CUresult result = encode(reinterpret_cast<CUtensorMap*>(&map), CU_TENSOR_MAP_DATA_TYPE_UINT16,
                                 cuuint32_t(t.rank), const_cast<void*>(t.base), size, stride, box, step,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return nullptr;
  error = "cuTensorMapEncodeTiled returned " + std::to_string(int(result));
  return error.c_str();
}

}  // namespace fastseq::FASTSEQ_ISA
