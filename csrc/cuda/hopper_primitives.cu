// Barriers, tiles and turns, each in the smallest kernel that shows it.
#include <launch.h>
#include <prim_hopper.h>

#include <algorithm>

#include "hopper_primitives.h"
#include "tensor_map.h"

namespace fastseq::FASTSEQ_ISA {
namespace {

// "pipeline": from[0] is [rounds][64][64] bfloat16, to is [2][128] floats, number[0] is rounds.
// A producer and two warpgroups of consumers, two stages. Thread t of the first adds up rows t / 64 * 32 and the 31
// next of column t % 64 of all tiles, of the second the same with tile i times i + 1.
struct PipelineKernel {
  struct Args {
    TensorMap map;
    float* to;
    int rounds;
  };
  static constexpr int kThreads = 3 * kWarpgroup, kStages = 2, kConsumers = 2;
  static constexpr int kTileBytes = 64 * kTileRowBytes;
  static constexpr size_t kSharedBytes = kStages * (kTileBytes + 2 * sizeof(PhaseBarrier));

  static FS_DEVICE void run(const Args& args) {
    unsigned char* const tiles = tile_memory();
    auto* const full = reinterpret_cast<PhaseBarrier*>(tiles + kStages * kTileBytes);
    PhaseBarrier* const empty = full + kStages;
    if (thread_index() == 0) {
      for (int s = 0; s < kStages; ++s) barrier_begin(full + s, 1), barrier_begin(empty + s, kConsumers);
      barriers_begun();
    }
    sync_block();
    if (thread_index() < kWarpgroup) {
      registers_give<24>();
      if (thread_index() < kWarp && one_lane()) produce(args, tiles, full, empty);
    } else {
      registers_take<240>();
      consume(args, thread_index() - kWarpgroup, tiles, full, empty);
    }
  }

  static FS_DEVICE void produce(const Args& args, unsigned char* tiles, PhaseBarrier* full,
                                PhaseBarrier* empty) {
    prefetch(args.map);
    FS_NO_UNROLL
    for (int i = 0; i < args.rounds; ++i) {
      const int s = i % kStages, phase = i / kStages;
      barrier_wait(empty + s, (phase + 1) & 1);
      barrier_expect(full + s, kTileBytes);
      load_tile<Keep::first_to_go>(tiles + s * kTileBytes, args.map, full + s, {0, i * 64});
    }
  }

