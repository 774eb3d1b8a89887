// See at_once.h.
#include "at_once.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/grad_mode.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/python_variable.h>

#include "../python_calls.h"
#include "derivable.h"

namespace frnn {

bool someone_listens() {
  const c10::impl::LocalDispatchKeySet local = c10::impl::tls_local_dispatch_key_set();
  return !(local.included_ - c10::default_included_set).empty()     // transforms, modes, traces
         || !(c10::default_excluded_set - local.excluded_).empty()  // autocast
         || at::impl::torch_function_mode_enabled() ||
         at::getStepCallbacksUnlessEmpty(at::RecordScope::FUNCTION).has_value() ||
         torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr;
}

bool is_plain(const Tensor& tensor) {
  constexpr c10::DispatchKeySet kPlain(
      {c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutocastCPU,
#ifdef FRNN_WITH_CUDA
       c10::DispatchKey::CUDA, c10::DispatchKey::AutogradCUDA, c10::DispatchKey::AutocastCUDA,
#endif
       c10::DispatchKey::ADInplaceOrView});
  return tensor.defined() && !(tensor.key_set().raw_repr() & ~kPlain.raw_repr());
}

const Tensor* plain_tensor(PyObject* object) {
  if (!THPVariable_CheckExact(object)) return nullptr;
  const Tensor& tensor = THPVariable_Unpack(object);
  return is_plain(tensor) ? &tensor : nullptr;
}

bool goes_with(const Tensor* tensor, const Tensor& input) {
  return !tensor || (tensor->scalar_type() == input.scalar_type() && tensor->device() == input.device());
}

bool find_states(PyObject* hx, bool cell_state, const Tensor*& h0, const Tensor*& c0) {
  if (hx == Py_None) return true;
  if (!cell_state) return (h0 = plain_tensor(hx));
  return PyTuple_CheckExact(hx) && PyTuple_GET_SIZE(hx) == 2 &&
         (h0 = plain_tensor(PyTuple_GET_ITEM(hx, 0))) && (c0 = plain_tensor(PyTuple_GET_ITEM(hx, 1)));
}

bool has_kernels(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16;
}

bool is_recorded(const Tensor* tensor) {
  return tensor && tensor->requires_grad() && at::GradMode::is_enabled();
}

PyObject* tuple_of(PyObject* first, PyObject* second) {
  PyObject* const both = first && second ? PyTuple_New(2) : nullptr;
  if (!both) {
    Py_XDECREF(first);
    Py_XDECREF(second);
    return nullptr;
  }
  PyTuple_SET_ITEM(both, 0, first);
  PyTuple_SET_ITEM(both, 1, second);
  return both;
}

namespace {
PyCFunction fast(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}
}  // namespace

PyMethodDef kTensorFunctions[] = {
    {"cell_at_once", fast(&cell_at_once), METH_FASTCALL,
     "cell_at_once(cell, parameters, input, hx): a cell's step, or None where a call must go by way of "
     "torch."},
    {"layer_at_once", fast(&layer_at_once), METH_FASTCALL,
     "layer_at_once(module, input, hx): a module's layers, or None where a call must go by way of torch."},
    {"derivable_gradients", fast(&derivable_gradients_of), METH_FASTCALL,
     "derivable_gradients(cell, batch_sizes, wanted, gradients, arguments, output, saved, link): "
     "csrc/ops/derivable.h."},
    {"give_own_nodes", fast(&give_own_nodes), METH_FASTCALL,
     "give_own_nodes(*results): csrc/ops/own_node.cpp. Of those that autograd recorded; None is passed "
     "over."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace frnn
