// What the CUDA side of the build can say of this machine. Host code; no CUDA header needed.
#pragma once

#include "plan.h"

namespace fastseq {

// How many CUDA devices the driver shows; 0 where there is none, nor a driver.
int cuda_device_count();

// Null, or what the CUDA runtime says is wrong.
const char* cuda_device_facts(int device, DeviceFacts& facts);

}  // namespace fastseq
