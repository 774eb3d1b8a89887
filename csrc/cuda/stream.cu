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
  // A wait in one thread would otherwise spoil what another is capturing.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaThreadExchangeStreamCaptureMode(&mode);
  const auto on = static_cast<cudaStream_t>(stream);
  cudaError_t error = cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, on);
  if (error == cudaSuccess) error = cudaStreamSynchronize(on);
  cudaThreadExchangeStreamCaptureMode(&mode);
  return error_text(error);
}

}  // namespace frnn
