// How the test kernels are launched, by the emulation and by a GPU alike.
#pragma once

#include <cuda_runtime.h>

#define TEST_EXPORT extern "C" __attribute__((visibility("default")))

struct Shape {
  dim3 grid, block;
  size_t shared_bytes = 0;
  unsigned cluster = 1;
  bool cooperative = false;
};

template <class... Parameters, class... Given>
int launch(const Shape& shape, void (*kernel)(Parameters...), Given... given) {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attributes[2];
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.attrs = attributes;
  if (shape.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim.x = shape.cluster;
    attributes[config.numAttrs].val.clusterDim.y = 1;
    attributes[config.numAttrs++].val.clusterDim.z = 1;
  }
  if (shape.cooperative) {
    attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[config.numAttrs++].val.cooperative = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, given...);
}
