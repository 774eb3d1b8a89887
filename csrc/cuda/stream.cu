// See stream.h.
#include "stream.h"

#include "launch.cuh"

namespace frnn {

bool is_capturing(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const char* error = error_text(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status));
  return error || status != cudaStreamCaptureStatusNone;
}

const char* fetch(void* to, const void* from, size_t bytes, void* stream) {
  const RelaxedCapture relaxed;  // a wait in one thread would otherwise spoil what another is capturing
  const auto on = static_cast<cudaStream_t>(stream);
  cudaError_t error = cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, on);
  if (error == cudaSuccess) error = cudaStreamSynchronize(on);
  return error_text(error);
}

}  // namespace frnn
