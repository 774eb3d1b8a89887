// See device.h.
#include "device.h"

#include <cuda_runtime.h>
#include <string.h>

namespace frnn {

int cuda_device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();  // no driver is not an error that a later call should report
  return 0;
}

int cuda_runtime_version() { return CUDART_VERSION; }

const char* cuda_device(int index, CudaDevice* device) {
  cudaDeviceProp properties;
  const cudaError_t error = cudaGetDeviceProperties(&properties, index);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return cudaGetErrorString(error);
  }
  static_assert(sizeof device->name == sizeof properties.name, "the name is copied whole");
  memcpy(device->name, properties.name, sizeof device->name);
  device->major = properties.major;
  device->minor = properties.minor;
  device->multiprocessors = properties.multiProcessorCount;
  device->shared_memory_per_block = static_cast<int64_t>(properties.sharedMemPerBlockOptin);
  device->l2_bytes = properties.l2CacheSize;
  device->memory_bytes = static_cast<int64_t>(properties.totalGlobalMem);
  return nullptr;
}

}  // namespace frnn
