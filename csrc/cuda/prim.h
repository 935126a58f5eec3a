// What a kernel needs of the GPU: the only file with PTX and CUDA built-ins. csrc/cuda_host/prim.h implements the
// same names on the CPU, so that every kernel also runs, and is checked, where there is no GPU. Kernels include
// <prim.h>; the include path says which one they get.
//
// A kernel is a struct with
//   struct Args              plain data, at most 4 KB
//   kThreads                 the most threads that a block of it may have
//   static FS_DEVICE void run(const Args&)
// and is started by launch<Kernel>() of <launch.h>. Blocks and threads are numbered in one dimension.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#define FS_DEVICE __device__ __forceinline__
#define FS_DEVICE_CALL __device__ __noinline__
#define FS_UNROLL _Pragma("unroll")
#define FS_NO_UNROLL _Pragma("unroll 1")

#include "portable.h"

namespace fastseq::FASTSEQ_ISA {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};
// ---- who am I ----

FS_DEVICE int thread_index() { return threadIdx.x; }
FS_DEVICE int thread_count() { return blockDim.x; }
FS_DEVICE int block_index() { return blockIdx.x; }
FS_DEVICE int block_count() { return gridDim.x; }

// The block's dynamic shared memory, 128-byte aligned; holds anything until it is written.
FS_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

// x, of which the compiler knows nothing: what is made of it is made here, and not kept since an earlier time.
FS_DEVICE uint32_t as_new(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}
FS_DEVICE float as_new(float x) {
  asm volatile("" : "+f"(x));
  return x;
}
FS_DEVICE double as_new(double x) {
  asm volatile("" : "+d"(x));
  return x;
}

// ---- meeting ----

FS_DEVICE void sync_block() { __syncthreads(); }  // all threads of the block
FS_DEVICE void sync_warp() { __syncwarp(); }

// Whether it is so for any thread; they meet as at sync_block() and sync_warp().
FS_DEVICE bool any_in_block(bool x) { return __syncthreads_or(x); }
FS_DEVICE bool any_in_warp(bool x) { return __any_sync(0xffffffffu, x); }

// All threads of all blocks of a cluster: what was written before arriving, to any block's shared memory or to
// global memory, is seen after waiting. Between the two a thread may do other work.
FS_DEVICE void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}
FS_DEVICE void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// The same place in the shared memory of block `rank` of the cluster, to be written and read as any memory.
template <class T>
FS_DEVICE T* cluster_map(T* shared, int rank) {
#if __CUDA_ARCH__ >= 900
  uint64_t mapped;
  asm("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(reinterpret_cast<uint64_t>(shared)), "r"(rank));
  return reinterpret_cast<T*>(mapped);
#else
  return shared;
#endif
}

// Messages: 8 or 16 bytes into the shared memory of another block of the cluster, which waits until as many bytes as
// it expects have arrived, and then has them all. Nobody waits for anybody else, and no store to global memory is
// waited for, as a cluster barrier would. Phases of one Arrivals are 0, 1, 0, ...
struct Arrivals {
  uint64_t word;
};
// One thread, before a cluster barrier.
FS_DEVICE void arrivals_begin(Arrivals* own) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(uint32_t(__cvta_generic_to_shared(own)))
               : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
// One thread, once a phase; messages may have come before.
FS_DEVICE void arrivals_expect(Arrivals* own, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(uint32_t(__cvta_generic_to_shared(own))),
      "r"(bytes)
      : "memory");
#endif
}
// All threads that read what arrives. The bytes of messages are counted with release semantics at cluster scope (PTX
// ISA, st.async). Who has seen the phase end acquires that by a fence, for shared memory alone: no block reads global
// memory that another one of its cluster writes, and to acquire all memory is to empty the first-level cache
// (CCTL.IVALL) in each exchange. So the PTX ISA has it under fence, "acquire local shared memory".
FS_DEVICE void arrivals_wait(Arrivals* own, int phase) {
#if __CUDA_ARCH__ >= 900
#if __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1208  // PTX 8.6
#define FS_TRY_WAIT "mbarrier.try_wait.parity.relaxed.cluster.shared::cta.b64"
#define FS_ACQUIRE "fence.acquire.sync_restrict::shared::cluster.cluster;"
#else
#define FS_TRY_WAIT "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64"
#define FS_ACQUIRE ""
#endif
  uint32_t done;
  do {
    asm volatile("{\n.reg .pred p;\n" FS_TRY_WAIT
                 " p, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(uint32_t(__cvta_generic_to_shared(own))), "r"(phase)
                 : "memory");
  } while (!done);
  asm volatile(FS_ACQUIRE ::: "memory");
#undef FS_TRY_WAIT
#undef FS_ACQUIRE
  __syncwarp();  // lanes may have seen it at different turns
#endif
}
// To the place in block `rank` that is `to` in this block, counted by its Arrivals that is `arrivals` in this one.
template <class T>
FS_DEVICE void send(T* to, T value, Arrivals* arrivals, int rank) {
  static_assert(sizeof(T) == 8 || sizeof(T) == 16, "what one instruction sends");
#if __CUDA_ARCH__ >= 900
  uint32_t remote_to, remote_arrivals;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(remote_to)
      : "r"(uint32_t(__cvta_generic_to_shared(to))), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(remote_arrivals)
      : "r"(uint32_t(__cvta_generic_to_shared(arrivals))), "r"(rank));
  uint32_t word[4];
  memcpy(word, &value, sizeof(T));
  if constexpr (sizeof(T) == 16) {
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::
            "r"(remote_to),
        "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3]), "r"(remote_arrivals)
        : "memory");
  } else {
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(
            remote_to),
        "r"(word[0]), "r"(word[1]), "r"(remote_arrivals)
        : "memory");
  }
