// Threads, their barrier, and scratch memory: what the engines need of the operating system.
//
// Defined in team.cpp, which is compiled once for the baseline instruction set.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace fastseq {

// How many threads a team may have here: `requested`, or one inside a parallel region and in a forked child,
// where OpenMP's pool does not exist.
int available_threads(int requested);

// Calls body(context, thread) for thread = 0 .. threads - 1, at the same time. False, and nothing was called, if
// OpenMP gave fewer threads: the bodies wait for each other, so some of them are no use.
bool run_team(int threads, void (*body)(void* context, int thread), void* context);

// The same for bodies that take their share of some work and do not wait for each other: one thread does all of it if
// OpenMP gave fewer.
inline void share_work(int threads, void (*body)(void* context, int thread), void* context) {
  if (!run_team(threads, body, context)) body(context, 0);
}

// All threads of a group leave wait() after the last has entered. Each has a flag on a cache line of its own,
// so that meeting costs one transfer of a line between cores. Spins for some microseconds, then sleeps: with
// another program on the cores a thread that spins on would keep its partner off the core that it waits for.
class Barrier {
 public:
  struct alignas(64) Flag {
    std::atomic<uint32_t> meetings{0};
  };

  // flags: one for each thread of the group.
  Barrier(int threads, Flag* flags) : threads_(threads), flags_(flags) {}
  void wait(int thread) {
    if (threads_ > 1) wait_for_all(thread);
  }

 private:
  void wait_for_all(int thread);
  bool all_reached(uint32_t meeting) const;

  const int threads_;
  Flag* const flags_;
  alignas(64) std::atomic<int> sleepers_{0};
  std::atomic<uint32_t> alarm_{0};  // changes when sleepers should look again
};

// Scratch memory, aligned to 64 bytes, on large pages where that pays. Throws std::bad_alloc. The process keeps one
// block, of 64 MB at most, from one call to the next.
void* scratch_allocate(size_t bytes);
void scratch_free(void* memory);

// Says that memory, if it is much and fresh, should come in large pages: each first touch costs the kernel
// less.
void advise_large_pages(void* memory, size_t bytes);

// Lays buffers out in one block: once with no memory to learn the size, once more to place them.
class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena();

  // After all buffers were taken once: allocates, and starts again from the beginning.
  void allocate();

  template <class T>
  T* take(int64_t count) {
    return static_cast<T*>(take_bytes(size_t(count) * sizeof(T)));
  }

 private:
  // Under AddressSanitizer with a poisoned gap behind each buffer, so that it sees an overrun into the next one.
  void* take_bytes(size_t bytes);

  char* base_ = nullptr;
  size_t used_ = 0;
};

}  // namespace fastseq
