// What hopper.h keeps, from a block's beginning to its end.
#include "hopper.h"

#include <algorithm>

namespace fastseq::FASTSEQ_ISA {
namespace {

constexpr uint32_t kFirstAddress = 1024;  // what a GPU keeps for itself lies below

std::vector<HopperBlock> blocks;

HopperBlock& state_of(const Block& block) { return blocks[&block - machine.blocks.data()]; }

}  // namespace

HopperBlock& hopper() { return state_of(*current().home); }

WarpState& warp_state() {
  HopperBlock& block = hopper();
  if (block.warps.empty()) {
    block.warps.resize(who->threads / kWarp);
    block.warpgroups.resize((who->threads + kWarpgroup - 1) / kWarpgroup);
  }
  return block.warps[current().warp->index];
}

void hopper_begin(int count) {
  blocks.clear();
  blocks.resize(count);
}

uint32_t shared_address(const void* p) {
  return uint32_t(static_cast<const unsigned char*>(p) - who->shared) + kFirstAddress;
}

bool one_lane() {
  meet(Wait::one_lane, nullptr, [](void* const*) {});
  return who->thread % kWarp == (machine.order == Order::reverse ? kWarp - 1 : 0);
}

// ---- two pictures of shared memory ----

unsigned char* seen_memory() {
  HopperBlock& block = hopper();
  if (block.seen.empty()) block.seen.resize(machine.shape.shared_bytes, 0xff);
  return block.seen.data();
}

// By words of 4 bytes, which hold whole elements.
void read_asynchronously(void* to, const void* shared, size_t bytes) {
  const auto* const stored = static_cast<const unsigned char*>(shared);
  const unsigned char* const seen = seen_memory() + (stored - who->shared);
  std::memcpy(to, stored, bytes);
  if (std::memcmp(stored, seen, bytes) == 0) return;
  for (size_t i = 0; i < bytes; i += 4) {
    if (std::memcmp(stored + i, seen + i, 4) != 0) std::memset(static_cast<unsigned char*>(to) + i, 0xff, 4);
  }
}

void write_asynchronously(void* shared, const void* from, size_t bytes) {
  std::memcpy(shared, from, bytes);
  std::memcpy(seen_memory() + (static_cast<unsigned char*>(shared) - who->shared), from, bytes);
}

void fill_asynchronously(void* shared, size_t bytes) {
  std::memset(shared, 0xff, bytes);
  std::memset(seen_memory() + (static_cast<unsigned char*>(shared) - who->shared), 0xff, bytes);
}

void fence_async() { std::memcpy(seen_memory(), who->shared, machine.shape.shared_bytes); }

// ---- what warps of a warpgroup do alike ----

namespace {

bool same(const GroupCall& x, const GroupCall& y) {
  const WgmmaCall &c = x.call, &d = y.call;
  return x.what == y.what && x.number == y.number && c.n == d.n && c.is_bfloat16 == d.is_bfloat16 &&
         c.add == d.add && c.a_in_registers == d.a_in_registers && c.major_a == d.major_a &&
         c.major_b == d.major_b && c.a == d.a && c.b == d.b;
}

}  // namespace

void check_group_call(const GroupCall& call) {
  WarpState& warp = warp_state();
  const int index = current().warp->index;
  if (index / 4 * kWarpgroup + kWarpgroup > who->threads) {
    fail(std::string(name(call.what)) + " is called by a warp that is not one of four\n" + place(current()));
  }
  Warpgroup& group = hopper().warpgroups[index / 4];
  if (warp.issued == group.calls.size()) {
    group.calls.push_back(call);
  } else if (!same(group.calls[warp.issued], call)) {
    fail("the warps of a warpgroup do not issue the same\n" + place(current()) + " came to " +
         name(call.what) + ", where another warp was at another operand or at " +
         name(group.calls[warp.issued].what));
  }
  ++warp.issued;
}

// ---- registers ----

namespace {

struct Registers {
  int count;
  bool more;
};

// What a block of so many threads has when it begins, compiled for one block on a multiprocessor; taken registers can
// only come from those.
int registers_at_launch() { return std::min(256, 64 * 1024 / who->threads / 8 * 8); }

// Of all warps, where those that have not said how many count `unsaid` a thread.
int registers_of_block(int unsaid) {
  int all = 0;
  for (const WarpState& warp : hopper().warps) all += (warp.registers ? warp.registers : unsaid) * kWarp;
  return all;
}

[[noreturn]] void fail_without_registers(int all) {
  fail("registers_take waits for registers that nobody gives up\n" + place(current()) + ": the block has " +
       std::to_string(registers_at_launch() * who->threads) + ", its warps ask for " + std::to_string(all));
}

void set_registers(void* const* operand) {
  const Registers& first = *static_cast<Registers*>(operand[0]);
  check_group_call({Wait::set_registers, first.count * 2 + first.more, {}});
  int& own = warp_state().registers;
  const int before = own ? own : registers_at_launch();
  if (before != first.count && (before < first.count) != first.more) {
    fail("registers_give makes them fewer, registers_take more\n" + place(current()) + " has " +
         std::to_string(before) + " and asks for " + std::to_string(first.count));
  }
  own = first.count;
  const int all = registers_of_block(0);
  if (all > registers_at_launch() * who->threads) fail_without_registers(all);
}

}  // namespace

void registers_become(int count, bool more) {
  Registers registers{count, more};
  meet(Wait::set_registers, &registers, set_registers);
}

// ---- the end ----

void hopper_block_exits() {
  HopperBlock& block = hopper();
  const std::string number = "block " + std::to_string(who->block);
  const int registers = registers_of_block(registers_at_launch());
  if (registers > registers_at_launch() * who->threads) fail_without_registers(registers);
  for (const PhaseState& barrier : block.barriers) {
    const std::string which =
        number + ", the barrier at byte " +
        std::to_string(reinterpret_cast<const unsigned char*>(barrier.own) - who->shared);
    if (!barrier.loads.empty()) fail("a block exited while a load was under way\n" + which);
    if (barrier.left != barrier.arrivals || barrier.bytes_left != 0) {
      fail("a block exited in the middle of a barrier's phase\n" + which + ": " +
           std::to_string(barrier.arrivals - barrier.left) + " of " + std::to_string(barrier.arrivals) +
           " arrivals, " + std::to_string(barrier.bytes_left) + " bytes missing");
    }
  }
  for (size_t w = 0; w < block.warps.size(); ++w) {
    if (!block.warps[w].products.empty()) {
      fail("a block exited while a wgmma was under way\n" + number + " warp " + std::to_string(w));
    }
    if (block.warps[w].issued != block.warpgroups[w / 4].calls.size()) {
      fail("the warps of a warpgroup do not issue the same\n" + number + " warp " + std::to_string(w) +
           " made " + std::to_string(block.warps[w].issued) + " of " +
           std::to_string(block.warpgroups[w / 4].calls.size()) + " calls");
    }
  }
}

}  // namespace fastseq::FASTSEQ_ISA
