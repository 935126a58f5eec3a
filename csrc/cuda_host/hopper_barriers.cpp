// Barriers that count arrivals and bytes, and those with a number.
#include <algorithm>

#include "hopper.h"

namespace fastseq::FASTSEQ_ISA {
namespace {

std::string place_of(const PhaseBarrier* barrier) {
  return "the barrier at byte " +
         std::to_string(reinterpret_cast<const unsigned char*>(barrier) - who->shared);
}

PhaseState& state_of(const PhaseBarrier* barrier, const char* function) {
  check_alignment(barrier, sizeof(PhaseBarrier), function);
  check_own_shared(barrier, sizeof(PhaseBarrier), function);
  std::vector<PhaseState>& all = hopper().barriers;
  if (barrier->word >= all.size() || all[barrier->word].own != barrier) {
    fail(std::string(function) + " is given a barrier that has not begun\n" + place(current()) + ", " +
         place_of(barrier));
  }
  PhaseState& state = all[barrier->word];
  if (!state.announced) {
    fail(std::string(function) + " comes before barriers_begun\n" + place(current()) + ", " +
         place_of(barrier));
  }
  return state;
}

std::vector<unsigned char> source_of(const Load& load) {
  std::vector<unsigned char> bytes(load.count);
  if (load.from) {
    std::memcpy(bytes.data(), load.from, load.count);
  } else {
    gather_box(load.map, load.at, bytes.data());
  }
  return bytes;
}

void end_phase(PhaseState& state) {
  for (Load& load : state.loads) {
    if (load.early.empty()) load.early = source_of(load);
    write_asynchronously(load.to, load.early.data(), load.count);
  }
  state.loads.clear();
  state.comes_late = false;
  state.left = state.arrivals;
  ++state.phase;
  for (Thread* thread : state.waiting) set_ready(*thread);
  state.waiting.clear();
}

void end_phase_if_complete(PhaseState& state) {
  if (state.left != 0 || state.bytes_left != 0) return;
  if (state.loads.empty() || coin()) return end_phase(state);
  state.comes_late = true;
}

void arrive(PhaseState& state, const char* function) {
  if (state.left == 0) {
    fail(std::string(function) + " comes more often than is counted\n" + place(current()) + ", " +
         place_of(state.own) + " has had its " + std::to_string(state.arrivals) +
         " arrivals of this phase, which is not complete");
  }
  --state.left;
  end_phase_if_complete(state);
}

}  // namespace

void barrier_begin(PhaseBarrier* own, int arrivals) {
  check_alignment(own, sizeof(PhaseBarrier), "barrier_begin");
  check_own_shared(own, sizeof(PhaseBarrier), "barrier_begin");
  std::vector<PhaseState>& all = hopper().barriers;
  if (own->word < all.size() && all[own->word].own == own) {
    fail("barrier_begin is given a barrier that has begun\n" + place(current()) + ", " + place_of(own));
  }
  if (arrivals < 1 || arrivals >= 1 << 20) {
    fail("barrier_begin is given " + std::to_string(arrivals) + " arrivals\n" + place(current()));
  }
  own->word = all.size();
  all.push_back({own, &current(), false, arrivals, arrivals, 0, 0, false, {}, {}});
}

void barriers_begun() {
  for (PhaseState& state : hopper().barriers) {
    if (state.begun_by == &current()) state.announced = true;
  }
  fence_async();
}

void barrier_arrive(PhaseBarrier* own) { arrive(state_of(own, "barrier_arrive"), "barrier_arrive"); }

void barrier_expect(PhaseBarrier* own, int bytes) {
  PhaseState& state = state_of(own, "barrier_expect");
  if (bytes < 0 || state.bytes_left + bytes >= 1 << 20) {
    fail("barrier_expect is given " + std::to_string(bytes) + " bytes\naccepted is below 2^20 in a phase");
  }
  if (state.left != 0) state.bytes_left += bytes;
  arrive(state, "barrier_expect");
}

void barrier_wait(PhaseBarrier* own, int parity) {
  const PhaseState& state = state_of(own, "barrier_wait");
  if (parity != 0 && parity != 1) {
    fail("barrier_wait is given the parity " + std::to_string(parity) + "\n" + place(current()));
  }
  warp_state().fenced = false;
  if (leaves_out(Wait::barrier_wait) || (state.phase & 1) != parity) return;
  Thread& self = current();
  const int64_t phase = state.phase;
  self.barrier = own;
  hopper().barriers[own->word].waiting.push_back(&self);
  set_waiting(self, Wait::barrier_wait);
  give_way();
  // On a GPU the thread might look again only now, and find the parity that it waits for.
  if (state_of(own, "barrier_wait").phase > phase + 1) {
    fail("a phase ended while a thread waited for the one before\n" + place(self) + ", " + place_of(own));
  }
}

namespace {

void begin(Load load, PhaseBarrier* full, const char* function) {
  check_own_shared(load.to, load.count, function);
  PhaseState& state = state_of(full, function);
  const auto bytes = int64_t(load.count);
  if (state.bytes_left < bytes) {
    fail(std::string(function) + " brings more bytes than are expected\n" + place(current()) + ", " +
         place_of(full) + ": " + std::to_string(bytes) + " bytes, expected are " +
         std::to_string(state.bytes_left));
  }
  state.bytes_left -= bytes;
  fill_asynchronously(load.to, load.count);
  if (coin()) load.early = source_of(load);
  state.loads.push_back(std::move(load));
  end_phase_if_complete(state);
}

}  // namespace

void load_tile_at(void* to, const TensorMap& map, PhaseBarrier* full, const int* at, int rank) {
  check_alignment(to, kTileAlignment, "load_tile");
  if (rank != map.rank) {
    fail("load_tile is given " + std::to_string(rank) + " coordinates for a tensor of " +
         std::to_string(map.rank) + " dimensions\n" + place(current()));
  }
  Load load{map, {}, nullptr, box_bytes(map), static_cast<unsigned char*>(to), {}};
  std::copy(at, at + rank, load.at);
  begin(std::move(load), full, "load_tile");
}

void load_bytes(void* to, const void* from, int bytes, PhaseBarrier* full) {
  check_alignment(to, 16, "load_bytes");
  check_alignment(from, 16, "load_bytes");
  if (bytes < 16 || bytes % 16 != 0) {
    fail("load_bytes is given " + std::to_string(bytes) + " bytes\naccepted is a multiple of 16");
  }
  begin({{}, {}, static_cast<const unsigned char*>(from), size_t(bytes), static_cast<unsigned char*>(to), {}},
        full, "load_bytes");
}

// One of those that can come and somebody waits for, as the order wants it.
bool wake_at_barriers() {
  std::vector<std::pair<Thread*, PhaseState*>> late;
  for (Block& block : machine.blocks) {
    who = block.warp->thread;
    for (PhaseState& state : hopper().barriers) {
      if (state.comes_late && !state.waiting.empty()) late.emplace_back(block.warp->thread, &state);
    }
  }
  if (late.empty()) return false;
  const size_t chosen = machine.order == Order::forward   ? 0
                        : machine.order == Order::reverse ? late.size() - 1
                                                          : machine.next_random() % late.size();
  who = late[chosen].first;
  end_phase(*late[chosen].second);
  return true;
}

std::string text_of_barrier(const Thread& thread) {
  Who* const before = who;
  who = const_cast<Thread*>(&thread);
  const std::vector<PhaseState>& all = hopper().barriers;
  const PhaseState& state =
      *std::find_if(all.begin(), all.end(), [&](const PhaseState& s) { return s.own == thread.barrier; });
  const std::string text = "for phase " + std::to_string(state.phase) + " of " + place_of(thread.barrier) +
                           ": " + std::to_string(state.left) + " of " + std::to_string(state.arrivals) +
                           " arrivals and " + std::to_string(state.bytes_left) + " bytes are missing";
  who = before;
  return text;
}

// ---- with a number ----

namespace {

constexpr int kNamed = 16;  // number 0 is sync_block's

struct Named {
  int number, threads;
  bool waits;
};

void come(const Named& named) {
  const char* const function = named.waits ? "named_sync" : "named_arrive";
  if (named.number < 1 || named.number >= kNamed) {
    fail(std::string(function) + " is given the number " + std::to_string(named.number) +
         "\naccepted is 1 to 15");
  }
  if (named.threads < kWarp || named.threads > who->threads || named.threads % kWarp != 0) {
    fail(std::string(function) + " is given " + std::to_string(named.threads) +
         " threads\naccepted is a multiple of 32 up to the block's " + std::to_string(who->threads));
  }
  NamedState& state = hopper().named[named.number];
  if (state.arrived > 0 && state.threads != named.threads) {
    fail(std::string(function) + " is given " + std::to_string(named.threads) + " threads\n" +
         place(current()) + ", others came to barrier " + std::to_string(named.number) + " with " +
         std::to_string(state.threads));
  }
  state.threads = named.threads;
  if (++state.arrived == state.threads) {
    state.arrived = 0;
    for (Thread* thread : state.waiting) set_ready(*thread);
    state.waiting.clear();
  } else if (named.waits) {
    Thread& self = current();
    self.named = named.number;
    state.waiting.push_back(&self);
    set_waiting(self, Wait::named_sync);
    give_way();
  }
}

// The lanes of a warp come together, and to the same.
void check_named(void* const* operand) {
  const Named& first = *static_cast<Named*>(operand[0]);
  for (int l = 1; l < kWarp; ++l) {
    const Named& other = *static_cast<Named*>(operand[l]);
    if (other.number != first.number || other.threads != first.threads || other.waits != first.waits) {
      fail("the lanes of a warp come to different named barriers\n" + place(current()));
    }
  }
}

void come_in_warps(Named named) {
  warp_state().fenced = false;
  if (named.waits && leaves_out(Wait::named_sync)) return;
  meet(Wait::named_barrier, &named, check_named);
  come(named);
}

}  // namespace

void named_sync(int number, int threads) { come_in_warps({number, threads, true}); }
void named_arrive(int number, int threads) { come_in_warps({number, threads, false}); }

std::string text_of_named(const Thread& thread) {
  Who* const before = who;
  who = const_cast<Thread*>(&thread);
  const NamedState& state = hopper().named[thread.named];
  const std::string text = "number " + std::to_string(thread.named) + ": " + std::to_string(state.arrived) +
                           " of " + std::to_string(state.threads) + " threads have come";
  who = before;
  return text;
}

}  // namespace fastseq::FASTSEQ_ISA
