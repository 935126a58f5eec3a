#include "team.h"

#include <omp.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>

#include <climits>
#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastseq {
namespace {

bool g_forked = false;
const int g_fork_handler = pthread_atfork(nullptr, nullptr, [] { g_forked = true; });

inline void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void sleep_while_equal(std::atomic<uint32_t>& word, uint32_t value) {
#if defined(__linux__)
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
#else
  (void)word, (void)value;
  sched_yield();
#endif
}

void wake_all(std::atomic<uint32_t>& word) {
#if defined(__linux__)
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
#else
  (void)word;
#endif
}

constexpr int kSpins = 2000;  // of some 40 cycles each: 20 us, several steps of a small network
constexpr size_t kLargePage = size_t(1) << 21;

}  // namespace

int available_threads(int requested) {
  (void)g_fork_handler;
  if (g_forked || requested <= 1 || omp_in_parallel() || omp_get_dynamic()) return 1;
  const int limit = omp_get_thread_limit();
  return requested < limit ? requested : limit;
}

void run_team(int threads, void (*body)(void*, int), void* context) {
  if (threads <= 1) {
    body(context, 0);
    return;
  }
#pragma omp parallel num_threads(threads)
  body(context, omp_get_thread_num());
}

void Barrier::wait_for_all() {
  const uint32_t generation = generation_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
    arrived_.store(0, std::memory_order_relaxed);
    generation_.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) wake_all(generation_);
    return;
  }
  for (int i = 0; i < kSpins; ++i) {
    if (generation_.load(std::memory_order_acquire) != generation) return;
    pause_briefly();
  }
  sleepers_.fetch_add(1, std::memory_order_seq_cst);
  while (generation_.load(std::memory_order_seq_cst) == generation) sleep_while_equal(generation_, generation);
  sleepers_.fetch_sub(1, std::memory_order_relaxed);
}

void* scratch_allocate(size_t bytes) {
  const bool large = bytes >= 2 * kLargePage;
  void* memory = nullptr;
  if (posix_memalign(&memory, large ? kLargePage : 64, bytes ? bytes : 64) != 0) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  if (large) madvise(memory, bytes / kLargePage * kLargePage, MADV_HUGEPAGE);
#endif
  return memory;
}

void scratch_free(void* memory) { std::free(memory); }

Arena::~Arena() { scratch_free(base_); }

void Arena::allocate() {
  base_ = static_cast<char*>(scratch_allocate(used_));
  used_ = 0;
}

}  // namespace fastseq
