#include <algorithm>
#include <mutex>
#include <stdexcept>
#include <utility>

#include "hopper.h"

namespace fastseq::FASTSEQ_ISA {

Who* who;
Machine machine;

namespace {

constexpr size_t kMostSharedBytes = 227 * 1024;  // of a block, on an sm_90
constexpr int kMostThreads = 1024;

// One of the bits that are set, as the order wants it.
int choose(uint32_t bits) {
  switch (machine.order) {
    case Order::forward:
      return __builtin_ctz(bits);
    case Order::reverse:
      return 31 - __builtin_clz(bits);
    default: {
      const unsigned turn = machine.next_random() & 31;
      return int((__builtin_ctz(bits >> turn | bits << (-turn & 31)) + turn) & 31);
    }
  }
}

Block* choose_block() {
  const int count = int(machine.blocks.size());
  const int first = machine.order == Order::random ? int(machine.next_random() % unsigned(count)) : 0;
  for (int i = 0; i < count; ++i) {
    const int k = machine.order == Order::reverse ? count - 1 - i : (first + i) % count;
    if (machine.blocks[k].ready) return &machine.blocks[k];
  }
  return nullptr;
}

// Who goes on after a thread of this warp: as few changes of warp and block as possible, so that one runs as far
// ahead of the others as the kernel lets it. In random order one time in eight anybody may be next.
Thread* choose_thread(Warp* warp) {
  const bool anybody = !warp || (machine.order == Order::random && machine.next_random() % 8 == 0);
  if (anybody || !warp->ready) {
    Block* block = anybody || !warp->home->ready ? choose_block() : warp->home;
    if (!block) return nullptr;
    if (!block->begun) {
      block->begun = true;
      machine.shared.begin(int(block - machine.blocks.data()));
    }
    warp = block->warp + choose(block->ready);
  }
  return warp->thread + choose(warp->ready);
}

Thread* choose_next(const Thread& self) {
  if (!self.warp->ready) self.home->ready &= ~(uint32_t(1) << self.warp->index);
  return choose_thread(self.warp);
}

// The last thread of a block takes its shared memory away.
void thread_exits() {
  Thread& self = current();
  Block& block = *self.home;
  if (self.cluster_arrived) {
    fail("cluster_arrive without cluster_wait\n" + place(self) + " arrived and then exited");
  }
  hopper_thread_exits();
  set_waiting(self, Wait::exit);
  if (++block.exited == self.threads) {
    const int slot = int(&block - machine.blocks.data());
    if (!machine.shared.guards_whole(slot)) {
      fail("shared memory was written out of bounds\nbelow or above the " +
           std::to_string(machine.shape.shared_bytes) + " bytes of block " + std::to_string(self.block));
    }
    hopper_block_exits();
    machine.shared.end(slot);
    --machine.running_blocks;
  }
}

void thread_body() {
  fiber_entered();
  Thread& self = current();
  Thread* next = nullptr;
  try {
    machine.kernel->run(machine.args);
    thread_exits();
    next = choose_next(self);
  } catch (Fault& fault) {
    machine.error = std::move(fault.text);
  }
  who = next;
  leave_fiber(self.fiber, next ? next->fiber : machine.scheduler);
}

// Gives room to `count` blocks, the first of which is `first`, and puts their threads at the kernel's beginning.
void make_blocks(int64_t first, int count) {
  const LaunchShape& shape = machine.shape;
  const int warps = shape.threads / kWarp;
  machine.running_blocks = count;
  machine.at_flag.clear();
  machine.arrivals.clear();
  machine.clusters.assign(count / shape.cluster, {});
  hopper_begin(count);
  for (int b = 0; b < count; ++b) {
    Block& block = machine.blocks[b];
    Cluster& cluster = machine.clusters[b / shape.cluster];
    const int rank = b % shape.cluster;
    if (rank == 0) cluster.block = &block;
    block = {};
    block.cluster = &cluster;
    block.warp = &machine.warps[b * warps];
    block.index = int(first) + b;
    block.rank = rank;
    block.ready = ~uint32_t(0) >> (32 - warps);
    block.shared = machine.shared.of(b);
    for (int w = 0; w < warps; ++w) {
      const int index = (b * warps + w) * kWarp;
      block.warp[w] = {&block, &machine.threads[index], w, ~uint32_t(0), 0, Wait::nothing, {}};
      for (int lane = 0; lane < kWarp; ++lane) {
        Thread& thread = machine.threads[index + lane];
        static_cast<Who&>(thread) = {w * kWarp + lane, shape.threads, block.index, int(shape.blocks),
                                     block.shared};
        make_fiber(thread.fiber, index + lane, thread_body);
        thread.warp = &block.warp[w];
        thread.home = &block;
        thread.bit = uint32_t(1) << lane;
        thread.wait = Wait::nothing;
        thread.cluster_arrived = false;
        thread.leaves_out = machine.left_out_turn;
        thread.copies.clear();
        thread.copies_done = 0;
        thread.copy_group = 0;
      }
    }
  }
}

// Runs the blocks that have room until all have exited, or one of them failed.
void run_blocks(int blocks_to_go) {
  while (machine.error.empty()) {
    Thread* next = choose_thread(nullptr);
    if (next) {
      who = next;
      switch_fiber(machine.scheduler, next->fiber);
    } else if (machine.running_blocks == 0) {
      break;
    } else if (!wake_at_flags() && !wake_at_barriers()) {
      machine.error = text_of_deadlock(blocks_to_go);
    }
  }
  who = nullptr;
  for (const ArrivalsState& state : machine.arrivals) {
    if (machine.error.empty() && (state.expects || state.bytes_left != 0)) {
      machine.error = "messages were left over when the blocks had exited\n" +
                      std::to_string(state.bytes_left) + " bytes expected and not sent, below 0: only sent";
    }
  }
  // Under AddressSanitizer the late write itself is found.
  for (size_t b = 0; b < machine.blocks.size(); ++b) {
    if (machine.error.empty() && !machine.shared.untouched(int(b))) {
      machine.error = "shared memory was written after its block had exited\nthat of block " +
                      std::to_string(machine.blocks[b].index);
    }
  }
}

// What a GPU would refuse, or the twin has no room for; empty if nothing.
std::string unfit(const LaunchShape& shape, int most_threads) {
  const auto text = [](const char* name, int64_t given, const std::string& accepted) {
    return std::string(name) + " is " + std::to_string(given) + "\naccepted is " + accepted;
  };
  if (shape.blocks < 1 || shape.blocks > 0x7fffffff) return text("blocks", shape.blocks, "1 to 2147483647");
  most_threads = std::min(most_threads, kMostThreads);
  if (shape.threads < kWarp || shape.threads > most_threads || shape.threads % kWarp != 0) {
    return text("threads", shape.threads,
                "a multiple of 32 up to the kernel's " + std::to_string(most_threads));
  }
  if (shape.shared_bytes > kMostSharedBytes) {
    return text("shared_bytes", int64_t(shape.shared_bytes), "up to " + std::to_string(kMostSharedBytes));
  }
  if (shape.cluster < 1 || shape.cluster > 16 || shape.blocks % shape.cluster != 0) {
    return text("cluster", shape.cluster, "1 to 16, a divisor of the blocks");
  }
  const int64_t together = (shape.together ? shape.blocks : shape.cluster) * shape.threads;
  if (together > kMostFibers) {
    return text("threads that run together", together, "up to " + std::to_string(kMostFibers));
  }
  return "";
}

void run_all() {
  const LaunchShape& shape = machine.shape;
  const int room = shape.together ? int(shape.blocks) : shape.cluster;
  const size_t threads = size_t(room) * shape.threads;
  if (!have_stacks(int(threads)) || !machine.shared.reserve(room, shape.shared_bytes)) {
    machine.error = "no memory for the threads' stacks and the blocks' shared memory";
    return;
  }
  if (machine.threads.size() < threads) machine.threads.resize(threads);
  machine.warps.resize(threads / kWarp);
  machine.blocks.resize(room);

  std::vector<int64_t> firsts(shape.blocks / room);
  for (size_t i = 0; i < firsts.size(); ++i) firsts[i] = int64_t(i) * room;
  if (machine.order == Order::reverse) std::reverse(firsts.begin(), firsts.end());
  if (machine.order == Order::random) {
    for (size_t i = firsts.size(); i > 1; --i) std::swap(firsts[i - 1], firsts[machine.next_random() % i]);
  }
  for (size_t i = 0; i < firsts.size() && machine.error.empty(); ++i) {
    make_blocks(firsts[i], room);
    run_blocks(int(shape.blocks - int64_t(i + 1) * room));
  }
}

std::mutex one_launch;

}  // namespace

void set_ready(Thread& thread) {
  thread.warp->ready |= thread.bit;
  thread.home->ready |= uint32_t(1) << thread.warp->index;
}

Thread* wake_at_flags() {
  auto& waiting = machine.at_flag;
  const auto still = std::partition(waiting.begin(), waiting.end(),
                                    [](const Thread* t) { return *t->flag < t->flag_value; });
  Thread* const any = still == waiting.end() ? nullptr : *still;
  std::for_each(still, waiting.end(), [](Thread* t) { set_ready(*t); });
  waiting.erase(still, waiting.end());
  return any;
}

void give_way() { give_way_to(choose_next(current())); }

void give_way_to(Thread* next) {
  Thread& self = current();
  if (next != &self) {
    who = next;
    switch_fiber(self.fiber, next ? next->fiber : machine.scheduler);
  }
  self.wait = Wait::nothing;
}

void set_schedule(Order order, uint64_t seed) {
  const std::lock_guard<std::mutex> lock(one_launch);
  machine.order = order;
  machine.random = (seed + 1) * 0x9e3779b97f4a7c15;
  if (machine.random == 0) machine.random = 1;
}

void leave_out(const std::string& what, int turn) {
  const std::lock_guard<std::mutex> lock(one_launch);
  machine.left_out = Wait::nothing;
  machine.left_out_turn = turn;
  for (const Wait wait : {Wait::sync_block, Wait::arrivals_wait, Wait::wait_flag, Wait::barrier_wait,
                          Wait::named_sync, Wait::wgmma_wait}) {
    if (what == name(wait)) machine.left_out = wait;
  }
  if (!what.empty() && machine.left_out == Wait::nothing) {
    throw std::invalid_argument("leave_out is given " + what);
  }
}

const char* launch_any(const LaunchShape& shape, const AnyKernel& kernel, const void* args) {
  static thread_local std::string error;
  const std::lock_guard<std::mutex> lock(one_launch);
  machine.shape = shape;
  machine.kernel = &kernel;
  machine.args = args;
  machine.error = unfit(shape, kernel.most_threads);
  if (machine.error.empty()) run_all();
  if (machine.error.empty()) return nullptr;
  error = kernel_name() + ": " + machine.error;
  return error.c_str();
}

}  // namespace fastseq::FASTSEQ_ISA
