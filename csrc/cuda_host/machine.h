// The machine that the host twin simulates: threads are fibers, and this says who of them may run.
//
// Warps, blocks and clusters are those of the GPU. A thread runs until it has to wait for others, and then switches
// to the next that can go on: of its warp, else of its block, else of any block that has been given room. Where
// nobody can, the scheduler on the stack of launch() looks at the flags, gives the next cluster its room, or
// reports that the kernel hangs.
//
// Everything is in one global `machine`, under the mutex of launch().
#pragma once

#include <launch.h>

#include <string>
#include <vector>

#include "fibers.h"

namespace fastseq::FASTSEQ_ISA {

struct Warp;
struct Block;
struct Cluster;
struct PhaseBarrier;

// What a thread waits for. The lanes of a warp may only meet at the same one.
enum class Wait : uint8_t {
  nothing,
  sync_warp,
  shuffle_xor,
  any_in_warp,
  load_matrices,
  load_matrices_transposed,
  mma_bfloat16,
  mma_float16,
  mma_float,
  mma_double,
  wgmma,
  wgmma_fence,
  wgmma_commit,
  wgmma_wait,
  set_registers,
  one_lane,
  named_barrier,  // the lanes of a warp before they come to one
  sync_block,
  barrier_wait,
  named_sync,
  wgmma_others,  // a wait for products that other warps have not issued
  cluster_wait,
  arrivals_wait,
  wait_flag,
  exit  // it has exited
};

struct Copy {
  unsigned char* shared;
  const unsigned char* global;
  Vector16 early;    // the source when the copy began
  bool is_early;     // whether that is what arrives, or the source when the copy is waited for
  int group, bytes;  // the rest of 16 becomes zero
};

struct Message {
  unsigned char* to;
  Vector16 value;
  int bytes;
};

struct Thread;
struct ArrivalsState {
  Arrivals* own;
  int phase;
  bool expects;        // in this phase
  int64_t bytes_left;  // expected and not sent; below zero, sent and not yet expected
  std::vector<Message> messages;
  std::vector<Thread*> waiting;
};

struct Thread : Who {
  Fiber fiber;
  Warp* warp;
  Block* home;
  uint32_t bit;  // of its lane
  Wait wait;

  bool cluster_arrived;  // and has not waited
  unsigned cluster_phase;

  const int* flag;
  int flag_value;
  Arrivals* arrivals;
  const PhaseBarrier* barrier;
  int named;  // barrier

  int leaves_out;  // until its turn, as leave_out() counts

  std::vector<Copy> copies;  // oldest first; those before copies_done have been made
  size_t copies_done;
  int copy_group;
};

struct Warp {
  Block* home;
  Thread* thread;    // of lane 0
  int index;         // in the block
  uint32_t ready;    // lanes that can go on
  uint32_t arrived;  // lanes that wait for the others at `wait`
  Wait wait;
  void* operand[kWarp];
};

struct Block {
  Cluster* cluster;
  Warp* warp;  // its first
  int index, rank;
  uint32_t ready;  // warps that have ready lanes
  int waiting;     // threads at sync_block
  bool any[2];  // of those, one way and the next in turn: what any_in_block has collected, and what it found
  int any_turn;
  int exited;
  bool begun;  // the first of its threads has run; its shared memory is its own from then on
  unsigned char* shared;
};

struct Cluster {
  Block* block;  // its first
  int arrived;
  unsigned phase;  // counts the barriers
};

// Blocks' shared memory, 1024-byte aligned, each between guards: poisoned under AddressSanitizer, else bytes that are
// checked.
class SharedMemory {
 public:
  bool reserve(int blocks, size_t bytes_each);  // of all blocks that have room at the same time
  unsigned char* of(int slot) const { return arena_ + slot * step() + kGuardBytes; }
  void begin(int slot);
  bool guards_whole(int slot) const;
  void end(int slot);
  bool untouched(int slot) const;  // since end()

 private:
  static constexpr size_t kGuardBytes = 4096;
  size_t upper_guard() const;
  size_t step() const;  // guard, memory, guard
  unsigned char* arena_ = nullptr;
  size_t capacity_ = 0, bytes_ = 0;
};

struct Machine {
  Order order = Order::forward;
  uint64_t random = 1;
  Wait left_out = Wait::nothing;
  int left_out_turn = 0;

  LaunchShape shape;
  const AnyKernel* kernel;
  const void* args;
  std::string error;

  // Those who have room: all blocks, or one cluster.
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<Block> blocks;
  std::vector<Cluster> clusters;
  std::vector<Thread*> at_flag;
  std::vector<ArrivalsState> arrivals;
  SharedMemory shared;
  int running_blocks;  // that have not exited
  Fiber scheduler;

  uint32_t next_random() {  // xorshift64*
    random ^= random >> 12;
    random ^= random << 25;
    random ^= random >> 27;
    return uint32_t(random * 0x2545f4914f6cdd1d >> 32);
  }
};
extern Machine machine;

// Of two things that may both happen: one in forward order, the other in reverse order.
inline bool coin() {
  return machine.order == Order::random ? machine.next_random() % 2 : machine.order == Order::reverse;
}

inline Thread& current() { return *static_cast<Thread*>(who); }

// A fault for kernels that have none: each thread leaves out its sync_block, arrivals_wait, wait_flag, barrier_wait,
// named_sync or wgmma_wait of this turn, counted from 0 in each launch. It stays until the next call; "" plants
// nothing.
void leave_out(const std::string& what, int turn);
inline bool leaves_out(Wait what) { return machine.left_out == what && current().leaves_out-- == 0; }

// Lets the others run; returns when the scheduler comes back to the calling thread, which may be at once.
void give_way();
void give_way_to(Thread* next);  // null: the scheduler
void set_ready(Thread& thread);
Thread* wake_at_flags();  // all whose flag is set; one of them, or null
inline void set_waiting(Thread& thread, Wait wait) {
  thread.wait = wait;
  thread.warp->ready &= ~thread.bit;
}

// Lanes of a warp meet: the last to arrive calls complete() with what all 32 have handed in, which lies on their
// stacks; there it also puts their results.
void meet(Wait kind, void* operand, void (*complete)(void* const* operands));

// What ends a launch: fail() leaves the kernel, and the other threads are abandoned where they are.
struct Fault {
  std::string text;
};
[[noreturn]] inline void fail(const std::string& text) { throw Fault{text}; }

int64_t bytes_missing(const Thread& thread);  // of one at arrivals_wait
void check_own_shared(const void* p, size_t bytes, const char* function);

std::string kernel_name();
std::string place(const Thread& thread);         // "block 1 thread 2"
const char* name(Wait wait);                     // "sync_block"
std::string text_of_deadlock(int blocks_to_go);  // for when nobody can go on

}  // namespace fastseq::FASTSEQ_ISA
