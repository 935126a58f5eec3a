#include "faults.h"

#include <launch.h>
#include <prim.h>

#include <stdexcept>

namespace fastseq::FASTSEQ_ISA {
namespace {

constexpr int kData = 512, kFlags = 4;

struct FaultArgs {
  float* out;   // [blocks * threads]
  float* data;  // [kData], 0, 1, 2, ...
  int* flags;   // [kFlags], zero
};

struct FaultKernel {
  using Args = FaultArgs;
  static constexpr int kThreads = 128;
  static float* shared() { return reinterpret_cast<float*>(shared_memory()); }
  static int neighbour() { return (thread_index() + 33) % thread_count(); }  // in another warp, another lane
  static void put(const Args& args, float value) {
    args.out[block_index() * thread_count() + thread_index()] = value;
  }
};

// ---- numbers that come out wrong, or otherwise with each schedule ----

template <bool kFaulty>
struct MissingBlockBarrier : FaultKernel {
  static FS_DEVICE void run(const Args& args) {
    shared()[thread_index()] = float(thread_index());
    if (!kFaulty) sync_block();
    put(args, shared()[neighbour()]);
  }
};

template <bool kFaulty>
struct MissingWarpBarrier : FaultKernel {
  static FS_DEVICE void run(const Args& args) {
    shared()[thread_index()] = float(thread_index());
    if (!kFaulty) sync_warp();
    put(args, shared()[thread_index() ^ 1]);
  }
};

// The second write may come before the neighbour's read of the first.
template <bool kFaulty>
struct MissingBarrierBeforeReuse : FaultKernel {
  static FS_DEVICE void run(const Args& args) {
    float sum = 0;
    for (int step = 0; step < 3; ++step) {
      shared()[thread_index()] = float(thread_index() + 1000 * step);
      sync_block();
      sum = 2 * sum + shared()[neighbour()];
      if (!kFaulty) sync_block();
    }
    put(args, sum);
  }
};

template <bool kFaulty>
struct MissingClusterBarrier : FaultKernel {
  static FS_DEVICE void run(const Args& args) {
    shared()[thread_index()] = float(block_index());
    cluster_arrive();
    if (!kFaulty) cluster_wait();
    put(args, *cluster_map(shared() + thread_index(), 1 - block_index() % 2));
    if (kFaulty) cluster_wait();
    cluster_arrive();
    cluster_wait();
  }
};

// Writes to a block that may not have begun, so that its memory is not its own yet.
template <bool kFaulty>
struct MissingClusterStart : FaultKernel {
  static FS_DEVICE void run(const Args& args) {
    if (!kFaulty) {
      cluster_arrive();
      cluster_wait();
    }
    *cluster_map(shared() + thread_index(), 1 - block_index() % 2) = float(block_index());
    cluster_arrive();
    cluster_wait();
    put(args, shared()[thread_index()]);
  }
};

// Writes to a block that may have exited.
template <bool kFaulty>
struct MissingClusterEnd : FaultKernel {
  static FS_DEVICE void run(const Args& args) {
    cluster_arrive();
    cluster_wait();
    *cluster_map(shared() + thread_index(), 1 - block_index() % 2) = 1;
    if (!kFaulty) {
      cluster_arrive();
      cluster_wait();
    }
    put(args, 1);
  }
};

// Each thread sends to its like in the other block, and reads what it has been sent.
template <bool kWaits, bool kAllSend>
void exchange(const FaultArgs& args) {
  auto* const arrivals = reinterpret_cast<Arrivals*>(shared_memory());
  auto* const box = reinterpret_cast<Two<float>*>(shared_memory()) + 1 + thread_index();
  if (thread_index() == 0) arrivals_begin(arrivals);
  cluster_arrive();
  cluster_wait();
  if (thread_index() == 0) arrivals_expect(arrivals, thread_count() * int(sizeof *box));
  if (kAllSend || thread_index() != 37) send(box, Two<float>{{1, 2}}, arrivals, 1 - block_index());
  if (kWaits) arrivals_wait(arrivals, 0);
  args.out[block_index() * thread_count() + thread_index()] = box->value[0];
  cluster_arrive();
  cluster_wait();
}

template <bool kFaulty>
struct EarlyMessageRead : FaultKernel {
  static FS_DEVICE void run(const Args& args) { exchange<!kFaulty, true>(args); }
};

template <bool kFaulty>
struct MessageNeverSent : FaultKernel {
  static FS_DEVICE void run(const Args& args) { exchange<true, !kFaulty>(args); }
};

// Block 0 makes what block 1 reads.
template <bool kFaulty>
struct MissingFlagWait : FaultKernel {
  static FS_DEVICE void run(const Args& args) {
    const bool maker = block_index() == 0;
    if (maker) {
      args.data[thread_index()] = -1;
      sync_block();
      if (thread_index() == 0) set_flag(args.flags, 1);
    } else {
      if (thread_index() == 0 && !kFaulty) wait_flag(args.flags, 1);
      sync_block();
    }
    put(args, maker ? 0 : args.data[thread_index()]);
  }
};

// The flag is set before all threads have written.
template <bool kFaulty>
struct FlagBeforeBarrier : FaultKernel {
  static FS_DEVICE void run(const Args& args) {
    const bool maker = block_index() == 0;
    if (maker) {
      args.data[thread_index()] = -1;
      if (!kFaulty) sync_block();
      if (thread_index() == thread_count() / 2) set_flag(args.flags, 1);
      sync_block();
    } else {
      wait_flag(args.flags, 1);
    }
    put(args, maker ? 0 : args.data[thread_index()]);
  }
};

template <bool kFaulty>
struct UnwrittenSharedMemory : FaultKernel {
  static FS_DEVICE void run(const Args& args) {
    if (!kFaulty) shared()[thread_index()] = 0;
    put(args, shared()[thread_index()]);
  }
};

template <bool kFaulty>
struct EarlyAsyncRead : FaultKernel {
  static FS_DEVICE void run(const Args& args) {
    float* const own = shared() + 4 * thread_index();
    copy_async(own, args.data + 4 * (thread_index() % 32));
    copy_async_commit();
    copy_async(own + 4 * thread_count(), args.data);
    copy_async_commit();
    copy_async_wait<kFaulty ? 2 : 1>();
    put(args, own[0]);
  }
};

template <bool kFaulty>
struct UncommittedCopy : FaultKernel {
  static FS_DEVICE void run(const Args& args) {
    float* const own = shared() + 4 * thread_index();
    copy_async(own, args.data + 4 * (thread_index() % 32));
    if (!kFaulty) copy_async_commit();
    copy_async_wait<0>();
    put(args, own[0]);
  }
};

// The source changes while the copy is under way.
template <bool kFaulty>
struct SourceOverwritten : FaultKernel {
  static FS_DEVICE void run(const Args& args) {
    float* const own = shared() + 4 * thread_index();
    float* const source = args.data + 4 * (block_index() * thread_count() + thread_index());
    copy_async(own, source);
    copy_async_commit();
    if (!kFaulty) copy_async_wait<0>();
    source[0] = -1;
    if (kFaulty) copy_async_wait<0>();
    put(args, own[0]);
  }
};

// ---- memory out of bounds ----

template <bool kFaulty>
struct SharedWriteOutOfBounds : FaultKernel {
  static FS_DEVICE void run(const Args& args) {
    shared()[2 * thread_count() - !kFaulty] = 1;
    put(args, 1);
  }
};

template <bool kFaulty>
struct SharedWriteBelow : FaultKernel {
  static FS_DEVICE void run(const Args& args) {
    shared()[-int(kFaulty)] = 1;
    put(args, 1);
  }
};

template <bool kFaulty>
struct SharedReadOutOfBounds : FaultKernel {
  static FS_DEVICE void run(const Args& args) {
    shared()[2 * thread_count() - 1] = 1;
    put(args, shared()[2 * thread_count() - !kFaulty]);
  }
};

template <bool kFaulty>
struct GlobalReadOutOfBounds : FaultKernel {
  static FS_DEVICE void run(const Args& args) { put(args, load_once(args.data + kData - !kFaulty)); }
};

template <bool kFaulty>
struct GlobalWriteOutOfBounds : FaultKernel {
  static FS_DEVICE void run(const Args& args) {
    store_once(args.data + kData - !kFaulty, 1.0f);
    put(args, 1);
  }
};

template <bool kFaulty>
struct AsyncReadOutOfBounds : FaultKernel {
  static FS_DEVICE void run(const Args& args) {
    copy_async(shared() + 4 * thread_index(), args.data + kData - (kFaulty ? 0 : 4));
    put(args, 1);
  }
};

// ---- meetings that fail ----

template <bool kFaulty>
struct SkippedBlockBarrier : FaultKernel {
  static FS_DEVICE void run(const Args& args) {
    if (!kFaulty || block_index() != 1 || thread_index() != 37) sync_block();
    put(args, 1);
  }
};

template <bool kFaulty>
struct SkippedByOneLane : FaultKernel {
  static FS_DEVICE void run(const Args& args) {
    float sum = 1;
    if (!kFaulty || thread_index() != 37) sum += shuffle_xor(sum, 16);
    sync_block();
    put(args, sum);
  }
};

template <bool kFaulty>
struct DifferentCollectives : FaultKernel {
  static FS_DEVICE void run(const Args& args) {
    float d[4] = {};
    const Vector16 a = {};
    if (kFaulty && thread_index() % kWarp == 5) {
      mma(d, a, 0, 0, bfloat16{});
    } else {
      mma(d, a, 0, 0, float16{});
    }
    put(args, d[0]);
  }
};

template <bool kFaulty>
struct SkippedClusterBarrier : FaultKernel {
  static FS_DEVICE void run(const Args& args) {
    if (!kFaulty || block_index() != 1 || thread_index() != 37) {
      cluster_arrive();
      cluster_wait();
    }
    put(args, 1);
  }
};

template <bool kFaulty>
struct SecondArrive : FaultKernel {
  static FS_DEVICE void run(const Args& args) {
    cluster_arrive();
    if (kFaulty) cluster_arrive();
    cluster_wait();
    put(args, 1);
  }
};

template <bool kFaulty>
struct WaitWithoutArrive : FaultKernel {
  static FS_DEVICE void run(const Args& args) {
    if (!kFaulty) cluster_arrive();
    cluster_wait();
    put(args, 1);
  }
};

template <bool kFaulty>
struct ArriveWithoutWait : FaultKernel {
  static FS_DEVICE void run(const Args& args) {
    cluster_arrive();
    if (!kFaulty) cluster_wait();
    put(args, 1);
  }
};

template <bool kFaulty>
struct FlagNeverSet : FaultKernel {
  static FS_DEVICE void run(const Args& args) {
    if (block_index() == 0 && thread_index() == 0) set_flag(args.flags, kFaulty ? 2 : 3);
    if (thread_index() == 0) wait_flag(args.flags, 3);
    sync_block();
    put(args, 1);
  }
};

// Two blocks that wait for each other; the fault is in the launch, which does not let them run together.
template <bool>
struct NotTogether : FaultKernel {
  static FS_DEVICE void run(const Args& args) {
    if (thread_index() == 0) {
      set_flag(args.flags + block_index(), 1);
      wait_flag(args.flags + 1 - block_index(), 1);
    }
    sync_block();
    put(args, 1);
  }
};

// ---- addresses that the instruction does not take ----

template <bool kFaulty>
struct MisalignedRow : FaultKernel {
  static FS_DEVICE void run(const Args& args) {
    uint32_t r[4];
    load_matrices(r, shared() + 4 * (thread_index() % kWarp) + kFaulty);
    put(args, 1);
  }
};

template <bool kFaulty>
struct RowOfAnotherBlock : FaultKernel {
  static FS_DEVICE void run(const Args& args) {
    cluster_arrive();
    cluster_wait();
    uint32_t r[4];
    load_matrices(r, cluster_map(shared(), kFaulty ? 1 - block_index() % 2 : block_index() % 2));
    cluster_arrive();
    cluster_wait();
    put(args, 1);
  }
};

template <bool kFaulty>
struct MisalignedCopy : FaultKernel {
  static FS_DEVICE void run(const Args& args) {
    copy_async(shared() + 4 * thread_index(), args.data + 2 * kFaulty);
    put(args, 1);
  }
};

template <bool kFaulty>
struct CopyToGlobalMemory : FaultKernel {
  static FS_DEVICE void run(const Args& args) {
    copy_async(kFaulty ? args.data + 4 : shared(), args.data);
    put(args, 1);
  }
};

template <bool kFaulty>
struct MisalignedLoad : FaultKernel {
  static FS_DEVICE void run(const Args& args) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(args.data) + 8 * kFaulty;
    put(args, float(load_constant(reinterpret_cast<const Vector16*>(bytes)).word[0]));
  }
};

template <bool kFaulty>
struct MapOfGlobalMemory : FaultKernel {
  static FS_DEVICE void run(const Args& args) {
    cluster_map(kFaulty ? args.data : shared(), 0);
    put(args, 1);
  }
};

template <bool kFaulty>
struct RankOutOfCluster : FaultKernel {
  static FS_DEVICE void run(const Args& args) {
    cluster_map(shared(), kFaulty ? 2 : 1);
    put(args, 1);
  }
};

// ---- all of them ----

struct Entry {
  const char* name;
  const char* (*start)(const LaunchShape&, const FaultArgs&, bool faulty);
  int cluster;
  bool together, together_if_faulty;
};

template <template <bool> class Kernel>
const char* start(const LaunchShape& shape, const FaultArgs& args, bool faulty) {
  return faulty ? launch<Kernel<true>>(shape, args) : launch<Kernel<false>>(shape, args);
}

template <template <bool> class Kernel>
constexpr Entry entry(const char* name, int cluster = 1, bool together = false,
                      bool together_if_faulty = false) {
  return {name, start<Kernel>, cluster, together, together_if_faulty};
}

constexpr Entry kEntries[] = {
    entry<MissingBlockBarrier>("missing_block_barrier"),
    entry<MissingWarpBarrier>("missing_warp_barrier"),
    entry<MissingBarrierBeforeReuse>("missing_barrier_before_reuse"),
    entry<MissingClusterBarrier>("missing_cluster_barrier", 2),
    entry<MissingClusterStart>("missing_cluster_start", 2),
    entry<MissingClusterEnd>("missing_cluster_end", 2),
    entry<EarlyMessageRead>("early_message_read", 2),
    entry<MessageNeverSent>("message_never_sent", 2),
    entry<MissingFlagWait>("missing_flag_wait", 1, true, true),
    entry<FlagBeforeBarrier>("flag_before_barrier", 1, true, true),
    entry<UnwrittenSharedMemory>("unwritten_shared_memory"),
    entry<EarlyAsyncRead>("early_async_read"),
    entry<UncommittedCopy>("uncommitted_copy"),
    entry<SourceOverwritten>("source_overwritten"),
    entry<SharedWriteOutOfBounds>("shared_write_out_of_bounds"),
    entry<SharedWriteBelow>("shared_write_below"),
    entry<SharedReadOutOfBounds>("shared_read_out_of_bounds"),
    entry<GlobalReadOutOfBounds>("global_read_out_of_bounds"),
    entry<GlobalWriteOutOfBounds>("global_write_out_of_bounds"),
    entry<AsyncReadOutOfBounds>("async_read_out_of_bounds"),
    entry<SkippedBlockBarrier>("skipped_block_barrier"),
    entry<SkippedByOneLane>("skipped_by_one_lane"),
    entry<DifferentCollectives>("different_collectives"),
    entry<SkippedClusterBarrier>("skipped_cluster_barrier", 2),
    entry<SecondArrive>("second_arrive", 2),
    entry<WaitWithoutArrive>("wait_without_arrive", 2),
    entry<ArriveWithoutWait>("arrive_without_wait", 2),
    entry<FlagNeverSet>("flag_never_set", 1, true, true),
    entry<NotTogether>("not_together", 1, true, false),
    entry<MisalignedRow>("misaligned_row"),
    entry<RowOfAnotherBlock>("row_of_another_block", 2),
    entry<MisalignedCopy>("misaligned_copy"),
    entry<CopyToGlobalMemory>("copy_to_global_memory"),
    entry<MisalignedLoad>("misaligned_load"),
    entry<MapOfGlobalMemory>("map_of_global_memory", 2),
    entry<RankOutOfCluster>("rank_out_of_cluster", 2),
};

}  // namespace

std::vector<std::string> fault_names() {
  std::vector<std::string> names;
  for (const Entry& entry : kEntries) names.emplace_back(entry.name);
  return names;
}

FaultResult run_fault(const std::string& name, bool faulty) {
  for (const Entry& entry : kEntries) {
    if (name != entry.name) continue;
    constexpr int kBlocks = 2, kThreads = 64;
    LaunchShape shape{kBlocks, kThreads, 8 * kThreads * sizeof(float)};
    // As small as the kernel allows, so that what lies beyond is out of bounds.
    if (name.rfind("shared_", 0) == 0) shape.shared_bytes = 2 * kThreads * sizeof(float);
    shape.cluster = entry.cluster;
    shape.together = faulty ? entry.together_if_faulty : entry.together;
    FaultResult result;
    result.values.resize(kBlocks * kThreads, -2);
    std::vector<float> data(kData);
    for (int i = 0; i < kData; ++i) data[i] = float(i);
    std::vector<int> flags(kFlags);
    const char* error = entry.start(shape, {result.values.data(), data.data(), flags.data()}, faulty);
    if (error) result.error = error;
    return result;
  }
  throw std::invalid_argument("no fault is called " + name);
}

}  // namespace fastseq::FASTSEQ_ISA
