// What the two prim.h and launch.h, of the GPU and of its host twin, have in common. Plain C++; prim.h includes it
// after its macros.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastseq::FASTSEQ_ISA {

constexpr int kWarp = 32;

struct alignas(16) Vector16 {
  uint32_t word[4];
};

// Two sums side by side.
template <class T>
struct alignas(2 * sizeof(T)) Two {
  T value[2];
};

struct LaunchShape {
  int64_t blocks;
  int threads;
  size_t shared_bytes = 0;
  int cluster = 1;        // blocks of a cluster; divides `blocks`
  bool together = false;  // all blocks must run at the same time, because they wait for each other
  void* stream = nullptr;
};

template <class T>
FS_DEVICE T relu(T x) {
  return x <= T(0) ? T(0) : x;
}
// dh where h = relu(a) is positive or NaN, else zero.
template <class T>
FS_DEVICE T relu_grad(T h, T dh) {
  return h <= T(0) ? T(0) : dh;
}

}  // namespace fastseq::FASTSEQ_ISA
