// The operators as a GPU would run them, on CPU tensors: csrc/ops with the backend of csrc/ops/cuda, whose kernels are
// emulated. Registered as fused_rnn_emulated::layer_forward and so on, with the schemas of the real ones.
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include "../../csrc/cuda/plan.h"
#include "../../csrc/ops/cuda/trust.h"
#include "../../csrc/ops/scan.h"
#include "runtime/exported.h"

namespace frnn {

const Backend& backend_of(const Tensor&) { return kCudaBackend; }

namespace {

// Tensors in memory that the emulation knows, so that it can tell a kernel's access beside them.
struct GuardedAllocator final : c10::Allocator {
  at::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, &frnn_emulation_free, at::kCPU};
    void* address = frnn_emulation_malloc(bytes);
    TORCH_CHECK(address, "the emulation has no room for ", bytes, " bytes");
    return {address, address, &frnn_emulation_free, at::kCPU};
  }
  at::DeleterFnPtr raw_deleter() const override { return &frnn_emulation_free; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
} guarded;

at::Allocator* usual = nullptr;

}  // namespace
}  // namespace frnn

// While on, tensors are made in memory that the emulation knows.
EXPORTED void frnn_emulation_guard_tensors(bool on) {
  if (!frnn::usual) frnn::usual = c10::GetCPUAllocator();
  c10::SetCPUAllocator(on ? &frnn::guarded : frnn::usual, /*priority=*/1);
}

// As fused_rnn.force_plan, for the plans of this library. Null: no strategy; false: there is none of this name.
EXPORTED bool frnn_emulation_force_strategy(const char* name) {
  if (!name) frnn::force_strategy(nullptr);
  for (const frnn::StrategyName& known : frnn::kStrategyNames)
    if (name && name == std::string(known.name)) {
      frnn::force_strategy(&known.strategy);
      return true;
    }
  return !name;
}

// As in a new process: persistent kernels are checked again.
EXPORTED void frnn_emulation_forget_checks() { frnn::forget_checks(); }

TORCH_LIBRARY(fused_rnn_emulated, m) {
  const auto same = [&m](const std::string& name, auto* function) {
    auto schema = c10::Dispatcher::singleton().findSchemaOrThrow(("fused_rnn::" + name).c_str(), "").schema();
    m.def(schema.cloneWithName("fused_rnn_emulated::" + name, ""));
    m.impl(name.c_str(), torch::dispatch(c10::DispatchKey::CPU, torch::CppFunction(function)));
    m.impl(name.c_str(), torch::dispatch(c10::DispatchKey::Autograd, torch::CppFunction::makeFallthrough()));
  };
  same("layer_forward", &frnn::layer_forward);
  same("layer_backward", &frnn::layer_backward);
  same("cell_forward", &frnn::cell_forward);
  same("cell_backward", &frnn::cell_backward);
}
