// See gpu.h.
#include "gpu.h"

#include <ATen/DeviceAccelerator.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/mm.h>

#include <mutex>
#include <vector>

#include "../../cuda/device.h"
#include "precision.h"

namespace frnn {

void* current_stream(at::Device device) {
  return at::accelerator::getCurrentStream(device.index()).native_handle();
}

CudaGpu gpu_of(at::Device device) {
  // Asked of the driver once: it takes a good part of a millisecond.
  static std::once_flag asked;
  static std::vector<CudaGpu> gpus;
  std::call_once(asked, [] {
    for (int index = 0; index < cuda_device_count(); ++index) {
      CudaDevice found;
      const char* error = cuda_device(index, &found);
      TORCH_CHECK(!error, "fused_rnn: GPU ", index, ": ", error);
      gpus.push_back(gpu_of(found));
    }
  });
  return gpus.at(device.index());
}

std::string gpu_name(at::Device device) {
  CudaDevice found;
  return cuda_device(device.index(), &found) ? "?" : found.name;
}

void product(const Tensor& result, const Tensor& a, const Tensor& b) {
  const RecurrentPrecision precision;
  Tensor out = result;
  const bool batched = a.dim() == 3;
  if (result.scalar_type() == a.scalar_type())
    batched ? at::bmm_out(out, a, b) : at::mm_out(out, a, b);
  else
    batched ? at::bmm_out(out, a, b, result.scalar_type()) : at::mm_out(out, a, b, result.scalar_type());
}

}  // namespace frnn
