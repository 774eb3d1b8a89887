// See gpu.h.
#include "gpu.h"

#include <ATen/DeviceAccelerator.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/mm.h>

#include "precision.h"

namespace frnn {

void* current_stream(at::Device device) {
  return at::accelerator::getCurrentStream(device.index()).native_handle();
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
