// See gpu.h.
#include "gpu.h"

#include <ATen/DeviceAccelerator.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/mm.h>

#include <map>
#include <mutex>
#include <optional>

#include "../../cuda/device.h"
#include "precision.h"

namespace frnn {

void* current_stream(at::Device device) {
  return at::accelerator::getCurrentStream(device.index()).native_handle();
}

CudaGpu gpu_of(at::Device device) {
  // Asked of the driver once: it takes a good part of a millisecond.
  static std::mutex mutex;
  static std::map<c10::DeviceIndex, CudaGpu> gpus;
  const std::lock_guard<std::mutex> lock(mutex);
  auto known = gpus.find(device.index());
  if (known == gpus.end()) {
    CudaDevice found;
    // Our CUDA runtime may be newer than torch's, and newer than the driver.
    const char* error = cuda_device(device.index(), &found);
    TORCH_CHECK(!error, "fused_rnn: its kernels, compiled with CUDA ", cuda_runtime_version() / 1000, ".",
                cuda_runtime_version() % 1000 / 10, ", cannot use ", device, ": ", error,
                ". Update the GPU's driver, or build fused_rnn with an older nvcc, or with FUSED_RNN_CUDA=0");
    known = gpus.emplace(device.index(), gpu_of(found)).first;
  }
  return known->second;
}

std::string gpu_name(at::Device device) {
  CudaDevice found;
  return cuda_device(device.index(), &found) ? "?" : found.name;
}

void product(const Tensor& result, const Tensor& a, const Tensor& b) {
  // The 16-bit types and float64 know no TF32: torch's switches, which other threads look at too, are left alone.
  std::optional<RecurrentPrecision> precision;
  if (a.scalar_type() == at::kFloat) precision.emplace();
  Tensor out = result;
  const bool batched = a.dim() == 3;
  if (result.scalar_type() == a.scalar_type())
    batched ? at::bmm_out(out, a, b) : at::mm_out(out, a, b);
  else
    batched ? at::bmm_out(out, a, b, result.scalar_type()) : at::mm_out(out, a, b, result.scalar_type());
}

}  // namespace frnn
