// Faults in the use of barriers, registers and tiles.
#include "hopper_faults.h"

#include <stdexcept>

#include "../cuda/tensor_map.h"
#include "faults.h"

namespace fastseq::FASTSEQ_ISA {
namespace {

constexpr int kRows = HopperFault::kRows, kTiles = HopperFault::kTiles, kTileBytes = HopperFault::kTileBytes;

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

// The producer keeps what it has.
template <bool kFaulty>
struct RegistersNotGiven : HopperFault {
  static constexpr int kThreads = 3 * kWarpgroup;
  static FS_DEVICE void run(const Args& args) {
    if (thread_index() >= kWarpgroup) {
      registers_take<240>();
    } else if (!kFaulty) {
      registers_give<24>();
    }
    put(args, 1);
  }
};

template <bool kFaulty>
struct RegistersTakenToBeFewer : HopperFault {
  static FS_DEVICE void run(const Args& args) {
    registers_give<128>();
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

}  // namespace

std::vector<HopperFaultEntry> hopper_faults() {
  return {
      hopper_fault<TileReadBeforeItIsThere>("tile_read_before_it_is_there"),
      hopper_fault<StageReleasedTooEarly>("stage_released_too_early"),
      hopper_fault<StageFilledWithoutAsking>("stage_filled_without_asking"),
      hopper_fault<WrongFirstParity>("wrong_first_parity"),
      hopper_fault<TooManyBytesExpected>("too_many_bytes_expected"),
      hopper_fault<TooFewBytesExpected>("too_few_bytes_expected"),
      hopper_fault<ArrivalMissing>("arrival_missing"),
      hopper_fault<ArrivalTooMany>("arrival_too_many"),
      hopper_fault<ArrivalLeftOver>("arrival_left_over"),
      hopper_fault<BarrierNotBegun>("barrier_not_begun"),
      hopper_fault<BarrierNotAnnounced>("barrier_not_announced"),
      hopper_fault<LoadLeftUnderWay>("load_left_under_way"),
      hopper_fault<NamedBarrierOfOthers>("named_barrier_of_others"),
      hopper_fault<NamedBarrierWithoutOneLane>("named_barrier_without_one_lane"),
      hopper_fault<NamedBarrierOfTwoCounts>("named_barrier_of_two_counts"),
      hopper_fault<TurnGivenTooEarly>("turn_given_too_early"),
      hopper_fault<MoreRegistersThanThereAre>("more_registers_than_there_are"),
      hopper_fault<RegistersNotGiven>("registers_not_given"),
      hopper_fault<RegistersTakenToBeFewer>("registers_taken_to_be_fewer"),
      hopper_fault<RegistersOfThreeWarps>("registers_of_three_warps"),
      hopper_fault<RegistersWithoutOneLane>("registers_without_one_lane"),
      hopper_fault<MisalignedTile>("misaligned_tile"),
      hopper_fault<TileSourceOverwritten>("tile_source_overwritten"),
      hopper_fault<StoredWithoutFence>("stored_without_fence"),
      hopper_fault<OverwrittenWhileStored>("overwritten_while_stored"),
      hopper_fault<StoreNotAwaited>("store_not_awaited"),
      hopper_fault<StoreNotCommitted>("store_not_committed"),
  };
}

// ---- all of them ----

namespace {

std::vector<HopperFaultEntry> all_faults() {
  std::vector<HopperFaultEntry> all = hopper_faults();
  for (const HopperFaultEntry& entry : hopper_product_faults()) all.push_back(entry);
  return all;
}

}  // namespace

std::vector<std::string> hopper_fault_names() {
  std::vector<std::string> names;
  for (const HopperFaultEntry& entry : all_faults()) names.emplace_back(entry.name);
  return names;
}

FaultResult run_hopper_fault(const std::string& name, bool faulty) {
  for (const HopperFaultEntry& entry : all_faults()) {
    if (name != entry.name) continue;
    constexpr int kNumbers = kTiles * kRows * 64;
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
