#include <cstdlib>

#include "machine.h"
#include "sanitize.h"

namespace fastseq::FASTSEQ_ISA {
namespace {

constexpr size_t kAlignment = 1024;  // for tiles
constexpr unsigned char kGuard = 0xa5, kUnwritten = 0xff;

bool all_bytes(const unsigned char* p, size_t bytes, unsigned char value) {
  return bytes == 0 || (*p == value && std::memcmp(p, p + 1, bytes - 1) == 0);
}

}  // namespace

// The upper guard begins at the first byte beyond the memory.
size_t SharedMemory::upper_guard() const {
  return (bytes_ + kAlignment - 1) / kAlignment * kAlignment - bytes_ + kGuardBytes;
}
size_t SharedMemory::step() const { return kGuardBytes + bytes_ + upper_guard(); }

bool SharedMemory::reserve(int blocks, size_t bytes_each) {
  bytes_ = bytes_each;
  const size_t needed = blocks * step();
  if (needed > capacity_) {
    if (arena_) unpoison(arena_, capacity_);
    std::free(arena_);
    arena_ = static_cast<unsigned char*>(std::aligned_alloc(kAlignment, needed));
    capacity_ = arena_ ? needed : 0;
  }
  if (arena_) poison(arena_, capacity_);
  return arena_ != nullptr;
}

void SharedMemory::begin(int slot) {
  unsigned char* memory = of(slot);
  if constexpr (kSanitized) {
    unpoison(memory, bytes_);
  } else {
    std::memset(memory - kGuardBytes, kGuard, kGuardBytes);
    std::memset(memory + bytes_, kGuard, upper_guard());
  }
  std::memset(memory, kUnwritten, bytes_);
}

bool SharedMemory::guards_whole(int slot) const {
  const unsigned char* memory = of(slot);
  return kSanitized || (all_bytes(memory - kGuardBytes, kGuardBytes, kGuard) &&
                        all_bytes(memory + bytes_, upper_guard(), kGuard));
}

void SharedMemory::end(int slot) {
  if constexpr (kSanitized) {
    poison(of(slot), bytes_);
  } else {
    std::memset(of(slot), kUnwritten, bytes_);
  }
}

bool SharedMemory::untouched(int slot) const { return kSanitized || all_bytes(of(slot), bytes_, kUnwritten); }

}  // namespace fastseq::FASTSEQ_ISA
