// Where threads wait for each other: warps, blocks, clusters, flags.
#include <algorithm>

#include "machine.h"

namespace fastseq::FASTSEQ_ISA {
namespace {

void nothing(void* const*) {}

struct Shuffle {
  uint64_t word;
  int mask;
};
void shuffle(void* const* operand) {
  uint64_t word[kWarp];
  for (int l = 0; l < kWarp; ++l) {
    word[l] = static_cast<Shuffle*>(operand[l ^ static_cast<Shuffle*>(operand[l])->mask])->word;
  }
  for (int l = 0; l < kWarp; ++l) static_cast<Shuffle*>(operand[l])->word = word[l];
}

void any(void* const* operand) {
  bool found = false;
  for (int l = 0; l < kWarp; ++l) found |= *static_cast<bool*>(operand[l]);
  for (int l = 0; l < kWarp; ++l) *static_cast<bool*>(operand[l]) = found;
}

struct Rows {
  const unsigned char* row;
  uint32_t* r;
};
void load(void* const* operand) {
  for (int l = 0; l < kWarp; ++l) {
    for (int i = 0; i < 4; ++i) {
      const auto* row = static_cast<Rows*>(operand[8 * i + l / 4])->row;
      std::memcpy(&static_cast<Rows*>(operand[l])->r[i], row + 4 * (l % 4), 4);
    }
  }
}

void load_transposed(void* const* operand) {
  for (int l = 0; l < kWarp; ++l) {
    for (int i = 0; i < 4; ++i) {
      uint16_t elements[2];
      for (int e = 0; e < 2; ++e) {
        const auto* row = static_cast<Rows*>(operand[8 * i + 2 * (l % 4) + e])->row;
        std::memcpy(&elements[e], row + 2 * (l / 4), 2);
      }
      std::memcpy(&static_cast<Rows*>(operand[l])->r[i], elements, 4);
    }
  }
}

}  // namespace

// ---- warps ----

void meet(Wait kind, void* operand, void (*complete)(void* const*)) {
  Thread& self = current();
  Warp& warp = *self.warp;
  if (warp.arrived == 0) {
    warp.wait = kind;
  } else if (warp.wait != kind) {
    fail("the lanes of a warp meet at different places\n" + place(warp.thread[__builtin_ctz(warp.arrived)]) +
         " waits at " + name(warp.wait) + ", thread " + std::to_string(self.thread) + " came to " +
         name(kind));
  }
  warp.operand[self.thread % kWarp] = operand;
  warp.arrived |= self.bit;
  if (warp.arrived == ~uint32_t(0)) {
    complete(warp.operand);
    warp.arrived = 0;
    warp.ready = ~uint32_t(0);
  } else {
    set_waiting(self, kind);
  }
  give_way();
}

void sync_warp() { meet(Wait::sync_warp, nullptr, nothing); }

uint64_t shuffle_xor_word(uint64_t word, int mask) {
  if (mask < 0 || mask >= kWarp) {
    fail("shuffle_xor is given the mask " + std::to_string(mask) + "\n" + place(current()));
  }
  Shuffle operand{word, mask};
  meet(Wait::shuffle_xor, &operand, shuffle);
  return operand.word;
}

void load_matrices(uint32_t (&r)[4], const void* row) {
  check_alignment(row, 16, "load_matrices");
  check_own_shared(row, 16, "load_matrices");
  Rows operand{static_cast<const unsigned char*>(row), r};
  meet(Wait::load_matrices, &operand, load);
}

void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  check_alignment(row, 16, "load_matrices_transposed");
  check_own_shared(row, 16, "load_matrices_transposed");
  Rows operand{static_cast<const unsigned char*>(row), r};
  meet(Wait::load_matrices_transposed, &operand, load_transposed);
}

bool any_in_warp(bool x) {
  meet(Wait::any_in_warp, &x, any);
  return x;
}

// ---- blocks ----

void sync_block() {
  if (leaves_out(Wait::sync_block)) return;
  Thread& self = current();
  Block& block = *self.home;
  set_waiting(self, Wait::sync_block);
  if (++block.waiting == self.threads) {
    block.waiting = 0;
    for (int w = 0; w < self.threads / kWarp; ++w) {
      block.warp[w].ready = ~uint32_t(0);
      block.ready |= uint32_t(1) << w;
    }
  }
  give_way();
}

// Nobody can be at the meeting after the next before all have read what this one found.
bool any_in_block(bool x) {
  Block& block = *current().home;
  const int turn = block.any_turn;
  block.any[turn] |= x;
  if (block.waiting + 1 == who->threads) {
    block.any_turn = 1 - turn;
    block.any[1 - turn] = false;
  }
  sync_block();
  return block.any[turn];
}

// ---- clusters ----

void cluster_arrive() {
  Thread& self = current();
  if (self.cluster_arrived) fail("second cluster_arrive without a cluster_wait between\n" + place(self));
  Cluster& cluster = *self.home->cluster;
  self.cluster_arrived = true;
  self.cluster_phase = cluster.phase;
  const int all = machine.shape.cluster * self.threads;
  if (++cluster.arrived < all) return;
  cluster.arrived = 0;
  ++cluster.phase;
  Thread* first = cluster.block->warp->thread;
  std::for_each(first, first + all, [](Thread& t) {
    if (t.wait == Wait::cluster_wait) set_ready(t);
  });
}

void cluster_wait() {
  Thread& self = current();
  if (!self.cluster_arrived) fail("cluster_wait without cluster_arrive\n" + place(self));
  if (self.cluster_phase == self.home->cluster->phase) {
    set_waiting(self, Wait::cluster_wait);
    give_way();
  }
  self.cluster_arrived = false;
}

void* cluster_map_address(void* shared, int rank) {
  check_own_shared(shared, 1, "cluster_map");
  if (rank < 0 || rank >= machine.shape.cluster) {
    fail("cluster_map is given the rank " + std::to_string(rank) + " in a cluster of " +
         std::to_string(machine.shape.cluster) + "\n" + place(current()));
  }
  const ptrdiff_t offset = static_cast<unsigned char*>(shared) - who->shared;
  return current().home->cluster->block[rank].shared + offset;
}

// ---- flags ----

void set_flag(int* flag, int value) {
  check_alignment(flag, sizeof(int), "set_flag");
  *flag = value;
  Thread* const woken = wake_at_flags();
  // Now or later: what the waiting thread reads has to be there already.
  const bool now = coin();
  if (woken && now) give_way_to(woken);
}

void wait_flag(const int* flag, int value) {
  check_alignment(flag, sizeof(int), "wait_flag");
  if (leaves_out(Wait::wait_flag) || *flag >= value) return;
  Thread& self = current();
  self.flag = flag;
  self.flag_value = value;
  machine.at_flag.push_back(&self);
  set_waiting(self, Wait::wait_flag);
  give_way();
}

}  // namespace fastseq::FASTSEQ_ISA
