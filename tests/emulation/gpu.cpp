// Stands in for csrc/ops/cuda/gpu.cpp: tensors lie in the host's memory, and a launch has ended when it returns.
#include "../../csrc/ops/cuda/gpu.h"

#include <ATen/ops/bmm.h>
#include <ATen/ops/mm.h>

#include "../../csrc/ops/cuda/precision.h"
#include "runtime/exported.h"

namespace frnn {

void* current_stream(at::Device) { return nullptr; }

// The GPU that the emulation is unless a test says otherwise.
CudaGpu planned_gpu = typical_gpu(90);
CudaGpu gpu_of(at::Device) { return planned_gpu; }

std::string gpu_name(at::Device) { return "emulated"; }

int products = 0;

void product(const Tensor& result, const Tensor& a, const Tensor& b) {
  const RecurrentPrecision
      precision;  // without effect on the host, but it must leave torch's switches as they were
  ++products;
  const at::ScalarType wide = a.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const Tensor wide_a = a.to(wide), wide_b = b.to(wide);
  Tensor(result).copy_(a.dim() == 3 ? at::bmm(wide_a, wide_b) : at::mm(wide_a, wide_b));
}

}  // namespace frnn

// What plans take the GPU for, 90 for sm_90; 0: as much as such a GPU has.
EXPORTED void frnn_emulation_plan_for(int arch, int multiprocessors, int64_t memory_bytes) {
  frnn::planned_gpu = frnn::typical_gpu(arch);
  if (multiprocessors > 0) frnn::planned_gpu.multiprocessors = multiprocessors;
  if (memory_bytes > 0) frnn::planned_gpu.memory_bytes = memory_bytes;
}

// How often matrices have been multiplied.
EXPORTED int frnn_emulation_products() { return frnn::products; }
