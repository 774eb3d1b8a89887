// csrc/ops/cuda/gpu.cpp itself, of which gpu.cpp beside this file is the stand-in, as far as it runs without a GPU.
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/record_function.h>

#include <string>

#include "../../csrc/ops/cuda/gpu.h"
#include "../../csrc/ops/cuda/precision.h"
#include "runtime/exported.h"

namespace {

at::Float32Precision seen;

std::unique_ptr<at::ObserverContext> look(const at::RecordFunction&) {
  seen = frnn::float32_precision(at::Float32Op::MATMUL);
  return nullptr;
}

}  // namespace

// The architecture that a plan is made for, or what the operators raise in its place.
EXPORTED const char* planned_arch() {
  static std::string text;
  try {
    text = std::to_string(frnn::gpu_of(at::Device(at::kCUDA, 0)).arch);
  } catch (const c10::Error& error) {
    text = error.what_without_backtrace();
  }
  return text.c_str();
}

// Whether torch allows TF32 in matrix products, for every thread, while a product of this dtype is made.
EXPORTED bool allows_tf32(int dtype) {
  const auto options = at::dtype(static_cast<at::ScalarType>(dtype));
  const at::Tensor a = at::ones({2, 2}, options), result = at::empty({2, 2}, options);
  const auto handle = at::addThreadLocalCallback(at::RecordFunctionCallback(&look));
  frnn::product(result, a, a);
  at::removeCallback(handle);
  return seen == at::Float32Precision::TF32;
}
