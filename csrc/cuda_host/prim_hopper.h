// What a kernel that is written for sm_90a needs beside prim.h, on the CPU: the names and meanings of
// csrc/cuda/prim_hopper.h, and the checks that a GPU does not make.
//
// What the twin sees beyond wrong numbers:
//   barriers    used before they have begun or been announced, more arrivals than are counted, more bytes than are
//               expected; waits for a phase that is never complete, or that has gone by; a block that exits in the
//               middle of a phase, or while a load is under way
//   tiles       are 0xFF from load_tile() to the end of the phase; all loads of a phase come at once, at the last
//               moment or the first; so are tensors in global memory read and written
//   products    accumulators are NaN from wgmma() to a wgmma_wait() that covers and names them, and must not have been
//               written meanwhile; operands in shared memory are decoded from the descriptor, and read, for each warp,
//               when it issues the product or when the first warp of the warpgroup waits for it. That wait is over when
//               all four have issued it, as they have to in the same order; otherwise they do not wait for each other.
//   fences      There is a second picture of the block's shared memory: what asynchronous reads see. fence_async()
//               brings it up to date with everything that the block has stored, not only the calling thread; so a fence
//               that is missing altogether is seen, one that a single thread leaves out may not be. Where the two
//               pictures differ, words are read as 0xFF: stored and not fenced, or stored while being read.
// What it does not see: registers of a, or d read through another name, that change between wgmma() and its wait (the
// compiler ptxas serialises such products, and says so); a named barrier at which threads have arrived and nobody comes
// to wait; bank conflicts; what anything costs.
#pragma once

#include <prim.h>

#include <cstdint>

namespace fastseq::FASTSEQ_ISA {
// Of the block's own shared memory, which begins at 1024 as on a GPU.
uint32_t shared_address(const void* p);
}  // namespace fastseq::FASTSEQ_ISA

#include "../cuda/portable_hopper.h"

namespace fastseq::FASTSEQ_ISA {

// ---- who am I ----

FS_DEVICE unsigned char* tile_memory() { return who->shared; }
// Lane 0 or lane 31, as the schedule wants it.
bool one_lane();

// ---- barriers that count arrivals and bytes ----

struct PhaseBarrier {
  uint64_t word;
};
void barrier_begin(PhaseBarrier* own, int arrivals);
void barriers_begun();
void barrier_arrive(PhaseBarrier* own);
void barrier_expect(PhaseBarrier* own, int bytes);
void barrier_wait(PhaseBarrier* own, int parity);

// ---- barriers of some of the block's warps ----

void named_sync(int number, int threads);
void named_arrive(int number, int threads);

// ---- registers ----

void registers_become(int count, bool more);
template <int kCount>
FS_DEVICE void registers_give() {
  static_assert(kCount >= 24 && kCount <= 256 && kCount % 8 == 0, "what setmaxnreg takes");
  registers_become(kCount, false);
}
template <int kCount>
FS_DEVICE void registers_take() {
  static_assert(kCount >= 24 && kCount <= 256 && kCount % 8 == 0, "what setmaxnreg takes");
  registers_become(kCount, true);
}

// ---- tiles ----

void fence_async();

struct alignas(128) TensorMap {
  unsigned char* base;
  int64_t size[5], stride[4];  // stride of the outer dimensions, in bytes
  int box[5];
  int rank;
};
static_assert(sizeof(TensorMap) == 128, "as on a GPU");
FS_DEVICE void prefetch(const TensorMap&) {}

void load_tile_at(void* to, const TensorMap& map, PhaseBarrier* full, const int* at, int rank);
template <Keep kKeep = Keep::normal, int kRank>
FS_DEVICE void load_tile(void* to, const TensorMap& map, PhaseBarrier* full, const int (&at)[kRank]) {
  static_assert(kRank >= 2 && kRank <= 5, "dimensions of a tensor map");
  load_tile_at(to, map, full, at, kRank);
}

void load_bytes(void* to, const void* from, int bytes, PhaseBarrier* full);

void store_tile_at(const TensorMap& map, const void* from, const int* at, int rank);
template <int kRank>
FS_DEVICE void store_tile(const TensorMap& map, const void* from, const int (&at)[kRank]) {
  static_assert(kRank >= 2 && kRank <= 5, "dimensions of a tensor map");
  store_tile_at(map, from, at, kRank);
}
void reduce_add(float* to, const float* from, int bytes);
void stores_commit();
void stores_wait_for(int pending, bool written);
template <int kPending>
FS_DEVICE void stores_wait_read() {
  stores_wait_for(kPending, false);
}
template <int kPending>
FS_DEVICE void stores_wait() {
  stores_wait_for(kPending, true);
}

FS_DEVICE void add_in_any_order(float* p, const Two<float>& x) {
  check_alignment(p, sizeof(x), "add_in_any_order");
  add_in_any_order(p, x.value[0]), add_in_any_order(p + 1, x.value[1]);
}

// ---- products ----

// What a warp hands in; all of its lanes the same, but for the registers.
struct WgmmaCall {
  int n;
  bool is_bfloat16, add, a_in_registers;
  Major major_a, major_b;
  uint64_t a, b;  // descriptors
};
void wgmma_issue(const WgmmaCall& call, float* d, const uint32_t* a);

// The sums are made in float, one product after the other.
template <class T, int kN, Major kA, Major kB>
FS_DEVICE void wgmma(float (&d)[kN / 2], uint64_t a, uint64_t b, bool add) {
  static_assert(kN % 8 == 0 && kN >= 8 && kN <= 256, "what the instruction takes");
  wgmma_issue({kN, std::is_same_v<T, bfloat16>, add, false, kA, kB, a, b}, d, nullptr);
}
template <class T, int kN, Major kB>
FS_DEVICE void wgmma(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b, bool add) {
  static_assert(kN % 8 == 0 && kN >= 8 && kN <= 256, "what the instruction takes");
  wgmma_issue({kN, std::is_same_v<T, bfloat16>, add, true, Major::k, kB, 0, b}, d, a);
}

void wgmma_fence_all();
template <class... Arrays>
FS_DEVICE void wgmma_fence(Arrays&...) {
  wgmma_fence_all();
}
void wgmma_commit();
void wgmma_wait_for(int pending);
void wgmma_use(float* d, int count);  // after the wait
template <size_t kCount>
FS_DEVICE void wgmma_name(float (&d)[kCount]) {
  wgmma_use(d, int(kCount));
}
template <size_t kCount>
FS_DEVICE void wgmma_name(uint32_t (&)[kCount]) {}
template <class T, size_t kRows, size_t kCount>
FS_DEVICE void wgmma_name(T (&arrays)[kRows][kCount]) {
  for (T(&array)[kCount] : arrays) wgmma_name(array);
}
template <int kPending, class... Arrays>
FS_DEVICE void wgmma_wait(Arrays&... arrays) {
  wgmma_wait_for(kPending);
  (wgmma_name(arrays), ...);
}

}  // namespace fastseq::FASTSEQ_ISA
