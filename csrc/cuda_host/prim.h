// What a kernel needs of the GPU, on the CPU: the names and meanings of csrc/cuda/prim.h, and the checks that a GPU
// does not make. machine.h tells how the threads run.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../cpu/half.h"  // bfloat16, float16, widen, narrow

#define FS_DEVICE inline
#define FS_DEVICE_CALL inline
#define FS_UNROLL
#define FS_NO_UNROLL

#include "../cuda/portable.h"

namespace fastseq::FASTSEQ_ISA {

// ---- who am I ----

// The thread that runs. Before the other names of this file are used, launch() has to have started one.
struct Who {
  int thread, threads, block, blocks;
  unsigned char* shared;
};
extern Who* who;

FS_DEVICE int thread_index() { return who->thread; }
FS_DEVICE int thread_count() { return who->threads; }
FS_DEVICE int block_index() { return who->block; }
FS_DEVICE int block_count() { return who->blocks; }

template <class T>
FS_DEVICE T as_new(T x) {
  return x;
}

// Bytes 0xFF, NaN in every type, until it is written.
FS_DEVICE unsigned char* shared_memory() { return who->shared; }

// ---- meeting ----

void sync_block();
void sync_warp();

bool any_in_block(bool x);
bool any_in_warp(bool x);

// Each arrive needs its wait, also before a thread exits.
void cluster_arrive();
void cluster_wait();

void* cluster_map_address(void* shared, int rank);
template <class T>
FS_DEVICE T* cluster_map(T* shared, int rank) {
  return static_cast<T*>(cluster_map_address(const_cast<std::remove_cv_t<T>*>(shared), rank));
}

struct Arrivals {
  uint64_t word;
};
void arrivals_begin(Arrivals* own);
void arrivals_expect(Arrivals* own, int bytes);
void arrivals_wait(Arrivals* own, int phase);
void send_bytes(void* to, const void* value, int bytes, Arrivals* arrivals, int rank);
template <class T>
FS_DEVICE void send(T* to, T value, Arrivals* arrivals, int rank) {
  static_assert(sizeof(T) == 8 || sizeof(T) == 16, "what one instruction sends");
  send_bytes(to, &value, sizeof(T), arrivals, rank);
}

void set_flag(int* flag, int value);
void wait_flag(const int* flag, int value);

// ---- memory ----

// The 16 bytes are 0xFF from here to the copy_async_wait() that covers them.
void copy_async_or_zero(void* shared, const void* global, int bytes);
FS_DEVICE void copy_async(void* shared, const void* global) { copy_async_or_zero(shared, global, 16); }
void copy_async_commit();
void copy_async_wait_for(int pending);
template <int kPending>
FS_DEVICE void copy_async_wait() {
  copy_async_wait_for(kPending);
}

void check_alignment(const void* p, size_t bytes, const char* function);
template <class T>
FS_DEVICE T load_once(const T* p) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8, "what one instruction loads");
  check_alignment(p, sizeof(T), "load_once");
  return *p;
}
template <class T>
FS_DEVICE void store_once(T* p, T value) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8, "what one instruction stores");
  check_alignment(p, sizeof(T), "store_once");
  *p = value;
}
template <class T>
FS_DEVICE void add_in_any_order(T* p, T x) {
  check_alignment(p, sizeof(T), "add_in_any_order");
  *p += x;
}
FS_DEVICE Vector16 load_constant(const Vector16* p) {
  check_alignment(p, 16, "load_constant");
  return *p;
}

// ---- warps ----

uint64_t shuffle_xor_word(uint64_t word, int mask);
template <class T>
FS_DEVICE T shuffle_xor(T value, int mask) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "what the instruction exchanges");
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  word = shuffle_xor_word(word, mask);
  std::memcpy(&value, &word, sizeof(T));
  return value;
}

void load_matrices(uint32_t (&r)[4], const void* row);
void load_matrices_transposed(uint32_t (&r)[4], const void* row);

// The sum of products and d is rounded once, towards zero, as on a GPU. The variant of float does not look at the 13
// lowest bits of its operands.
void mma(float (&d)[4], const Vector16& a, uint32_t b0, uint32_t b1, bfloat16);
void mma(float (&d)[4], const Vector16& a, uint32_t b0, uint32_t b1, float16);
void mma(float (&d)[4], const Vector16& a, uint32_t b0, uint32_t b1, float);
void mma(double (&d)[4], const double (&a)[4], double b0, double b1);

// ---- numbers ----

template <class T>
FS_DEVICE uint32_t pack(float low, float high, T) {
  T narrowed[2];
  narrow(low, narrowed[0]), narrow(high, narrowed[1]);
  return uint32_t(narrowed[1].bits) << 16 | narrowed[0].bits;
}

// The nearest number of 10 bits, of two the one away from zero.
FS_DEVICE float round_to_tf32(float x) {
  const uint32_t bits = bits_of(x);
  if (x != x) return float_of(bits | 0x400000);  // a payload of low bits alone would be cut off, leaving Inf
  if ((bits & 0x7f800000) == 0x7f800000) return x;
  return float_of((bits + 0x1000) & ~uint32_t(0x1fff));
}

FS_DEVICE float fma(float a, float b, float c) { return std::fma(a, b, c); }
FS_DEVICE double fma(double a, double b, double c) { return std::fma(a, b, c); }

FS_DEVICE float max(float a, float b) { return std::fmax(a, b); }
FS_DEVICE double max(double a, double b) { return std::fmax(a, b); }

FS_DEVICE float exp2(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0 : y;  // NaN stays
}
FS_DEVICE double exp(double x) { return std::exp(x); }
FS_DEVICE float log(float x) { return std::log(x); }
FS_DEVICE double log(double x) { return std::log(x); }

FS_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }
FS_DEVICE double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }
FS_DEVICE float tanh(float x) { return std::tanh(x); }
FS_DEVICE double tanh(double x) { return std::tanh(x); }

}  // namespace fastseq::FASTSEQ_ISA