  static FS_DEVICE void consume(const Args& args, int thread, const unsigned char* tiles, PhaseBarrier* full,
                                PhaseBarrier* empty) {
    const int consumer = thread / kWarpgroup, t = thread % kWarpgroup;
    float sum = 0;
    FS_NO_UNROLL
    for (int i = 0; i < args.rounds; ++i) {
      const int s = i % kStages, phase = i / kStages;
      barrier_wait(full + s, phase & 1);
      float of_tile = 0;
      for (int row = t / 64 * 32; row < t / 64 * 32 + 32; ++row) {
        const int offset = s * kTileBytes + tile_offset(row, t % 64);
        of_tile += widen(*reinterpret_cast<const bfloat16*>(tiles + offset));
      }
      sum += consumer == 0 ? of_tile : of_tile * float(i + 1);
      named_sync(1 + consumer, kWarpgroup);
      if (t == 0) barrier_arrive(empty + s);
    }
    args.to[thread] = sum;
  }
};

const char* run_pipeline(const HopperTest& test) {
  PipelineKernel::Args args = {{}, static_cast<float*>(test.to), int(test.number[0])};
  const int64_t rows = test.number[0] * 64;
  if (const char* error = make_tensor_map(args.map, {test.from[0], 2, {64, rows}, {2, 128}, {64, 64}}))
    return error;
  return launch<PipelineKernel>(
      {1, PipelineKernel::kThreads, PipelineKernel::kSharedBytes, 1, false, test.stream}, args);
}

// "load_tile": one box of the tensor from[0], as it lies in shared memory, to `to`.
// "store_tile": the shared memory from[0] to a box of the tensor `to`.
// number: rank, then five each of sizes, strides in bytes, box, and where the box begins; those beyond the rank unread.
TiledTensor tensor_of(const HopperTest& test, const void* base) {
  TiledTensor tensor = {base, int(test.number[0]), {}, {}, {}};
  for (int i = 0; i < 5; ++i) {
    tensor.size[i] = test.number[1 + i], tensor.stride[i] = i == 0 ? 2 : test.number[5 + i];
    tensor.box[i] = int(test.number[10 + i]);
  }
  return tensor;
}

template <int kRank>
struct LoadTileKernel {
  struct Args {
    TensorMap map;
    uint32_t* to;
    int at[kRank];
    int bytes;
  };
  static constexpr int kThreads = kWarpgroup;
  static FS_DEVICE void run(const Args& args) {
    unsigned char* const tile = tile_memory();
    auto* const full = reinterpret_cast<PhaseBarrier*>(tile + args.bytes);
    if (thread_index() == 0) barrier_begin(full, 1), barriers_begun();
    sync_block();
    if (thread_index() < kWarp && one_lane()) {
      barrier_expect(full, args.bytes);
      load_tile(tile, args.map, full, args.at);
    }
    barrier_wait(full, 0);
    for (int i = thread_index(); i < args.bytes / 4; i += kThreads) {
      args.to[i] = reinterpret_cast<const uint32_t*>(tile)[i];
    }
  }
};

template <int kRank>
struct StoreTileKernel {
  struct Args {
    TensorMap map;
    const uint32_t* from;
    int at[kRank];
    int bytes;
  };
  static constexpr int kThreads = kWarpgroup;
  static FS_DEVICE void run(const Args& args) {
    auto* const tile = reinterpret_cast<uint32_t*>(tile_memory());
    for (int i = thread_index(); i < args.bytes / 4; i += kThreads) tile[i] = args.from[i];
    fence_async();
    sync_block();
    if (thread_index() < kWarp && one_lane()) {
      store_tile(args.map, tile, args.at);
      stores_commit();
      stores_wait<0>();
    }
  }
};

template <template <int> class Kernel, int kRank, class Pointer>
const char* run_tile(const HopperTest& test, const void* tensor, Pointer other) {
  typename Kernel<kRank>::Args args = {{}, other, {}, kTileRowBytes};
  for (int i = 0; i < kRank; ++i) {
    args.at[i] = int(test.number[15 + i]);
    if (i > 0) args.bytes *= int(test.number[10 + i]);
  }
  if (const char* error = make_tensor_map(args.map, tensor_of(test, tensor))) return error;
  const size_t shared_bytes = size_t(args.bytes) + sizeof(PhaseBarrier);
  return launch<Kernel<kRank>>({1, kWarpgroup, shared_bytes, 1, false, test.stream}, args);
}

template <template <int> class Kernel, class Pointer>
const char* run_tile_of_rank(const HopperTest& test, const void* tensor, Pointer other) {
  switch (test.number[0]) {
    case 3:
      return run_tile<Kernel, 3>(test, tensor, other);
    case 4:
      return run_tile<Kernel, 4>(test, tensor, other);
    case 5:
      return run_tile<Kernel, 5>(test, tensor, other);
    default:
      return run_tile<Kernel, 2>(test, tensor, other);
  }
}

// "reduce_add": from[0] is [blocks][count] floats, all added to `to`, [count]. number: blocks, count.
struct ReduceKernel {
  struct Args {
    const float* from;
    float* to;
    int count;
  };
  static constexpr int kThreads = kWarpgroup;
  static FS_DEVICE void run(const Args& args) {
    auto* const sums = reinterpret_cast<float*>(tile_memory());
    for (int i = thread_index(); i < args.count; i += kThreads) {
      sums[i] = args.from[int64_t(block_index()) * args.count + i];
    }
    fence_async();
    sync_block();
    if (thread_index() < kWarp && one_lane()) {
      reduce_add(args.to, sums, args.count * int(sizeof(float)));
      stores_commit();
      stores_wait_read<0>();
    }
  }
};

const char* run_reduce(const HopperTest& test) {
  const int count = int(test.number[1]);
  return launch<ReduceKernel>({test.number[0], kWarpgroup, count * sizeof(float), 1, false, test.stream},
                              {static_cast<const float*>(test.from[0]), static_cast<float*>(test.to), count});
}

// "load_bytes": number[0] floats from from[0] to `to`, by way of shared memory.
struct LoadBytesKernel {
  struct Args {
    const float* from;
    float* to;
    int count;
  };
  static constexpr int kThreads = kWarpgroup;
  static FS_DEVICE void run(const Args& args) {
    auto* const full = reinterpret_cast<PhaseBarrier*>(shared_memory());
    auto* const numbers = reinterpret_cast<float*>(shared_memory()) + 4;
    if (thread_index() == 0) barrier_begin(full, 1), barriers_begun();
    sync_block();
    if (thread_index() < kWarp && one_lane()) {
      barrier_expect(full, args.count * int(sizeof(float)));
      load_bytes(numbers, args.from, args.count * int(sizeof(float)), full);
    }
    barrier_wait(full, 0);
    for (int i = thread_index(); i < args.count; i += kThreads) args.to[i] = numbers[i];
  }
};

const char* run_load_bytes(const HopperTest& test) {
  const int count = int(test.number[0]);
  return launch<LoadBytesKernel>(
      {1, kWarpgroup, 16 + count * sizeof(float), 1, false, test.stream},
      {static_cast<const float*>(test.from[0]), static_cast<float*>(test.to), count});
}

// "turns": two warpgroups, one after the other, number[0] times each. `to` is [2 number[0]] ints: entry i is twice the
// one before plus the number of the warpgroup plus 1, modulo 9973.
struct TurnsKernel {
  struct Args {
    int* to;
    int rounds;
  };
  static constexpr int kThreads = 2 * kWarpgroup;
  static FS_DEVICE void run(const Args& args) {
    auto* const last = reinterpret_cast<int*>(shared_memory());
    if (thread_index() == 0) *last = 0;
    sync_block();
    const int own = thread_index() / kWarpgroup;
    if (own == 1) named_arrive(1, kThreads);
    FS_NO_UNROLL
    for (int i = 0; i < args.rounds; ++i) {
      named_sync(1 + own, kThreads);
      // Any thread of the warpgroup, another one each time.
      if (thread_index() % kWarpgroup == (i * 37 + 5) % kWarpgroup) {
        *last = (2 * *last + own + 1) % 9973;
        args.to[2 * i + own] = *last;
      }
      named_arrive(2 - own, kThreads);
    }
  }
};

const char* run_turns(const HopperTest& test) {
  return launch<TurnsKernel>({1, TurnsKernel::kThreads, sizeof(int), 1, false, test.stream},
                             {static_cast<int*>(test.to), int(test.number[0])});
}

// "one_lane": `to` is [2][128] ints, 1 where a thread is the one of its warp, asked twice.
struct OneLaneKernel {
  struct Args {
    int* to;
  };
  static constexpr int kThreads = kWarpgroup;
  static FS_DEVICE void run(const Args& args) {
    for (int i = 0; i < 2; ++i) args.to[i * kThreads + thread_index()] = one_lane();
  }
};

}  // namespace

const char* run_hopper_primitive(const std::string& name, const HopperTest& test) {
  const DeviceGuard guard(test.device);
  if (name == "pipeline") return run_pipeline(test);
  if (name == "load_tile") {
    return run_tile_of_rank<LoadTileKernel>(test, test.from[0], static_cast<uint32_t*>(test.to));
  }
  if (name == "store_tile") {
    return run_tile_of_rank<StoreTileKernel>(test, test.to, static_cast<const uint32_t*>(test.from[0]));
  }
  if (name == "load_bytes") return run_load_bytes(test);
  if (name == "reduce_add") return run_reduce(test);
  if (name == "turns") return run_turns(test);
  if (name == "one_lane") {
    return launch<OneLaneKernel>({1, kWarpgroup, 0, 1, false, test.stream}, {static_cast<int*>(test.to)});
  }
  return run_hopper_product(name, test);
}

}  // namespace fastseq::FASTSEQ_ISA
