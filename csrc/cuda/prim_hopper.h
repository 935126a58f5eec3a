// What a kernel that is written for sm_90a needs of the GPU beside prim.h: barriers that count bytes, tiles that the
// tensor memory accelerator (TMA) moves, products that a warpgroup issues and waits for later, registers that move
// from one warpgroup to another. Sources that include <prim_hopper.h> are compiled for sm_90a alone
// (cuda_cluster_sources in cuda.cmake). csrc/cuda_host/prim_hopper.h implements the same names on the CPU.
//
// There are two ways to memory. Ordinary loads and stores take the generic one; load_tile, load_bytes, store_tile,
// reduce_add and wgmma take the asynchronous one. What the threads have stored to shared memory is seen by the second
// only after fence_async(), of each thread that has stored, and then a barrier. The other way round, to have waited is
// enough.
#pragma once

#include <prim.h>

#include <type_traits>

namespace fastseq::FASTSEQ_ISA {
FS_DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }
}  // namespace fastseq::FASTSEQ_ISA

#include "portable_hopper.h"
#include "wgmma.h"

namespace fastseq::FASTSEQ_ISA {

// ---- who am I ----

// The block's dynamic shared memory, for tiles: what shared_memory() gives, 1024-byte aligned. A kernel uses one of
// the two.
FS_DEVICE unsigned char* tile_memory() {
  extern __shared__ __align__(1024) unsigned char tiles[];
  return tiles;
}

// True in one lane of the warp, always the same; all lanes call it. A branch on this, unlike one on the lane's number,
// is known by the compiler to have one thread inside.
FS_DEVICE bool one_lane() {
  uint32_t chosen;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}"
               : "=r"(chosen)::"memory");
  return chosen;
}

// ---- barriers that count arrivals and bytes ----

// 8 bytes of shared memory. Phases are 0, 1, 2, ...; one is complete when all its arrivals have come, and as many bytes
// as its arrivals expect; then the next one begins by itself. Which phase a thread waits for is told by its parity:
// a wait for parity 1 returns at once while phase 0 goes on, as if a phase before it had been complete. So a stage's
// "full" barrier is waited for with 0, 1, 0, ... by those who read, and its "empty" one with 1, 0, 1, ... by the one
// who fills it. Arrivals and waits order memory as release and acquire do, within the block.
struct PhaseBarrier {
  uint64_t word;
};
// One thread; then barriers_begun() by the same thread, then sync_block().
FS_DEVICE void barrier_begin(PhaseBarrier* own, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(own)), "r"(arrivals)
               : "memory");
}
FS_DEVICE void fence_async();
FS_DEVICE void barriers_begun() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  fence_async();
}
FS_DEVICE void barrier_arrive(PhaseBarrier* own) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(own)) : "memory");
}
// Arrives, and expects bytes in this phase; before the loads that bring them. At most 2^20 - 1 in a phase.
FS_DEVICE void barrier_expect(PhaseBarrier* own, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(own)), "r"(bytes)
               : "memory");
}
FS_DEVICE void barrier_wait(PhaseBarrier* own, int parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(shared_address(own)), "r"(parity)
        : "memory");
  } while (!done);
}

// ---- barriers of some of the block's warps ----

// Number 1 to 15, for `threads` threads of whole warps, those that sync and those that only arrive.
FS_DEVICE void named_sync(int number, int threads) {
  asm volatile("barrier.cta.sync.aligned %0, %1;" ::"r"(number), "r"(threads) : "memory");
}
FS_DEVICE void named_arrive(int number, int threads) {
  asm volatile("barrier.cta.arrive.aligned %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// ---- registers ----

// By all warps of a warpgroup: gives up all registers but kCount a thread, or waits until it can have so many; a
// multiple of 8 from 24 to 256. The kernel needs kThreads that are those of its launch.
template <int kCount>
FS_DEVICE void registers_give() {
  static_assert(kCount >= 24 && kCount <= 256 && kCount % 8 == 0, "what setmaxnreg takes");
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
FS_DEVICE void registers_take() {
  static_assert(kCount >= 24 && kCount <= 256 && kCount % 8 == 0, "what setmaxnreg takes");
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// ---- tiles ----

// Shared memory that this thread has stored to may be read by load_tile's kin from here on, see above.
FS_DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A tensor of 2 to 5 dimensions and the box of it that is moved at a time; made by make_tensor_map() of <tensor_map.h>,
// and given to the kernel as a member of its Args, which stay in constant memory.
struct alignas(128) TensorMap {
  uint64_t word[16];
};
// So that the first tile need not wait for the map.
FS_DEVICE void prefetch(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

template <Keep kKeep>
FS_DEVICE uint64_t cache_policy() {
  uint64_t policy;
  if constexpr (kKeep == Keep::first_to_go) {
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  } else if constexpr (kKeep == Keep::last_to_go) {
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  } else {
    asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  }
  return policy;
}

// The box whose first element is `at`, the innermost dimension first, into shared memory, 1024-byte aligned; elements
// outside the tensor become zero. One thread calls it. Box rows * 128 bytes are counted by `full`, those outside too;
// the shared memory is not to be touched from here until its phase is complete.
template <Keep kKeep = Keep::normal, int kRank>
FS_DEVICE void load_tile(void* to, const TensorMap& map, PhaseBarrier* full, const int (&at)[kRank]) {
  static_assert(kRank >= 2 && kRank <= 5, "dimensions of a tensor map");
  const uint32_t shared = shared_address(to), barrier = shared_address(full);
  const uint64_t policy = cache_policy<kKeep>();
  if constexpr (kRank == 2) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%4, %5}], [%2], %3;" ::"r"(shared),
        "l"(&map), "r"(barrier), "l"(policy), "r"(at[0]), "r"(at[1])
        : "memory");
  } else if constexpr (kRank == 3) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%4, %5, %6}], [%2], %3;" ::"r"(shared),
        "l"(&map), "r"(barrier), "l"(policy), "r"(at[0]), "r"(at[1]), "r"(at[2])
        : "memory");
  } else if constexpr (kRank == 4) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%4, %5, %6, %7}], [%2], %3;" ::"r"(shared),
        "l"(&map), "r"(barrier), "l"(policy), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3])
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%4, %5, %6, %7, %8}], [%2], %3;" ::"r"(shared),
        "l"(&map), "r"(barrier), "l"(policy), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4])
        : "memory");
  }
}

