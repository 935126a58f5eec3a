// The switch of stacks, by hand where the registers are known here, by ucontext (which asks the system to keep the
// signal mask, about a microsecond) elsewhere.
//
//   fastseq_switch_stack(&saved, other)   suspends the code that calls it, leaves in `saved` what resumes it, and
//                                         resumes `other`
//   first_frame(stack, bytes, body)       what resumes code that has not begun: the call of body() on that stack
//
// By hand: the registers that a function must preserve go onto the stack, and the suspended code is known by its
// stack pointer. Nobody here changes rounding modes, so the control words stay as they are.
#include "switch_stack.h"

#if defined(__x86_64__) && defined(__linux__) && !defined(FASTSEQ_UCONTEXT)

asm(R"(
  .pushsection .text
  .p2align 4
  .hidden fastseq_switch_stack
  .globl fastseq_switch_stack
  .type fastseq_switch_stack, @function
fastseq_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size fastseq_switch_stack, .-fastseq_switch_stack
  .popsection
)");

// From the lowest: r15, r14, r13, r12, rbx, rbp (zero, where debuggers stop), body, its return address (none). A
// function begins with a stack pointer 8 below a multiple of 16.
void* fastseq::FASTSEQ_ISA::first_frame(unsigned char* stack, size_t bytes, void (*body)()) {
  void** frame = reinterpret_cast<void**>(stack + bytes) - 8;
  for (int i = 0; i < 8; ++i) frame[i] = nullptr;
  frame[6] = reinterpret_cast<void*>(body);
  return frame;
}

#elif defined(__aarch64__) && defined(__linux__) && !defined(FASTSEQ_UCONTEXT)

asm(R"(
  .pushsection .text
  .p2align 4
  .hidden fastseq_switch_stack
  .globl fastseq_switch_stack
  .type fastseq_switch_stack, %function
fastseq_switch_stack:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
  .size fastseq_switch_stack, .-fastseq_switch_stack
  .popsection
)");

// x19 to x28, x29 (zero, where debuggers stop), x30 (the body, where `ret` goes), d8 to d15.
void* fastseq::FASTSEQ_ISA::first_frame(unsigned char* stack, size_t bytes, void (*body)()) {
  void** frame = reinterpret_cast<void**>(stack + bytes) - 20;
  for (int i = 0; i < 20; ++i) frame[i] = nullptr;
  frame[11] = reinterpret_cast<void*>(body);
  return frame;
}

#else

#include <ucontext.h>

#include <new>

// The saved context lies on the stack that it belongs to.
extern "C" void fastseq_switch_stack(void** saved, void* other) {
  ucontext_t here;
  *saved = &here;
  swapcontext(&here, static_cast<ucontext_t*>(other));
}

void* fastseq::FASTSEQ_ISA::first_frame(unsigned char* stack, size_t bytes, void (*body)()) {
  bytes = (bytes - sizeof(ucontext_t)) / 64 * 64;
  auto* context = new (stack + bytes) ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = bytes;
  context->uc_link = nullptr;
  makecontext(context, body, 0);
  return context;
}

#endif