#endif
}

// A flag in global memory: who sees the value set sees all that the block wrote before its sync_block() that came
// before set_flag(). One thread sets it; the threads that wait_flag() share it with theirs by sync_block().
FS_DEVICE void set_flag(int* flag, int value) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}
// Until it is at least `value`. To acquire empties the first-level cache (CCTL.IVALL): once, when the value has been
// seen, and by a load, for a fence would be a MEMBAR before sm_90 and wait for the thread's own stores.
FS_DEVICE void wait_flag(const int* flag, int value) {
  int seen;
  do {
    asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(flag) : "memory");
  } while (seen < value);
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(flag) : "memory");
}

// ---- memory ----

// 16 bytes from global to shared memory, not through the first-level cache; there after copy_async_wait<n>(),
// which leaves the n latest committed groups of the thread under way, and for other threads after a barrier too.
FS_DEVICE void copy_async(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(uint32_t(__cvta_generic_to_shared(shared))),
               "l"(global)
               : "memory");
}
// The same of the first `bytes` of 16, and zeros after them; where there are none, nothing is read.
FS_DEVICE void copy_async_or_zero(void* shared, const void* global, int bytes) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(uint32_t(__cvta_generic_to_shared(shared))),
      "l"(global), "r"(bytes)
      : "memory");
}
FS_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
FS_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// A value that is read once, or written once: it is not to push others out of the caches.
template <class T>
FS_DEVICE T load_once(const T* p) {
  T value;
  if constexpr (sizeof(T) == 2) {
    const unsigned short word = __ldcs(reinterpret_cast<const unsigned short*>(p));
    memcpy(&value, &word, 2);
  } else if constexpr (sizeof(T) == 4) {
    const unsigned word = __ldcs(reinterpret_cast<const unsigned*>(p));
    memcpy(&value, &word, 4);
  } else {
    const unsigned long long word = __ldcs(reinterpret_cast<const unsigned long long*>(p));
    memcpy(&value, &word, 8);
  }
  return value;
}
template <class T>
FS_DEVICE void store_once(T* p, T value) {
  if constexpr (sizeof(T) == 2) {
    unsigned short word;
    memcpy(&word, &value, 2);
    __stcs(reinterpret_cast<unsigned short*>(p), word);
  } else if constexpr (sizeof(T) == 4) {
    unsigned word;
    memcpy(&word, &value, 4);
    __stcs(reinterpret_cast<unsigned*>(p), word);
  } else {
    unsigned long long word;
    memcpy(&word, &value, 8);
    __stcs(reinterpret_cast<unsigned long long*>(p), word);
  }
}

// += in global memory, by whoever comes first.
FS_DEVICE void add_in_any_order(float* p, float x) { atomicAdd(p, x); }
FS_DEVICE void add_in_any_order(double* p, double x) { atomicAdd(p, x); }

// 16 bytes of global memory that no kernel writes meanwhile, kept out of the first-level cache.
FS_DEVICE Vector16 load_constant(const Vector16* p) {
  Vector16 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "l"(p));
  return v;
}

