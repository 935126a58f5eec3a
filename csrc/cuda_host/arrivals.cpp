// Messages between the blocks of a cluster. None is there before the receiver's phase is complete, and its place is
// 0xFF from the moment of sending: who reads too early, or still reads what it overwrites, gets NaN.
#include <algorithm>

#include "machine.h"

namespace fastseq::FASTSEQ_ISA {
namespace {

ArrivalsState& state_of(Arrivals* arrivals, const char* function) {
  if (arrivals->word >= machine.arrivals.size() || machine.arrivals[arrivals->word].own != arrivals) {
    fail(std::string(function) + " is given Arrivals that have not begun\n" + place(current()));
  }
  return machine.arrivals[arrivals->word];
}

void end_phase_if_complete(ArrivalsState& state) {
  if (!state.expects || state.bytes_left != 0) return;
  for (const Message& m : state.messages) std::memcpy(m.to, &m.value, m.bytes);
  state.messages.clear();
  state.expects = false;
  state.phase ^= 1;
  for (Thread* thread : state.waiting) set_ready(*thread);
  state.waiting.clear();
}

}  // namespace

void arrivals_begin(Arrivals* own) {
  check_alignment(own, sizeof(Arrivals), "arrivals_begin");
  check_own_shared(own, sizeof(Arrivals), "arrivals_begin");
  own->word = machine.arrivals.size();
  machine.arrivals.push_back({own, 0, false, 0, {}, {}});
}

void arrivals_expect(Arrivals* own, int bytes) {
  check_own_shared(own, sizeof(Arrivals), "arrivals_expect");
  ArrivalsState& state = state_of(own, "arrivals_expect");
  if (state.expects) fail("second arrivals_expect of one phase\n" + place(current()));
  state.expects = true;
  state.bytes_left += bytes;
  end_phase_if_complete(state);
}

void arrivals_wait(Arrivals* own, int phase) {
  check_own_shared(own, sizeof(Arrivals), "arrivals_wait");
  ArrivalsState& state = state_of(own, "arrivals_wait");
  if (leaves_out(Wait::arrivals_wait) || state.phase != phase) return;
  Thread& self = current();
  self.arrivals = own;
  state.waiting.push_back(&self);
  set_waiting(self, Wait::arrivals_wait);
  give_way();
}

void send_bytes(void* to, const void* value, int bytes, Arrivals* arrivals, int rank) {
  check_alignment(to, bytes, "send");
  check_own_shared(to, bytes, "send");
  Message message{static_cast<unsigned char*>(cluster_map_address(to, rank)), {}, bytes};
  if (current().home->cluster->block[rank].exited == who->threads) {
    fail("send to a block that has exited\n" + place(current()));
  }
  std::memcpy(&message.value, value, bytes);
  std::memset(message.to, 0xff, bytes);
  ArrivalsState& state = state_of(static_cast<Arrivals*>(cluster_map_address(arrivals, rank)), "send");
  state.messages.push_back(message);
  state.bytes_left -= bytes;
  end_phase_if_complete(state);
}

int64_t bytes_missing(const Thread& thread) { return state_of(thread.arrivals, "arrivals_wait").bytes_left; }

}  // namespace fastseq::FASTSEQ_ISA
