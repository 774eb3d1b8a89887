// The operators as a GPU would run them, on CPU tensors: csrc/ops with the backend of csrc/ops/cuda, whose kernels are
// emulated. Registered as fused_rnn_emulated::layer_forward and so on, with the schemas of the real ones.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/stack.h>
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

// The whole backend with a reset mask ([N] bool), which no operator takes yet: output, hn, cn, and for gradients of ones
// of all three dgates, h_{t-1} and the gradients of h0 and c0. One direction or two, by the number of weights.
std::vector<Tensor> layer_with_reset(std::string_view cell, const Tensor& input, const OptTensor& batch_sizes,
                                     const Tensor& h0, const OptTensor& c0, at::TensorList weights,
                                     const Tensor& reset) {
  const PlainDispatch guard;
  std::vector<DirectionWeights> directions;
  for (size_t k = 0; k + 4 <= weights.size(); k += 4)
    directions.push_back(direction_weights(weights[k], weights[k + 1], weights[k + 2], weights[k + 3], {}));
  const Problem p(cell_traits(cell), steps_of(input, batch_sizes), std::move(directions), input, false,
                  Stage::forward);
  const Shape& s = p.shape;
  ForwardTensors f;
  f.x = input.reshape({s.N, s.I}), f.h0 = h0, f.c0 = c0.value_or(Tensor()), f.reset = reset;
  f.output = p.allocate({s.N, s.D * s.H}), f.hn = p.allocate_state(s.H);
  f.cn = p.cell.cell_state ? p.allocate_state(s.H) : p.allocate({0});
  f.saved = p.allocate({s.D, s.N, p.cell.saved * s.H});
  p.backend.forward(p, true, f);
  BackwardTensors b{};
  b.x = f.x, b.h0 = h0, b.c0 = f.c0, b.output = f.output, b.saved = f.saved, b.reset = reset;
  b.grad_output = at::ones_like(f.output), b.grad_hn = at::ones_like(f.hn);
  b.wants_dh0 = b.wants_previous = true;
  const Tensor dgates = p.allocate({s.D, s.N, p.cell.gate_grads * s.H});
  b.dgates = dgates.unbind(0);
  if (p.cell.carry) {
    b.carry = p.allocate_state(s.H, p.accumulate);
    b.carry.fill_(p.cell.cell_state ? 1 : 0);
  }
  p.backend.backward(p, b);
  return {f.output, f.hn, f.cn, dgates, at::stack(b.previous), b.dh0, b.carry.defined() ? b.carry : f.cn};
}

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
  m.def(
      "layer_with_reset(str cell, Tensor input, Tensor? batch_sizes, Tensor h0, Tensor? c0, Tensor[] "
      "weights, "
      "Tensor reset) -> Tensor[]");
  m.impl("layer_with_reset",
         torch::dispatch(c10::DispatchKey::CPU, torch::CppFunction(&frnn::layer_with_reset)));
}
