// Faults in kernels that use prim_hopper.h, as faults.cpp has them of the other primitives.
#include <launch.h>
#include <prim_hopper.h>

#include <stdexcept>
#include <utility>

#include "../cuda/tensor_map.h"
#include "faults.h"

namespace fastseq::FASTSEQ_ISA {
namespace {

constexpr int kRows = 64, kTiles = 4, kTileBytes = kRows * kTileRowBytes, kNumbers = kTiles * kRows * 64;

struct HopperFaultArgs {
  TensorMap map;   // of data, a tile at a time
  float* out;      // [kThreads]
  bfloat16* data;  // [kTiles][kRows][64], small integers
  float* sums;     // [kThreads]
};

struct HopperFault {
  using Args = HopperFaultArgs;
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

// ---- barriers ----

template <bool kFaulty>
struct TileReadBeforeItIsThere : HopperFault {
  static FS_DEVICE void run(const Args& args) {
    begin(0, 1);
    if (first()) load(args, 0, 1, 0);
    if (!kFaulty) barrier_wait(barrier(0), 0);
    put(args, element(0, thread_index() % kRows, thread_index() % 7));
    if (kFaulty) barrier_wait(barrier(0), 0);
  }
};

// The producer does not wait until the stage is free, or the consumers say so before they have read.
template <bool kFaulty, bool kWaits>
void pipeline(const HopperFaultArgs& args) {
  using F = HopperFault;
  if (F::first()) {
    barrier_begin(F::barrier(0), 1);
    barrier_begin(F::barrier(1), kWarpgroup);
    barriers_begun();
  }
  sync_block();
  float sum = 0;
  if (thread_index() < kWarpgroup) {
    for (int i = 0; i < kTiles && F::first(); ++i) {
      if (kWaits || !kFaulty) barrier_wait(F::barrier(1), (i + 1) & 1);
      F::load(args, 0, i, 0);
    }
  } else {
    for (int i = 0; i < kTiles; ++i) {
      barrier_wait(F::barrier(0), i & 1);
      if (kFaulty && kWaits) barrier_arrive(F::barrier(1));
      if (kFaulty && kWaits) sync_warp();
      for (int k = 0; k < 8; ++k) sum = sum * 1.5f + F::element(0, thread_index() % kRows, k);
      if (!kFaulty || !kWaits) barrier_arrive(F::barrier(1));
    }
  }
  F::put(args, sum);
}

template <bool kFaulty>
struct StageReleasedTooEarly : HopperFault {
  static FS_DEVICE void run(const Args& args) { pipeline<kFaulty, true>(args); }
};

template <bool kFaulty>
struct StageFilledWithoutAsking : HopperFault {
  static FS_DEVICE void run(const Args& args) { pipeline<kFaulty, false>(args); }
};

// The first wait of the producer has the parity of the consumers'.
template <bool kFaulty>
struct WrongFirstParity : HopperFault {
  static FS_DEVICE void run(const Args& args) {
    begin(0, 1);
    if (first()) {
      barrier_wait(barrier(0), kFaulty ? 0 : 1);
      load(args, 0, 1, 0);
    }
    barrier_wait(barrier(0), 0);
    put(args, element(0, 1, 1));
  }
};

template <bool kFaulty>
struct TooManyBytesExpected : HopperFault {
  static FS_DEVICE void run(const Args& args) {
    begin(0, 1);
    if (first()) load(args, 0, 1, 0, kTileBytes + (kFaulty ? 128 : 0));
    barrier_wait(barrier(0), 0);
    put(args, element(0, 1, 1));
  }
};

template <bool kFaulty>
struct TooFewBytesExpected : HopperFault {
  static FS_DEVICE void run(const Args& args) {
    begin(0, 1);
    if (first()) load(args, 0, 1, 0, kTileBytes - (kFaulty ? 128 : 0));
    barrier_wait(barrier(0), 0);
    put(args, element(0, 1, 1));
  }
};

// One of the consumers does not arrive.
template <bool kFaulty>
struct ArrivalMissing : HopperFault {
  static FS_DEVICE void run(const Args& args) {
    begin(0, kThreads);
    if (!kFaulty || thread_index() != 37) barrier_arrive(barrier(0));
    barrier_wait(barrier(0), 0);
    put(args, 1);
  }
};

template <bool kFaulty>
struct ArrivalTooMany : HopperFault {
  static FS_DEVICE void run(const Args& args) {
    begin(0, 1);
    if (first()) {
      barrier_expect(barrier(0), kTileBytes);
      if (kFaulty) barrier_arrive(barrier(0));
      load_tile(tile(0), args.map, barrier(0), {0, 0});
    }
    barrier_wait(barrier(0), 0);
    put(args, 1);
  }
};

// What comes too often in one phase begins the next.
template <bool kFaulty>
struct ArrivalLeftOver : HopperFault {
  static FS_DEVICE void run(const Args& args) {
    begin(0, 2);
    if (thread_index() < 2 + kFaulty) barrier_arrive(barrier(0));
    barrier_wait(barrier(0), 0);
    put(args, 1);
  }
};

template <bool kFaulty>
struct BarrierNotBegun : HopperFault {
  static FS_DEVICE void run(const Args& args) {
    begin(0, kThreads);
    barrier_arrive(barrier(kFaulty));
    barrier_wait(barrier(kFaulty), 0);
    put(args, 1);
  }
};

template <bool kFaulty>
struct BarrierNotAnnounced : HopperFault {
  static FS_DEVICE void run(const Args& args) {
    if (first()) {
      barrier_begin(barrier(0), kThreads);
      if (!kFaulty) barriers_begun();
    }
    sync_block();
    barrier_arrive(barrier(0));
    put(args, 1);
  }
};

template <bool kFaulty>
struct LoadLeftUnderWay : HopperFault {
  static FS_DEVICE void run(const Args& args) {
    begin(0, 1);
    if (first()) load(args, 0, 1, 0, kTileBytes + (kFaulty ? kTileBytes : 0));
    if (!kFaulty) barrier_wait(barrier(0), 0);
    put(args, 1);
  }
};

// ---- named barriers ----

template <bool kFaulty>
struct NamedBarrierOfOthers : HopperFault {
  static FS_DEVICE void run(const Args& args) {
    const int group = thread_index() / kWarpgroup;
    named_sync(kFaulty ? 1 + group : 1, kThreads);
    put(args, 1);
  }
};

template <bool kFaulty>
struct NamedBarrierWithoutOneLane : HopperFault {
  static FS_DEVICE void run(const Args& args) {
    if (!kFaulty || thread_index() != 37) named_sync(2, kThreads);
    put(args, 1);
  }
};

template <bool kFaulty>
struct NamedBarrierOfTwoCounts : HopperFault {
  static FS_DEVICE void run(const Args& args) {
    named_sync(3, kFaulty && thread_index() < kWarp ? kThreads - kWarp : kThreads);
    put(args, 1);
  }
};

// The turn goes to the other warpgroup before it has been used.
template <bool kFaulty>
struct TurnGivenTooEarly : HopperFault {
  static FS_DEVICE void run(const Args& args) {
    auto* const last = reinterpret_cast<float*>(tile(0));
    if (first()) *last = 1;
    sync_block();
    const int own = thread_index() / kWarpgroup;
    if (own == 1) named_arrive(1, kThreads);
    for (int i = 0; i < 8; ++i) {
      named_sync(1 + own, kThreads);
      if (kFaulty) named_arrive(2 - own, kThreads);
      for (int k = 0; k < 3; ++k) sync_warp();
      if (thread_index() % kWarpgroup == 127) *last = *last * 3 + float(own);
      if (!kFaulty) named_arrive(2 - own, kThreads);
    }
    sync_block();
    put(args, *last);
  }
};

// ---- registers ----

template <bool kFaulty>
struct MoreRegistersThanThereAre : HopperFault {
  static constexpr int kThreads = 3 * kWarpgroup;
  static FS_DEVICE void run(const Args& args) {
    if (thread_index() < kWarpgroup) {
      kFaulty ? registers_give<40>() : registers_give<24>();
    } else {
      registers_take<240>();
    }
    put(args, 1);
  }
};

template <bool kFaulty>
struct RegistersTakenToBeFewer : HopperFault {
  static FS_DEVICE void run(const Args& args) {
    registers_take<240>();
    kFaulty ? registers_take<64>() : registers_give<64>();
    put(args, 1);
  }
};

template <bool kFaulty>
struct RegistersOfThreeWarps : HopperFault {
  static FS_DEVICE void run(const Args& args) {
    if (!kFaulty || thread_index() >= kWarp) registers_give<64>();
    put(args, 1);
  }
};

template <bool kFaulty>
struct RegistersWithoutOneLane : HopperFault {
  static FS_DEVICE void run(const Args& args) {
    if (!kFaulty || thread_index() != 37) registers_give<64>();
    sync_block();
    put(args, 1);
  }
};

// ---- tiles ----

template <bool kFaulty>
struct MisalignedTile : HopperFault {
  static FS_DEVICE void run(const Args& args) {
    begin(0, 1);
    if (first()) {
      barrier_expect(barrier(0), kTileBytes);
      load_tile(tile(0) + (kFaulty ? 512 : 0), args.map, barrier(0), {0, 0});
    }
    barrier_wait(barrier(0), 0);
    put(args, 1);
  }
};

template <bool kFaulty>
struct TileSourceOverwritten : HopperFault {
  static FS_DEVICE void run(const Args& args) {
    begin(0, 1);
    if (first()) {
      load(args, 0, 0, 0);
      if (!kFaulty) barrier_wait(barrier(0), 0);
      narrow(-1.0f, args.data[0]);
    }
    barrier_wait(barrier(0), 0);
    put(args, element(0, 0, 0));
  }
};

// What threads have stored, read by the tensor memory accelerator: `kFence` of its two orders.
template <bool kFence, bool kWait>
void store(const HopperFaultArgs& args, bool overwrite) {
  using F = HopperFault;
  for (int i = thread_index(); i < kTileBytes / 2; i += F::kThreads) {
    narrow(float(i % 100), reinterpret_cast<bfloat16*>(F::tile(0))[i]);
  }
  if (kFence) fence_async();
  sync_block();
  if (F::first()) {
    store_tile(args.map, F::tile(0), {0, 2 * kRows});
    stores_commit();
    if (kWait) stores_wait_read<0>();
    if (overwrite) narrow(77.0f, *reinterpret_cast<bfloat16*>(F::tile(0)));
    stores_wait<0>();
  }
  sync_block();
  F::put(args, widen(args.data[2 * kRows * 64 + thread_index() % 2]));
}

template <bool kFaulty>
struct StoredWithoutFence : HopperFault {
  static FS_DEVICE void run(const Args& args) { store<!kFaulty, true>(args, false); }
};

template <bool kFaulty>
struct OverwrittenWhileStored : HopperFault {
  static FS_DEVICE void run(const Args& args) { store<true, !kFaulty>(args, true); }
};

template <bool kFaulty>
struct StoreNotAwaited : HopperFault {
  static FS_DEVICE void run(const Args& args) {
    auto* const sums = reinterpret_cast<float*>(tile(0));
    sums[thread_index()] = 1;
    fence_async();
    sync_block();
    if (first()) {
      reduce_add(args.sums, sums, kThreads * int(sizeof(float)));
      stores_commit();
      if (!kFaulty) stores_wait_read<0>();
    }
    put(args, 1);
  }
};

template <bool kFaulty>
struct StoreNotCommitted : HopperFault {
  static FS_DEVICE void run(const Args& args) {
    auto* const sums = reinterpret_cast<float*>(tile(0));
    sums[thread_index()] = 1;
    fence_async();
    sync_block();
    if (first()) {
      reduce_add(args.sums, sums, kThreads * int(sizeof(float)));
      if (!kFaulty) stores_commit();
      stores_wait_read<0>();
    }
    put(args, 1);
  }
};

// ---- products ----

// The steps of a product, each of which can be left out or done at the wrong time.
template <bool kFaulty>
struct AccumulatorsReadTooEarly : HopperFault {
  static FS_DEVICE void run(const Args& args) {
    load_and_wait(args, 0, 0, 0);
    float d[32];
    wgmma_fence(d);
    multiply(d, 0, 0, false);
    wgmma_commit();
    float sum = sum_of(d);
    wgmma_wait<0>(d);
    put(args, kFaulty ? sum : sum_of(d));
  }
};

template <bool kFaulty>
struct AccumulatorsNotNamed : HopperFault {
  static FS_DEVICE void run(const Args& args) {
    load_and_wait(args, 0, 0, 0);
    float d[32];
    wgmma_fence(d);
    multiply(d, 0, 0, false);
    wgmma_commit();
    if (kFaulty) {
      wgmma_wait<0>();
    } else {
      wgmma_wait<0>(d);
    }
    put(args, sum_of(d));
  }
};

template <bool kFaulty>
struct WaitThatDoesNotCover : HopperFault {
  static FS_DEVICE void run(const Args& args) {
    load_and_wait(args, 0, 0, 0);
    float d[32], e[32];
    wgmma_fence(d, e);
    multiply(d, 0, 0, false);
    wgmma_commit();
    multiply(e, 0, 0, false);
    wgmma_commit();
    if (kFaulty) {
      wgmma_wait<1>(e);
    } else {
      wgmma_wait<1>(d);
    }
    wgmma_wait<0>(e);
    put(args, sum_of(e));
  }
};

template <bool kFaulty>
struct ProductNotCommitted : HopperFault {
  static FS_DEVICE void run(const Args& args) {
    load_and_wait(args, 0, 0, 0);
    float d[32];
    wgmma_fence(d);
    multiply(d, 0, 0, false);
    if (!kFaulty) wgmma_commit();
    wgmma_wait<0>(d);
    put(args, sum_of(d));
  }
};

template <bool kFaulty>
struct AccumulatorsWritten : HopperFault {
  static FS_DEVICE void run(const Args& args) {
    load_and_wait(args, 0, 0, 0);
    float d[32];
    wgmma_fence(d);
    multiply(d, 0, 0, false);
    wgmma_commit();
    if (kFaulty) d[3] = 0;
    wgmma_wait<0>(d);
    put(args, sum_of(d));
  }
};

template <bool kFaulty>
struct ProductWithoutFence : HopperFault {
  static FS_DEVICE void run(const Args& args) {
    load_and_wait(args, 0, 0, 0);
    float d[32];
    if (!kFaulty) wgmma_fence(d);
    multiply(d, 0, 0, false);
    wgmma_commit();
    wgmma_wait<0>(d);
    put(args, sum_of(d));
  }
};

// For which ptxas would put a fence of its own, and wait for each product.
template <bool kFaulty>
struct FenceBeforeAnotherWait : HopperFault {
  static FS_DEVICE void run(const Args& args) {
    load_and_wait(args, 0, 0, 0);
    float d[32];
    if (kFaulty) wgmma_fence(d);
    barrier_wait(barrier(0), 0);
    if (!kFaulty) wgmma_fence(d);
    multiply(d, 0, 0, false);
    wgmma_commit();
    wgmma_wait<0>(d);
    put(args, sum_of(d));
  }
};

// Another tile comes into the place of the operand while it is being read.
template <bool kFaulty>
struct OperandOverwritten : HopperFault {
  static FS_DEVICE void run(const Args& args) {
    load_and_wait(args, 0, 0, 0);
    float d[32];
    wgmma_fence(d);
    multiply(d, 0, 0, false);
    wgmma_commit();
    if (!kFaulty) wgmma_wait<0>(d);
    sync_block();
    if (first()) load(args, 0, 1, 0);
    barrier_wait(barrier(0), 1);
    if (kFaulty) wgmma_wait<0>(d);
    put(args, sum_of(d));
  }
};

// The same by ordinary stores.
template <bool kFaulty>
struct OperandStoredInto : HopperFault {
  static FS_DEVICE void run(const Args& args) {
    load_and_wait(args, 0, 0, 0);
    float d[32];
    wgmma_fence(d);
    multiply(d, 0, 0, false);
    wgmma_commit();
    if (!kFaulty) wgmma_wait<0>(d);
    sync_block();
    for (int i = thread_index(); i < kTileBytes / 4; i += kThreads) reinterpret_cast<float*>(tile(0))[i] = 0;
    if (kFaulty) wgmma_wait<0>(d);
    put(args, sum_of(d));
  }
};

// B is what the threads have stored.
template <bool kFaulty>
struct OperandWithoutFence : HopperFault {
  static FS_DEVICE void run(const Args& args) {
    load_and_wait(args, 0, 0, 0);
    for (int i = thread_index(); i < kTileBytes / 2; i += kThreads) {
      narrow(float(i % 5), reinterpret_cast<bfloat16*>(tile(1))[i]);
    }
    if (!kFaulty) fence_async();
    sync_block();
    float d[32];
    wgmma_fence(d);
    multiply(d, 0, 1, false);
    wgmma_commit();
    wgmma_wait<0>(d);
    put(args, sum_of(d));
  }
};

// The warps of a warpgroup do not wait for each other: what one has stored another may not find.
template <bool kFaulty>
struct OperandOfOtherWarps : HopperFault {
  static FS_DEVICE void run(const Args& args) {
    load_and_wait(args, 0, 0, 0);
    for (int i = thread_index(); i < kTileBytes / 2; i += kThreads) {
      narrow(float(i % 5), reinterpret_cast<bfloat16*>(tile(1))[i]);
    }
    fence_async();
    if (!kFaulty) sync_block();
    float d[32];
    wgmma_fence(d);
    multiply(d, 0, 1, false);
    wgmma_commit();
    wgmma_wait<0>(d);
    put(args, sum_of(d));
  }
};

template <bool kFaulty>
struct ProductWithoutOneLane : HopperFault {
  static FS_DEVICE void run(const Args& args) {
    load_and_wait(args, 0, 0, 0);
    float d[32];
    wgmma_fence(d);
    if (!kFaulty || thread_index() != 37) multiply(d, 0, 0, false);
    wgmma_commit();
    wgmma_wait<0>(d);
    put(args, sum_of(d));
  }
};

template <bool kFaulty>
struct ProductWithoutOneWarp : HopperFault {
  static FS_DEVICE void run(const Args& args) {
    load_and_wait(args, 0, 0, 0);
    float d[32];
    if (!kFaulty || thread_index() / kWarp != 1) {
      wgmma_fence(d);
      multiply(d, 0, 0, false);
      wgmma_commit();
      wgmma_wait<0>(d);
    }
    put(args, 1);
  }
};

template <bool kFaulty>
struct OperandsOfDifferentWarps : HopperFault {
  static FS_DEVICE void run(const Args& args) {
    load_and_wait(args, 0, 0, 0);
    load_and_wait(args, 1, 0, 1);
    float d[32];
    wgmma_fence(d);
    multiply(d, 0, kFaulty && thread_index() / kWarp == 2, false);
    wgmma_commit();
    wgmma_wait<0>(d);
    put(args, sum_of(d));
  }
};

template <bool kFaulty>
struct OperandOutOfBounds : HopperFault {
  static FS_DEVICE void run(const Args& args) {
    load_and_wait(args, 0, 0, 0);
    float d[32];
    wgmma_fence(d);
    wgmma<Type, 64, Major::k, Major::k>(d, operand(tile(0), 16, 1024),
                                        operand(tile(0), 16, kFaulty ? 8192 : 1024), false);
    wgmma_commit();
    wgmma_wait<0>(d);
    put(args, sum_of(d));
  }
};

template <bool kFaulty>
struct OperandMisaligned : HopperFault {
  static FS_DEVICE void run(const Args& args) {
    load_and_wait(args, 0, 0, 0);
    float d[32];
    wgmma_fence(d);
    wgmma<Type, 64, Major::k, Major::k>(d, operand(tile(0) + (kFaulty ? 128 : 32), 16, 1024),
                                        operand(tile(0), 16, 1024), false);
    wgmma_commit();
    wgmma_wait<0>(d);
    put(args, sum_of(d));
  }
};

template <bool kFaulty>
struct ProductLeftUnderWay : HopperFault {
  static FS_DEVICE void run(const Args& args) {
    load_and_wait(args, 0, 0, 0);
    float d[32];
    wgmma_fence(d);
    multiply(d, 0, 0, false);
    wgmma_commit();
    if (!kFaulty) wgmma_wait<0>(d);
    put(args, 1);
  }
};

// ---- numbers that are simply others ----

// A and B are from tiles of 64 rows; the faulty descriptor tells another layout.
template <Major kMajor, int kLeading, int kStride>
void offset_fault(const HopperFaultArgs& args) {
  using F = HopperFault;
  F::load_and_wait(args, 0, 0, 0);
  F::load_and_wait(args, 1, 1, 1);
  float d[64];
  wgmma_fence(d);
  wgmma<F::Type, 128, Major::k, kMajor>(d, operand_of_tiles<Major::k>(F::tile(0), kRows),
                                        operand(F::tile(0), kLeading, kStride), false);
  wgmma_commit();
  wgmma_wait<0>(d);
  float sum = 0;
  for (int i = 0; i < 64; ++i) sum = sum * 1.25f + d[i];
  F::put(args, sum);
}

template <bool kFaulty>
struct WrongStrideOffset : HopperFault {
  static FS_DEVICE void run(const Args& args) { offset_fault<Major::k, 16, kFaulty ? 512 : 1024>(args); }
};

template <bool kFaulty>
struct WrongLeadingOffset : HopperFault {
  static FS_DEVICE void run(const Args& args) {
    offset_fault<Major::mn, kFaulty ? kTileBytes / 2 : kTileBytes, 1024>(args);
  }
};

template <bool kFaulty>
struct WrongMajor : HopperFault {
  static FS_DEVICE void run(const Args& args) {
    offset_fault<kFaulty ? Major::k : Major::mn, kTileBytes, 1024>(args);
  }
};

// ---- all of them ----

struct Entry {
  const char* name;
  const char* (*start)(LaunchShape, const HopperFaultArgs&, bool faulty);
};

template <template <bool> class Kernel>
const char* start(LaunchShape shape, const HopperFaultArgs& args, bool faulty) {
  shape.threads = Kernel<false>::kThreads;
  return faulty ? launch<Kernel<true>>(shape, args) : launch<Kernel<false>>(shape, args);
}

template <template <bool> class Kernel>
constexpr Entry entry(const char* name) {
  return {name, start<Kernel>};
}

constexpr Entry kEntries[] = {
    entry<TileReadBeforeItIsThere>("tile_read_before_it_is_there"),
    entry<StageReleasedTooEarly>("stage_released_too_early"),
    entry<StageFilledWithoutAsking>("stage_filled_without_asking"),
    entry<WrongFirstParity>("wrong_first_parity"),
    entry<TooManyBytesExpected>("too_many_bytes_expected"),
    entry<TooFewBytesExpected>("too_few_bytes_expected"),
    entry<ArrivalMissing>("arrival_missing"),
    entry<ArrivalTooMany>("arrival_too_many"),
    entry<ArrivalLeftOver>("arrival_left_over"),
    entry<BarrierNotBegun>("barrier_not_begun"),
    entry<BarrierNotAnnounced>("barrier_not_announced"),
    entry<LoadLeftUnderWay>("load_left_under_way"),
    entry<NamedBarrierOfOthers>("named_barrier_of_others"),
    entry<NamedBarrierWithoutOneLane>("named_barrier_without_one_lane"),
    entry<NamedBarrierOfTwoCounts>("named_barrier_of_two_counts"),
    entry<TurnGivenTooEarly>("turn_given_too_early"),
    entry<MoreRegistersThanThereAre>("more_registers_than_there_are"),
    entry<RegistersTakenToBeFewer>("registers_taken_to_be_fewer"),
    entry<RegistersOfThreeWarps>("registers_of_three_warps"),
    entry<RegistersWithoutOneLane>("registers_without_one_lane"),
    entry<MisalignedTile>("misaligned_tile"),
    entry<TileSourceOverwritten>("tile_source_overwritten"),
    entry<StoredWithoutFence>("stored_without_fence"),
    entry<OverwrittenWhileStored>("overwritten_while_stored"),
    entry<StoreNotAwaited>("store_not_awaited"),
    entry<StoreNotCommitted>("store_not_committed"),
    entry<AccumulatorsReadTooEarly>("accumulators_read_too_early"),
    entry<AccumulatorsNotNamed>("accumulators_not_named"),
    entry<WaitThatDoesNotCover>("wait_that_does_not_cover"),
    entry<ProductNotCommitted>("product_not_committed"),
    entry<AccumulatorsWritten>("accumulators_written"),
    entry<ProductWithoutFence>("product_without_fence"),
    entry<FenceBeforeAnotherWait>("fence_before_another_wait"),
    entry<OperandOverwritten>("operand_overwritten"),
    entry<OperandStoredInto>("operand_stored_into"),
    entry<OperandWithoutFence>("operand_without_fence"),
    entry<OperandOfOtherWarps>("operand_of_other_warps"),
    entry<ProductWithoutOneLane>("product_without_one_lane"),
    entry<ProductWithoutOneWarp>("product_without_one_warp"),
    entry<OperandsOfDifferentWarps>("operands_of_different_warps"),
    entry<OperandOutOfBounds>("operand_out_of_bounds"),
    entry<OperandMisaligned>("operand_misaligned"),
    entry<ProductLeftUnderWay>("product_left_under_way"),
    entry<WrongStrideOffset>("wrong_stride_offset"),
    entry<WrongLeadingOffset>("wrong_leading_offset"),
    entry<WrongMajor>("wrong_major"),
};

}  // namespace

std::vector<std::string> hopper_fault_names() {
  std::vector<std::string> names;
  for (const Entry& entry : kEntries) names.emplace_back(entry.name);
  return names;
}

FaultResult run_hopper_fault(const std::string& name, bool faulty) {
  for (const Entry& entry : kEntries) {
    if (name != entry.name) continue;
    FaultResult result;
    result.values.resize(MoreRegistersThanThereAre<false>::kThreads, -2);
    std::vector<Vector16> data(kNumbers * sizeof(bfloat16) / sizeof(Vector16));
    std::vector<Vector16> sums(HopperFault::kThreads / 4);
    HopperFaultArgs args = {{},
                            result.values.data(),
                            reinterpret_cast<bfloat16*>(data.data()),
                            reinterpret_cast<float*>(sums.data())};
    for (int i = 0; i < kNumbers; ++i) narrow(float(i * i % 13 - 6), args.data[i]);
    const char* error =
        make_tensor_map(args.map, {args.data, 2, {64, kTiles * kRows}, {2, 128}, {64, kRows}});
    const LaunchShape shape{1, HopperFault::kThreads, 3 * kTileBytes + 4 * sizeof(PhaseBarrier)};
    if (!error) error = entry.start(shape, args, faulty);
    if (error) result.error = error;
    return result;
  }
  throw std::invalid_argument("no fault is called " + name);
}

}  // namespace fastseq::FASTSEQ_ISA
