#include "fibers.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <vector>

#include "sanitize.h"
#include "switch_stack.h"

namespace fastseq::FASTSEQ_ISA {
namespace {

// Instrumented code has larger frames.
constexpr size_t kStackBytes = (kSanitized ? 256 : 64) * 1024;

// Stacks are made by the chunk. All would begin at the same place of a page, so that the innermost frames of a
// block's threads fell into the same few sets of the first-level cache; each begins some lines below the last.
constexpr int kChunk = 64, kColours = 32;
constexpr size_t kColourBytes = 128;

std::vector<unsigned char*> chunks;
Fiber* last;  // who has switched most recently

size_t page_bytes() {
  static const size_t bytes = size_t(sysconf(_SC_PAGESIZE));
  return bytes;
}

unsigned char* stack_of(int index) {
  return chunks[index / kChunk] + (index % kChunk) * (kStackBytes + page_bytes()) + page_bytes();
}

// AddressSanitizer tells the code that runs after a switch where the stack before it was.
void arrived(Fiber* here) {
  finish_switch(here ? here->fake_stack : nullptr, &last->stack, &last->stack_bytes);
}

}  // namespace

bool have_stacks(int count) {
  const size_t step = kStackBytes + page_bytes();
  while (int(chunks.size()) * kChunk < count) {
    void* memory = mmap(nullptr, kChunk * step, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return false;
    auto* bytes = static_cast<unsigned char*>(memory);
    for (int i = 0; i < kChunk; ++i) {
      if (mprotect(bytes + i * step, page_bytes(), PROT_NONE) != 0) {
        munmap(memory, kChunk * step);
        return false;
      }
    }
    chunks.push_back(bytes);
  }
  return true;
}

void make_fiber(Fiber& fiber, int index, void (*body)()) {
  unsigned char* stack = stack_of(index);
  unpoison(stack, kStackBytes);  // an abandoned fiber leaves its frames as they were
  const size_t bytes = kStackBytes - index % kColours * kColourBytes;
  fiber = {first_frame(stack, bytes, body), stack, kStackBytes, nullptr};
}

void switch_fiber(Fiber& from, Fiber& to) {
  last = &from;
  start_switch(&from.fake_stack, to.stack, to.stack_bytes);
  fastseq_switch_stack(&from.suspended, to.suspended);
  arrived(&from);
}

void leave_fiber(Fiber& from, Fiber& to) {
  last = &from;
  start_switch(nullptr, to.stack, to.stack_bytes);
  fastseq_switch_stack(&from.suspended, to.suspended);
  std::abort();
}

void fiber_entered() { arrived(nullptr); }

}  // namespace fastseq::FASTSEQ_ISA