// The same for `bytes`, a multiple of 16, that lie one after the other in both memories, at multiples of 16.
FS_DEVICE void load_bytes(void* to, const void* from, int bytes, PhaseBarrier* full) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(full))
      : "memory");
}

// The box from shared memory to the tensor; what lies outside is not written. One thread calls it, after fence_async()
// of those who have stored and a barrier, and it is that thread that commits and waits.
template <int kRank>
FS_DEVICE void store_tile(const TensorMap& map, const void* from, const int (&at)[kRank]) {
  static_assert(kRank >= 2 && kRank <= 5, "dimensions of a tensor map");
  const uint32_t shared = shared_address(from);
  if constexpr (kRank == 2) {
    asm volatile(
        "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map),
        "r"(shared), "r"(at[0]), "r"(at[1])
        : "memory");
  } else if constexpr (kRank == 3) {
    asm volatile(
        "cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
        "r"(shared), "r"(at[0]), "r"(at[1]), "r"(at[2])
        : "memory");
  } else if constexpr (kRank == 4) {
    asm volatile(
        "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(
            &map),
        "r"(shared), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3])
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(
            &map),
        "r"(shared), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4])
        : "memory");
  }
}
// Adds `bytes`, a multiple of 16, of floats to global memory, in an order that is not the same in each run; otherwise
// as store_tile.
FS_DEVICE void reduce_add(float* to, const float* from, int bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to),
               "r"(shared_address(from)), "r"(bytes)
               : "memory");
}
FS_DEVICE void stores_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// All but the kPending latest committed groups of this thread have read their shared memory; before a thread exits, all
// have to.
template <int kPending>
FS_DEVICE void stores_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
// ... and have written: this thread sees it.
template <int kPending>
FS_DEVICE void stores_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// Two neighbours in global memory, at a multiple of 8 bytes, each += by whoever comes first.
FS_DEVICE void add_in_any_order(float* p, const Two<float>& x) {
  asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(p), "f"(x.value[0]), "f"(x.value[1]) : "memory");
}

// ---- products ----

// d[64 x N] = a[64 x 16] b[16 x N], plus what d was if `add`: issued by the four warps of a warpgroup, done later.
// T is bfloat16 or float16, d are floats; kN a multiple of 8 up to 256. portable_hopper.h tells the layouts.
//
//   wgmma_fence(d, ...)   before the first wgmma, and again once registers of d or a have been written or read since
//   wgmma(d, a, b, add)   any number; of one d they follow each other
//   wgmma_commit()        those before it are a group
//   wgmma_wait<n>(d, ...) all but the n latest groups are done: d may be used, shared memory written
//
// Between wgmma and its wait neither d nor the registers of a nor the shared memory of the operands is to be touched.
// The fence and the wait name the arrays of registers (d, or words of a) that they are for, or the compiler may move
// what is done with them to the other side. Arrays have to stay in registers: every index a constant once unrolled.
// A group is one of the whole warpgroup (PTX ISA, wgmma.commit_group): when the wait of one of its warps is over, all
// four have read, and one thread may give the shared memory back.
// The fence comes directly before its products, after waiting for their operands: with a branch between, such as the
// loop of barrier_wait, ptxas adds another and waits for each product by itself (C7520, "wgmma serialized").
template <class T, int kN, Major kA, Major kB>
FS_DEVICE void wgmma(float (&d)[kN / 2], uint64_t a, uint64_t b, bool add) {
  Wgmma<kN>::template issue<T, kA, kB>(d, a, b, add);
}
// Of which a is in registers.
template <class T, int kN, Major kB>
FS_DEVICE void wgmma(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b, bool add) {
  Wgmma<kN>::template issue<T, kB>(d, a, b, add);
}

template <size_t kCount>
FS_DEVICE void pin(float (&registers)[kCount]) {
  FS_UNROLL
  for (size_t i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}
template <size_t kCount>
FS_DEVICE void pin(uint32_t (&registers)[kCount]) {
  FS_UNROLL
  for (size_t i = 0; i < kCount; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}
template <class T, size_t kRows, size_t kCount>
FS_DEVICE void pin(T (&registers)[kRows][kCount]) {
  FS_UNROLL
  for (size_t i = 0; i < kRows; ++i) pin(registers[i]);
}

template <class... Arrays>
FS_DEVICE void wgmma_fence(Arrays&... arrays) {
  (pin(arrays), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
FS_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending, class... Arrays>
FS_DEVICE void wgmma_wait(Arrays&... arrays) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
  (pin(arrays), ...);
}

}  // namespace fastseq::FASTSEQ_ISA
