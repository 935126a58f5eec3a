// What is said of a kernel that did something wrong.
#include <cxxabi.h>

#include <algorithm>
#include <cstdlib>

#include "hopper.h"

namespace fastseq::FASTSEQ_ISA {
namespace {

std::string where(const Thread& thread) {
  switch (thread.wait) {
    case Wait::exit:
      return "has exited";
    case Wait::wait_flag:
      return "waits at wait_flag for " + std::to_string(thread.flag_value) + ", the flag is " +
             std::to_string(*thread.flag);
    case Wait::arrivals_wait:
      return "waits at arrivals_wait for " + std::to_string(bytes_missing(thread)) + " bytes more";
    case Wait::barrier_wait:
      return "waits at barrier_wait " + text_of_barrier(thread);
    case Wait::named_sync:
      return "waits at named_sync " + text_of_named(thread);
    default:
      return std::string("waits at ") + name(thread.wait);
  }
}

// The threads that `waiting` waits for, itself among them.
struct Company {
  Thread *first, *last;
};
Company company(const Thread& waiting) {
  const Block& block = *waiting.home;
  Thread *first = waiting.warp->thread, *last = first + kWarp;
  if (waiting.wait >= Wait::sync_block) first = block.warp->thread, last = first + waiting.threads;
  if (waiting.wait >= Wait::cluster_wait) {
    first = block.cluster->block->warp->thread;
    last = first + machine.shape.cluster * waiting.threads;
  }
  return {first, last};
}

bool is_missing(const Thread& thread, const Thread& waiting) {
  return waiting.wait == Wait::cluster_wait ? !thread.cluster_arrived : thread.wait != waiting.wait;
}

// What the threads of a block wait for, where that is something else than the thread before waits for.
std::string text_of_block(const Thread& waiting) {
  constexpr int kMostLines = 12;
  std::string text, before;
  const Thread* const first = waiting.home->warp->thread;
  int lines = 0;
  for (int t = 0; t < waiting.threads && lines < kMostLines; ++t) {
    const std::string here = where(first[t]);
    if (here != before) text += "\n" + place(first[t]) + " " + here, ++lines;
    before = here;
  }
  return text;
}

std::string text_of_flag(const Thread& waiting, int blocks_to_go) {
  std::string text = "wait_flag waits for what nobody sets\n" + place(waiting) + " " + where(waiting);
  if (blocks_to_go > 0) {
    text += "\n" + std::to_string(blocks_to_go) +
            " blocks have not begun; those that wait for each other have to run together";
  }
  return text;
}

}  // namespace

const char* name(Wait wait) {
  constexpr const char* kNames[] = {"nothing",
                                    "sync_warp",
                                    "shuffle_xor",
                                    "any_in_warp",
                                    "load_matrices",
                                    "load_matrices_transposed",
                                    "mma of bfloat16",
                                    "mma of float16",
                                    "mma of float",
                                    "mma of double",
                                    "wgmma",
                                    "wgmma_fence",
                                    "wgmma_commit",
                                    "wgmma_wait",
                                    "registers_give or registers_take",
                                    "one_lane",
                                    "named_sync or named_arrive",
                                    "sync_block",
                                    "barrier_wait",
                                    "named_sync",
                                    "wgmma_wait, for other warps",
                                    "cluster_wait",
                                    "arrivals_wait",
                                    "wait_flag",
                                    "exit"};
  return kNames[int(wait)];
}

std::string kernel_name() {
  const char* mangled = machine.kernel->name->name();
  char* plain = abi::__cxa_demangle(mangled, nullptr, nullptr, nullptr);
  const std::string name = plain ? plain : mangled;
  std::free(plain);
  return name;
}

std::string place(const Thread& thread) {
  return "block " + std::to_string(thread.block) + " thread " + std::to_string(thread.thread);
}

// The narrowest meeting that fails is nearest to the cause: a lane that is missing in its warp keeps the whole
// block waiting elsewhere. Wait is in that order.
std::string text_of_deadlock(int blocks_to_go) {
  Thread *begin = machine.threads.data(), *end = begin + machine.blocks.size() * machine.shape.threads;
  Thread* waiting = std::min_element(begin, end, [](const Thread& a, const Thread& b) {
    const auto width = [](Wait w) { return w < Wait::sync_block ? 0 : int(w); };
    return width(a.wait) < width(b.wait);
  });
  if (waiting->wait == Wait::wait_flag) return text_of_flag(*waiting, blocks_to_go);
  if (waiting->wait == Wait::arrivals_wait) {
    return "arrivals_wait waits for what nobody sends\n" + place(*waiting) + " " + where(*waiting);
  }
  if (waiting->wait == Wait::barrier_wait) {
    return "barrier_wait waits for a phase that is never complete" + text_of_block(*waiting);
  }
  if (waiting->wait == Wait::named_sync) {
    return "named_sync waits for threads that never come" + text_of_block(*waiting);
  }
  if (waiting->wait == Wait::wgmma_others) {
    return "wgmma_wait waits for products that other warps do not issue" + text_of_block(*waiting);
  }
  const Company all = company(*waiting);
  const Thread* missing =
      std::find_if(all.first, all.last, [&](const Thread& t) { return is_missing(t, *waiting); });
  if (missing->wait == Wait::wait_flag) return text_of_flag(*missing, blocks_to_go);
  return std::string(name(waiting->wait)) + " is not reached by all threads\n" + place(*waiting) +
         " waits there, " + place(*missing) + " " + where(*missing);
}

}  // namespace fastseq::FASTSEQ_ISA
