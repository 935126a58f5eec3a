// What AddressSanitizer is told: which memory nobody may touch, and which stack the code is on. Nothing is told,
// and nothing costs anything, in a build without it.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(FASTSEQ_SANITIZE)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace fastseq::FASTSEQ_ISA {

#if defined(FASTSEQ_SANITIZE)
constexpr bool kSanitized = true;
inline void poison(const void* memory, size_t bytes) { __asan_poison_memory_region(memory, bytes); }
inline void unpoison(const void* memory, size_t bytes) { __asan_unpoison_memory_region(memory, bytes); }
inline void start_switch(void** fake_stack, const void* stack, size_t bytes) {
  __sanitizer_start_switch_fiber(fake_stack, stack, bytes);
}
inline void finish_switch(void* fake_stack, const void** stack_before, size_t* bytes_before) {
  __sanitizer_finish_switch_fiber(fake_stack, stack_before, bytes_before);
}
#else
constexpr bool kSanitized = false;
inline void poison(const void*, size_t) {}
inline void unpoison(const void*, size_t) {}
inline void start_switch(void**, const void*, size_t) {}
inline void finish_switch(void*, const void**, size_t*) {}
#endif

}  // namespace fastseq::FASTSEQ_ISA
