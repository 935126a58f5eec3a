// Starting kernels on the CPU: the names and meanings of csrc/cuda/launch.h. A launch returns when the kernel is
// done; launches from several threads of the process run one after another.
#pragma once

#include <prim.h>

#include <cstring>
#include <type_traits>
#include <typeinfo>

namespace fastseq::FASTSEQ_ISA {

// In which order threads that could all go on are resumed, and clusters that do not run together: a kernel gives
// the same bits with each. The order stays set until the next call.
//   forward   the first thread goes on for as long as it can, then the second
//   reverse   the last one does
//   random    any, other ones with each seed
enum class Order { forward, reverse, random };
void set_schedule(Order order, uint64_t seed);

struct AnyKernel {
  void (*run)(const void* args);
  const std::type_info* name;
  int most_threads;
};
const char* launch_any(const LaunchShape& shape, const AnyKernel& kernel, const void* args);

// Null, or what is wrong: with the shape, or with what the kernel did. The text is the thread's until its next launch.
template <class Kernel>
const char* launch(const LaunchShape& shape, const typename Kernel::Args& args) {
  using Args = typename Kernel::Args;
  static_assert(sizeof(Args) <= 4096, "parameters of a kernel on sm_80");
  static_assert(std::is_trivially_copyable_v<Args>, "they are copied to the GPU byte by byte");
  const auto run = [](const void* any) { Kernel::run(*static_cast<const Args*>(any)); };
  return launch_any(shape, {run, &typeid(Kernel), Kernel::kThreads}, &args);
}

inline const char* fill_zero(void* memory, size_t bytes, void*) {
  std::memset(memory, 0, bytes);
  return nullptr;
}

class DeviceGuard {
 public:
  explicit DeviceGuard(int) {}
  DeviceGuard(const DeviceGuard&) = delete;
};

}  // namespace fastseq::FASTSEQ_ISA
