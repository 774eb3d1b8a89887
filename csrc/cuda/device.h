// What the CUDA room knows of the machine: its GPUs, as far as a plan for a kernel depends on them. Host code may
// include this without CUDA's headers.
#pragma once

#include <stdint.h>

namespace frnn {

struct CudaDevice {
  char name[256];
  int major, minor;  // compute capability
  int multiprocessors;
  int64_t shared_memory_per_block;  // bytes, the most that a kernel may ask for
  int64_t l2_bytes;
  int64_t memory_bytes;
};

// Number of GPUs that this process can use. 0 where there is none, or no driver: never an error.
int cuda_device_count();

// Of the CUDA runtime in this library, 13000 for 13.0: with a driver that is too old for it there is no GPU.
int cuda_runtime_version();

// Fills `device`; returns null, or what CUDA says is wrong.
const char* cuda_device(int index, CudaDevice* device);

}  // namespace frnn
