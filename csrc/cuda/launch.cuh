// The one way to launch a kernel.
#pragma once

#include <cuda_runtime.h>

namespace frnn {

// Returns null, or what CUDA says is wrong.
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
                   const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // it is reported here, and not again by whoever asks next
  return cudaGetErrorString(error);
}

}  // namespace frnn
