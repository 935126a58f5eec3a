// Kernels that do what one of prim_hopper.h's primitives does and no more, for tests on a GPU and on the host twin.
#pragma once

#include <cstdint>
#include <string>

namespace fastseq::FASTSEQ_ISA {

// Names, and what of this they use, are beside the kernels, in hopper_primitives.cu and hopper_products.cu.
struct HopperTest {
  const void* from[3];
  void* to;
  int64_t number[20];
  int device;
  void* stream;
};

// Null, or what is wrong.
const char* run_hopper_primitive(const std::string& name, const HopperTest& test);
const char* run_hopper_product(const std::string& name, const HopperTest& test);

}  // namespace fastseq::FASTSEQ_ISA
