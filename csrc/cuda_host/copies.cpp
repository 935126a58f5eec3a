// Addresses that are checked, and copies that arrive late.
#include "machine.h"

namespace fastseq::FASTSEQ_ISA {

void check_alignment(const void* p, size_t bytes, const char* function) {
  if (reinterpret_cast<uintptr_t>(p) % bytes == 0) return;
  fail(std::string(function) + " is given an address that is not a multiple of " + std::to_string(bytes) +
       "\n" + place(current()));
}

void check_own_shared(const void* p, size_t bytes, const char* function) {
  const auto offset = reinterpret_cast<intptr_t>(p) - reinterpret_cast<intptr_t>(who->shared);
  const auto last = intptr_t(machine.shape.shared_bytes) - intptr_t(bytes);
  if (offset >= 0 && offset <= last) return;
  fail(std::string(function) + " is given an address outside the block's own shared memory\n" +
       place(current()) + ": " + std::to_string(offset) + " bytes from the beginning of " +
       std::to_string(machine.shape.shared_bytes));
}

void copy_async(void* shared, const void* global) {
  check_alignment(shared, 16, "copy_async");
  check_alignment(global, 16, "copy_async");
  check_own_shared(shared, 16, "copy_async");
  Thread& self = current();
  Copy copy{static_cast<unsigned char*>(shared),
            static_cast<const unsigned char*>(global),
            {},
            false,
            self.copy_group};
  std::memcpy(&copy.early, global, 16);
  copy.is_early = coin();
  std::memset(shared, 0xff, 16);
  self.copies.push_back(copy);
}

void copy_async_commit() { ++current().copy_group; }

void copy_async_wait_for(int pending) {
  Thread& self = current();
  while (self.copies_done < self.copies.size()) {
    const Copy& copy = self.copies[self.copies_done];
    if (copy.group + pending >= self.copy_group) return;
    std::memcpy(copy.shared,
                copy.is_early ? reinterpret_cast<const unsigned char*>(&copy.early) : copy.global, 16);
    ++self.copies_done;
  }
  self.copies.clear();
  self.copies_done = 0;
}

}  // namespace fastseq::FASTSEQ_ISA
