// The one way to launch a kernel.
#pragma once

#include <cuda_runtime.h>

namespace frnn {

// Null, or what CUDA says is wrong.
inline const char* error_text(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // it is reported here, and not again by whoever asks next
  return cudaGetErrorString(error);
}

// While it lives, this thread may call what a capture of a CUDA graph forbids, its own or another thread's: waits, and
// what loads a kernel, which CUDA puts off until it is first asked for.
class RelaxedCapture {
 public:
  RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// A launch whose blocks may wait for each other: those of a cluster (along x), or all.
struct LaunchShape {
  dim3 grid, block;
  size_t shared_bytes = 0;
  unsigned cluster = 0;  // blocks; 0: without clusters
  bool cooperative = false;
};

// The shape as CUDA takes it. It points into itself: not to be copied.
class LaunchConfig {
 public:
  LaunchConfig(const LaunchShape& shape, void* stream) {
    config_.gridDim = shape.grid;
    config_.blockDim = shape.block;
    config_.dynamicSmemBytes = shape.shared_bytes;
    config_.stream = static_cast<cudaStream_t>(stream);
    config_.attrs = attributes_;
    if (shape.cluster > 0) {
      cudaLaunchAttribute& attribute = attributes_[config_.numAttrs++];
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim = {shape.cluster, 1, 1};
    }
    if (shape.cooperative) {
      cudaLaunchAttribute& attribute = attributes_[config_.numAttrs++];
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = 1;
    }
  }
  LaunchConfig(const LaunchConfig&) = delete;
  LaunchConfig& operator=(const LaunchConfig&) = delete;
  const cudaLaunchConfig_t* get() const { return &config_; }

 private:
  cudaLaunchConfig_t config_{};
  cudaLaunchAttribute attributes_[2];
};

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), const LaunchShape& shape, void* stream,
                   const Arguments&... arguments) {
  const LaunchConfig config(shape, stream);
  return error_text(cudaLaunchKernelEx(config.get(), kernel, arguments...));
}

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
                   const Arguments&... arguments) {
  return launch(kernel, LaunchShape{grid, block, shared_bytes}, stream, arguments...);
}

}  // namespace frnn
