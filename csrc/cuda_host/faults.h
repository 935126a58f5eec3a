// Kernels with a fault planted in them, each beside its correct self: what the host twin must find.
#pragma once

#include <string>
#include <vector>

namespace fastseq::FASTSEQ_ISA {

std::vector<std::string> fault_names();

// One number of each thread; `error` is that of the launch, or empty.
struct FaultResult {
  std::vector<float> values;
  std::string error;
};
FaultResult run_fault(const std::string& name, bool faulty);

// The same for the primitives of prim_hopper.h.
std::vector<std::string> hopper_fault_names();
FaultResult run_hopper_fault(const std::string& name, bool faulty);

}  // namespace fastseq::FASTSEQ_ISA
