// See switch_stack.cpp.
#pragma once

#include <cstddef>

extern "C" void fastseq_switch_stack(void** saved, void* other);

namespace fastseq::FASTSEQ_ISA {

void* first_frame(unsigned char* stack, size_t bytes, void (*body)());

}  // namespace fastseq::FASTSEQ_ISA
