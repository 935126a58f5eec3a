// What the machine keeps of each block for the primitives of prim_hopper.h.
#pragma once

#include <prim_hopper.h>

#include <memory>
#include <string>
#include <vector>

#include "machine.h"

namespace fastseq::FASTSEQ_ISA {

// A box of a tensor, or bytes, and what was there when it was asked for, if that is what will be seen.
struct Load {
  TensorMap map;
  int at[5];
  const unsigned char* from;  // null: by the map
  size_t count;
  unsigned char* to;
  std::vector<unsigned char> early;
};

struct PhaseState {
  PhaseBarrier* own;
  const Thread* begun_by;
  bool announced;      // by barriers_begun()
  int arrivals, left;  // of a phase, and those that have not come
  int64_t bytes_left;  // expected, and no load brings them
  int64_t phase;
  bool comes_late;  // nothing is missing, but the loads wait until nobody can go on
  std::vector<Load> loads;
  std::vector<Thread*> waiting;
};

// A store that its thread has not waited for: `bytes` are what it read, empty while it has not.
struct Store {
  TensorMap map;
  int at[5];
  const unsigned char* from;
  float* sums;  // where it adds, instead of storing by the map
  size_t count;
  std::vector<unsigned char> bytes;
  bool is_written;
  int group;
};
struct Stores {
  std::vector<Store> under_way;
  int group;
};

struct NamedState {
  int threads, arrived;  // 0 threads: nobody has come in this round
  std::vector<Thread*> waiting;
};

// Accumulators of a warp: lane by lane the array, and row by row what will be in it.
struct Accumulators {
  float* of_lane[kWarp];
  int n;
  int pending;           // products that are not done
  std::vector<float> d;  // [16][n]
};
struct Product {
  WgmmaCall call;
  int group;
  int first_row;  // of the warp's
  size_t accumulators;
  std::vector<float> a, b;  // [16][16], [16][n]; empty if they will be read later
};
struct WarpState {
  std::vector<std::unique_ptr<Accumulators>> accumulators;
  std::vector<Product> products;  // that are not done, in order
  int group = 0;
  bool fenced = false;  // and has not waited for anything since
  size_t issued = 0;    // how many of the warpgroup's calls this warp has made
  int registers = 0;    // of a thread, as last set; 0: as at the launch
};

// What all four warps of a warpgroup have to do alike.
struct GroupCall {
  Wait what;
  int number;
  WgmmaCall call;
};
struct Warpgroup {
  std::vector<GroupCall> calls;  // as the first of its warps made them
  std::vector<Thread*> waiting;  // for other warps to issue
};

struct HopperBlock {
  std::vector<PhaseState> barriers;
  std::vector<unsigned char> seen;  // shared memory as asynchronous reads see it, once there is anything
  std::vector<Stores> stores;       // of each thread
  NamedState named[16] = {};
  std::vector<WarpState> warps;
  std::vector<Warpgroup> warpgroups;
};

// Of the current thread's block.
HopperBlock& hopper();
WarpState& warp_state();

// The picture that asynchronous reads see.
unsigned char* seen_memory();
void read_asynchronously(void* to, const void* shared, size_t bytes);
void write_asynchronously(void* shared, const void* from, size_t bytes);
void fill_asynchronously(void* shared, size_t bytes);  // with 0xFF

// The n-th call of this warp has to be that of the other warps of its warpgroup. Inside a meeting of the warp.
void check_group_call(const GroupCall& call);

// A box of a tensor in the order of shared memory, each row of 128 bytes swizzled by its address; what lies outside is
// zero, and is not written.
size_t box_bytes(const TensorMap& map);
void gather_box(const TensorMap& map, const int* at, unsigned char* to);
void scatter_box(const TensorMap& map, const int* at, const unsigned char* from);

// For the machine and its reports.
void hopper_begin(int blocks);
void hopper_thread_exits();
void hopper_block_exits();
bool wake_at_barriers();  // loads that could come late come now; whether anybody waited for some
std::string text_of_barrier(const Thread& thread);
std::string text_of_named(const Thread& thread);

}  // namespace fastseq::FASTSEQ_ISA
