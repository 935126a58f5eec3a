// Tensor maps, which tell the GPU's tensor memory accelerator what a tile is. Host code, for both engines: csrc/cuda
// asks the driver to encode them, csrc/cuda_host keeps them as they are.
#pragma once

#include <prim_hopper.h>

#include <cstdint>
#include <string>

namespace fastseq::FASTSEQ_ISA {

// Elements (x0, x1, ...) lie at base + 2 x0 + stride[1] x1 + ...; a tile is a box of them. Any order of strides; that
// of a dimension of size 1 is not looked at.
struct TiledTensor {
  const void* base;
  int rank;           // 2 to 5
  int64_t size[5];    // elements, the innermost dimension first
  int64_t stride[5];  // bytes; stride[0] is 2
  int box[5];         // box[0] is 64
};

// What the driver would refuse, saying only that a value is invalid, and what load_tile() does not take; empty if
// nothing. From the CUDA driver API, cuTensorMapEncodeTiled.
inline std::string unfit(const TiledTensor& t) {
  const auto text = [](const std::string& name, int64_t given, const char* accepted) {
    return name + " is " + std::to_string(given) + "\naccepted is " + accepted;
  };
  if (t.rank < 2 || t.rank > 5) return text("rank", t.rank, "2 to 5");
  if (!t.base || reinterpret_cast<uintptr_t>(t.base) % 16 != 0) {
    return text("base", int64_t(reinterpret_cast<uintptr_t>(t.base)), "an address that is a multiple of 16");
  }
  if (t.stride[0] != 2) return text("stride[0]", t.stride[0], "2: elements of 16 bits side by side");
  if (t.box[0] != kTileColumns) return text("box[0]", t.box[0], "64: rows of the 128 bytes of the swizzle");
  for (int i = 0; i < t.rank; ++i) {
    const std::string index = "[" + std::to_string(i) + "]";
    if (t.size[i] < 1 || t.size[i] > int64_t(1) << 32) return text("size" + index, t.size[i], "1 to 2^32");
    if (t.box[i] < 1 || t.box[i] > 256) return text("box" + index, t.box[i], "1 to 256");
    if (i > 0 && t.size[i] > 1 && (t.stride[i] < 16 || t.stride[i] % 16 != 0 || t.stride[i] >> 40 != 0)) {
      return text("stride" + index, t.stride[i], "a multiple of 16 from 16 to below 2^40");
    }
  }
  return "";
}

// Null, or what is wrong, which is the thread's until its next call. Only numbers are encoded, so that it can be called
// while a CUDA graph is captured, and costs less than a microsecond.
const char* make_tensor_map(TensorMap& map, const TiledTensor& tensor);

}  // namespace fastseq::FASTSEQ_ISA
