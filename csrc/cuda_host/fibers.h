// Fibers: functions with stacks of their own, all on one operating system thread, that run until they switch to
// another. A switch saves a few registers and takes some nanoseconds; the system is not asked.
#pragma once

#include <cstddef>

#ifndef FASTSEQ_ISA
#error "compiled once per instruction set: FASTSEQ_ISA names it"
#endif

namespace fastseq::FASTSEQ_ISA {

// Suspended code. What calls the first switch_fiber() is one too: its Fiber is filled in by that switch.
struct Fiber {
  void* suspended = nullptr;    // what resumes it
  const void* stack = nullptr;  // lowest address
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
};

// Stacks with a guard page below each, kept for the next launch; memory is taken page by page, as they are used.
// False where the system gives no more.
constexpr int kMostFibers = 24 * 1024;  // Linux allows 65530 mappings, and each stack takes two
bool have_stacks(int count);

// Fiber number `index` will call body(), which must not return, at the first switch to it.
void make_fiber(Fiber& fiber, int index, void (*body)());

// Suspends the code that calls it, which `from` stands for, and goes on with `to`.
void switch_fiber(Fiber& from, Fiber& to);
// The same for the last time: `from` will not be resumed.
[[noreturn]] void leave_fiber(Fiber& from, Fiber& to);
// The first that a fiber's body has to do.
void fiber_entered();

}  // namespace fastseq::FASTSEQ_ISA
