#include "team.h"

#include <omp.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>

#if defined(FASTSEQ_SANITIZE)
#include <sanitizer/asan_interface.h>
constexpr size_t kArenaGap = 64, kMostKept = 0;  // poisoned gaps; what is freed stays freed
#else
#define ASAN_POISON_MEMORY_REGION(memory, size)
constexpr size_t kArenaGap = 0, kMostKept = size_t(64) << 20;
#endif

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

constexpr int kEagerSpins = 100;  // a partner of equal work is hardly ever later
constexpr int kSpins = 1500;      // of some 50 cycles each: 20 us, several steps of a small network
constexpr size_t kLargePage = size_t(1) << 21;

// The block of scratch that was freed last is kept for the next call, which then need not wait for the system to
// clear its pages: 4 % of a short call with large weights.
struct alignas(64) Block {
  size_t bytes;  // behind this header
};
std::atomic<Block*> g_kept{nullptr};

}  // namespace

int available_threads(int requested) {
  (void)g_fork_handler;
  if (g_forked || requested <= 1 || omp_in_parallel()) return 1;
  const int limit = omp_get_thread_limit();
  return requested < limit ? requested : limit;
}

bool run_team(int threads, void (*body)(void*, int), void* context) {
  if (threads <= 1) {
    body(context, 0);
    return true;
  }
  bool complete = false;
#pragma omp parallel num_threads(threads) shared(complete)
  if (omp_get_num_threads() == threads) {
    if (omp_get_thread_num() == 0) complete = true;
    body(context, omp_get_thread_num());
  }
  return complete;
}

bool Barrier::all_reached(uint32_t meeting) const {
  for (int i = 0; i < threads_; ++i) {
    // Nobody is more than one meeting ahead, so the difference is 0 or 1 beyond any overflow.
    if (flags_[i].meetings.load(std::memory_order_seq_cst) - meeting > 1) return false;
  }
  return true;
}

void Barrier::wait_for_all(int thread) {
  const uint32_t meeting = flags_[thread].meetings.load(std::memory_order_relaxed) + 1;
  flags_[thread].meetings.store(meeting, std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst) > 0) {
    alarm_.fetch_add(1, std::memory_order_seq_cst);
    wake_all(alarm_);
  }
  for (int i = 0; i < kSpins; ++i) {
    if (all_reached(meeting)) return;
    if (i > kEagerSpins) pause_briefly();
  }
  sleepers_.fetch_add(1, std::memory_order_seq_cst);
  for (;;) {
    const uint32_t alarm = alarm_.load(std::memory_order_seq_cst);
    if (all_reached(meeting)) break;
    sleep_while_equal(alarm_, alarm);
  }
  sleepers_.fetch_sub(1, std::memory_order_seq_cst);
}

void* scratch_allocate(size_t bytes) {
  Block* block = g_kept.exchange(nullptr);
  if (block && (block->bytes < bytes || block->bytes / 4 > bytes + kLargePage)) {
    std::free(block);
    block = nullptr;
  }
  if (!block) {
    void* memory = nullptr;
    const size_t all = sizeof(Block) + bytes, alignment = all >= 2 * kLargePage ? kLargePage : alignof(Block);
    if (posix_memalign(&memory, alignment, all) != 0) throw std::bad_alloc();
    advise_large_pages(memory, all);
    block = new (memory) Block{bytes};
  }
  return block + 1;
}

void scratch_free(void* memory) {
  if (!memory) return;
  Block* const block = static_cast<Block*>(memory) - 1;
  std::free(block->bytes <= kMostKept ? g_kept.exchange(block) : block);
}

void advise_large_pages(void* memory, size_t bytes) {
#if defined(MADV_HUGEPAGE)
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kLargePage - 1) / kLargePage * kLargePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / kLargePage * kLargePage;
  if (memory && begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

Arena::~Arena() { scratch_free(base_); }

void Arena::allocate() {
  base_ = static_cast<char*>(scratch_allocate(used_));
  used_ = 0;
}

void* Arena::take_bytes(size_t bytes) {
  constexpr size_t kLine = 64;
  char* const at = base_ ? base_ + used_ : nullptr;
  if (at) {
    ASAN_POISON_MEMORY_REGION(at + bytes, kArenaGap);
  }
  used_ += (bytes + kArenaGap + kLine - 1) / kLine * kLine;
  return at;
}

}  // namespace fastseq
