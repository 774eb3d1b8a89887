// What the operators need of a torch that was built for CUDA. Apart from the rest, so that everything else runs on
// machines without a GPU, with CPU tensors and emulated kernels (tests/emulation has its own gpu.cpp).
#pragma once

#include "../../cuda/plan.h"
#include "../ops.h"

namespace frnn {

// torch's current stream on this device, a cudaStream_t.
void* current_stream(at::Device device);

// What a plan depends on of this device, and its name.
CudaGpu gpu_of(at::Device device);
std::string gpu_name(at::Device device);

// result = a b, or for each of a batch; sums in float32 or wider. `result` may be wider than 16-bit a and b.
void product(const Tensor& result, const Tensor& a, const Tensor& b);

}  // namespace frnn
