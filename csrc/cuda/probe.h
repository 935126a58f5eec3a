// What the CUDA side of the build can say of this machine. Host code; no CUDA header needed.
#pragma once

namespace fastseq {

// How many CUDA devices the driver shows; 0 where there is none, nor a driver.
int cuda_device_count();

}  // namespace fastseq