// ---- warps ----

template <class T>
FS_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// Four 8 x 8 matrices of 16-bit elements, or 8 x 4 of 32-bit ones: lane l hands in the 16-byte row l % 8 of matrix
// l / 8, in shared memory, and gets of matrix i the word l % 4 of row l / 4 as r[i].
FS_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(uint32_t(__cvta_generic_to_shared(row)))
               : "memory");
}

// The same four matrices of 16-bit elements, each transposed: lane l gets of matrix i the elements of column l / 4 in
// its rows 2 (l % 4) and 2 (l % 4) + 1.
FS_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(uint32_t(__cvta_generic_to_shared(row)))
               : "memory");
}

// d[16 x 8] += a[16 x k] b[k x 8], k 16 (bfloat16, float16) or 8 (float, rounded to tf32 before).
//   a.word[i]  row l / 4 + 8 (i % 2), word l % 4 + 4 (i / 2) of the row
//   b[i]       word l % 4 + 4 i of column l / 4
//   d[i]       row l / 4 + 8 (i / 2), column 2 (l % 4) + i % 2
// for lane l; a word is two 16-bit elements or one 32-bit element, along k.
FS_DEVICE void mma(float (&d)[4], const Vector16& a, uint32_t b0, uint32_t b1, bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "r"(b0), "r"(b1));
}
FS_DEVICE void mma(float (&d)[4], const Vector16& a, uint32_t b0, uint32_t b1, float16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "r"(b0), "r"(b1));
}
FS_DEVICE void mma(float (&d)[4], const Vector16& a, uint32_t b0, uint32_t b1, float) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "r"(b0), "r"(b1));
}
// The same of doubles, k 8: a[i] row l / 4 + 8 (i % 2), k l % 4 + 4 (i / 2); b as above.
FS_DEVICE void mma(double (&d)[4], const double (&a)[4], double b0, double b1) {
  FS_UNROLL
  for (int i = 0; i < 2; ++i) {
    asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
        : "+d"(d[2 * i]), "+d"(d[2 * i + 1])
        : "d"(a[i]), "d"(b0));
    asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
        : "+d"(d[2 * i]), "+d"(d[2 * i + 1])
        : "d"(a[2 + i]), "d"(b1));
  }
}

// ---- numbers ----

FS_DEVICE float widen(float x) { return x; }
FS_DEVICE double widen(double x) { return x; }
FS_DEVICE float widen(bfloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
FS_DEVICE float widen(float16 x) { return __half2float(__ushort_as_half(x.bits)); }
FS_DEVICE void narrow(float x, float& y) { y = x; }
FS_DEVICE void narrow(double x, double& y) { y = x; }
FS_DEVICE void narrow(float x, bfloat16& y) { y.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
FS_DEVICE void narrow(float x, float16& y) { y.bits = __half_as_ushort(__float2half_rn(x)); }
// Two numbers rounded to 16 bits, the first in the lower half of the word.
FS_DEVICE uint32_t pack(float low, float high, bfloat16) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
FS_DEVICE uint32_t pack(float low, float high, float16) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
FS_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
FS_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }
// To the nearest number of 10 bits, which is what the tensor cores read of a float.
FS_DEVICE float round_to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return __uint_as_float(bits);
}

FS_DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
FS_DEVICE double fma(double a, double b, double c) { return __fma_rn(a, b, c); }

// The larger number, and that which is one where the other is NaN.
FS_DEVICE float max(float a, float b) { return fmaxf(a, b); }
FS_DEVICE double max(double a, double b) { return ::fmax(a, b); }

// Two units in the last place, and zero for what would be subnormal.
FS_DEVICE float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FS_DEVICE double exp(double x) { return ::exp(x); }

// A few units in the last place; NaN stays NaN.
FS_DEVICE float log(float x) { return logf(x); }
FS_DEVICE double log(double x) { return ::log(x); }
FS_DEVICE float sigmoid(float x) { return __fdividef(1.0f, 1.0f + expf(-x)); }
FS_DEVICE double sigmoid(double x) { return 1.0 / (1.0 + ::exp(-x)); }
FS_DEVICE float tanh(float x) { return tanhf(x); }
FS_DEVICE double tanh(double x) { return ::tanh(x); }

}  // namespace fastseq::FASTSEQ_ISA
