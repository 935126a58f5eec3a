// What kernels with a fault in their use of prim_hopper.h have in common.
#pragma once

#include <launch.h>
#include <prim_hopper.h>

#include <vector>

namespace fastseq::FASTSEQ_ISA {

struct HopperFaultArgs {
  TensorMap map;   // of data, a tile at a time
  float* out;      // [kThreads]
  bfloat16* data;  // [kTiles][kRows][64], small integers
  float* sums;     // [kThreads]
};

struct HopperFault {
  using Args = HopperFaultArgs;
  static constexpr int kRows = 64, kTiles = 4, kTileBytes = kRows * kTileRowBytes;
  static constexpr int kThreads = 2 * kWarpgroup;
  static unsigned char* tile(int i) { return tile_memory() + i * kTileBytes; }
  static PhaseBarrier* barrier(int i) { return reinterpret_cast<PhaseBarrier*>(tile(3)) + i; }
  static bool first() { return thread_index() == 0; }
  static void put(const Args& args, float value) { args.out[thread_index()] = value; }
  static void begin(int i, int arrivals) {
    if (first()) {
      barrier_begin(barrier(i), arrivals);
      barriers_begun();
    }
    sync_block();
  }
  static void load(const Args& args, int to, int from, int of_barrier, int bytes = kTileBytes) {
    barrier_expect(barrier(of_barrier), bytes);
    load_tile(tile(to), args.map, barrier(of_barrier), {0, from * kRows});
  }
  // All threads get the same tile.
  static void load_and_wait(const Args& args, int to, int from, int of_barrier) {
    begin(of_barrier, 1);
    if (first()) load(args, to, from, of_barrier);
    barrier_wait(barrier(of_barrier), 0);
  }
  static float element(int i, int row, int column) {
    return widen(*reinterpret_cast<const bfloat16*>(tile(i) + tile_offset(row, column)));
  }
  static float sum_of(const float (&d)[32]) {
    float sum = 0;
    for (int i = 0; i < 32; ++i) sum = sum * 1.5f + d[i];
    return sum;
  }
  using Type = bfloat16;
  // d = tile a times tile b, the first 16 columns of both, plus d if `add`.
  static void multiply(float (&d)[32], int a, int b, bool add) {
    wgmma<Type, 64, Major::k, Major::k>(d, operand_of_tiles<Major::k>(tile(a), kRows),
                                        operand_of_tiles<Major::k>(tile(b), kRows), add);
  }
};

struct HopperFaultEntry {
  const char* name;
  const char* (*start)(LaunchShape, const HopperFaultArgs&, bool faulty);
};

template <template <bool> class Kernel>
const char* start_hopper_fault(LaunchShape shape, const HopperFaultArgs& args, bool faulty) {
  shape.threads = Kernel<false>::kThreads;
  return faulty ? launch<Kernel<true>>(shape, args) : launch<Kernel<false>>(shape, args);
}

template <template <bool> class Kernel>
constexpr HopperFaultEntry hopper_fault(const char* name) {
  return {name, start_hopper_fault<Kernel>};
}

// Of hopper_faults.cpp and hopper_product_faults.cpp.
std::vector<HopperFaultEntry> hopper_faults();
std::vector<HopperFaultEntry> hopper_product_faults();

}  // namespace fastseq::FASTSEQ_ISA
