// Faults in the use of products.
#include "hopper_faults.h"

namespace fastseq::FASTSEQ_ISA {
namespace {

constexpr int kRows = HopperFault::kRows, kTileBytes = HopperFault::kTileBytes;

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

// One stage, which one thread gives back for its warpgroup: after its own wait, which is over when all four warps have
// read.
template <bool kFaulty>
struct OperandReleasedTooEarly : HopperFault {
  static FS_DEVICE void run(const Args& args) {
    PhaseBarrier *const full = barrier(0), *const empty = barrier(1);
    begin(0, 1);
    begin(1, 1);
    float d[32] = {};
    for (int i = 0; i < kTiles; ++i) {
      if (first()) {
        barrier_wait(empty, (i + 1) & 1);
        load(args, 0, i, 0);
      }
      if (thread_index() < kWarpgroup) continue;
      barrier_wait(full, i & 1);
      wgmma_fence(d);
      multiply(d, 0, 0, i > 0);
      wgmma_commit();
      const bool releases = thread_index() == kWarpgroup + 37;
      if (kFaulty && releases) barrier_arrive(empty);
      sync_warp();
      wgmma_wait<0>(d);
      if (!kFaulty && releases) barrier_arrive(empty);
    }
    put(args, sum_of(d));
  }
};

// Ordinary stores into an operand.
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

}  // namespace

std::vector<HopperFaultEntry> hopper_product_faults() {
  return {
      hopper_fault<AccumulatorsReadTooEarly>("accumulators_read_too_early"),
      hopper_fault<AccumulatorsNotNamed>("accumulators_not_named"),
      hopper_fault<WaitThatDoesNotCover>("wait_that_does_not_cover"),
      hopper_fault<ProductNotCommitted>("product_not_committed"),
      hopper_fault<AccumulatorsWritten>("accumulators_written"),
      hopper_fault<ProductWithoutFence>("product_without_fence"),
      hopper_fault<FenceBeforeAnotherWait>("fence_before_another_wait"),
      hopper_fault<OperandOverwritten>("operand_overwritten"),
      hopper_fault<OperandReleasedTooEarly>("operand_released_too_early"),
      hopper_fault<OperandStoredInto>("operand_stored_into"),
      hopper_fault<OperandWithoutFence>("operand_without_fence"),
      hopper_fault<OperandOfOtherWarps>("operand_of_other_warps"),
      hopper_fault<ProductWithoutOneLane>("product_without_one_lane"),
      hopper_fault<ProductWithoutOneWarp>("product_without_one_warp"),
      hopper_fault<OperandsOfDifferentWarps>("operands_of_different_warps"),
      hopper_fault<OperandOutOfBounds>("operand_out_of_bounds"),
      hopper_fault<OperandMisaligned>("operand_misaligned"),
      hopper_fault<ProductLeftUnderWay>("product_left_under_way"),
      hopper_fault<WrongStrideOffset>("wrong_stride_offset"),
      hopper_fault<WrongLeadingOffset>("wrong_leading_offset"),
      hopper_fault<WrongMajor>("wrong_major"),
  };
}

}  // namespace fastseq::FASTSEQ_ISA
