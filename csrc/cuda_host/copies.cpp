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

void copy_async_or_zero(void* shared, const void* global, int bytes) {
  check_alignment(shared, 16, "copy_async");
  check_own_shared(shared, 16, "copy_async");
  if (bytes < 0 || bytes > 16)
    fail("copy_async is given " + std::to_string(bytes) + " bytes\n" + place(current()));
  if (bytes > 0) check_alignment(global, 16, "copy_async");
  Thread& self = current();
  Copy copy{static_cast<unsigned char*>(shared),
            static_cast<const unsigned char*>(global),
            {},
            false,
            self.copy_group,
            bytes};
  if (bytes > 0) std::memcpy(&copy.early, global, bytes);
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
    const auto* const from =
        copy.is_early ? reinterpret_cast<const unsigned char*>(&copy.early) : copy.global;
    if (copy.bytes > 0) std::memcpy(copy.shared, from, copy.bytes);
    std::memset(copy.shared + copy.bytes, 0, 16 - copy.bytes);
    ++self.copies_done;
  }
  self.copies.clear();
  self.copies_done = 0;
}

}  // namespace fastseq::FASTSEQ_ISA
