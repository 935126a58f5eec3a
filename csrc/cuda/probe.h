// Whether this build's kernels can run on the devices of this machine. Host code; no CUDA header needed.
#pragma once

namespace fastseq {

// How many CUDA devices the driver shows; 0 where there is none, nor a driver.
int cuda_device_count();

// The architecture of the kernel image that `device` would run (80, 90, ...); 0 if this build has none for
// it. Starts nothing on the device, but creates its context.
int cuda_kernel_architecture(int device);

}  // namespace fastseq
