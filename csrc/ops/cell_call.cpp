// A cell's step straight from Python. At a batch of one the way through the module's checks and torch's dispatcher
// costs as much as the step itself, and a loop over a cell pays it each time. This call answers only when nothing
// listens on that way: no autograd, no autocast, no transform, mode, trace or profiler, and plain tensors alone. Then
// the dispatcher would come to the same function. Anything else it declines, the errors of bad input included, and
// fused_rnn/cells.py goes the long way.
#include "../python_calls.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/grad_mode.h>
#include <ATen/record_function.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/python_variable.h>

#include "scan.h"

namespace frnn {
namespace {

// Whether some feature of this thread would have a say in an operator's call.
bool someone_listens() {
  const c10::impl::LocalDispatchKeySet local = c10::impl::tls_local_dispatch_key_set();
  return !(local.included_ - c10::default_included_set).empty()     // transforms, modes, traces
         || !(c10::default_excluded_set - local.excluded_).empty()  // autocast
         || at::impl::torch_function_mode_enabled() ||
         at::getStepCallbacksUnlessEmpty(at::RecordScope::FUNCTION).has_value() ||
         torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr;
}

// The tensor of a Python object that is torch.Tensor or Parameter itself, on the CPU, with nothing special about it.
// Null for anything else.
const Tensor* plain_tensor(PyObject* object) {
  constexpr c10::DispatchKeySet kPlain({c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU,
                                        c10::DispatchKey::AutocastCPU, c10::DispatchKey::ADInplaceOrView});
  if (!THPVariable_CheckExact(object)) return nullptr;
  const Tensor& tensor = THPVariable_Unpack(object);
  if (!tensor.defined() || (tensor.key_set().raw_repr() & ~kPlain.raw_repr())) return nullptr;
  return &tensor;
}

struct CellTensors {
  const Tensor *input = nullptr, *h0 = nullptr, *c0 = nullptr;
  const Tensor *w_ih = nullptr, *w_hh = nullptr, *b_ih = nullptr, *b_hh = nullptr;

  // What fused_rnn/cells.py checks, and that the weights are still of the sizes that they were made in.
  bool fit(int gates) const {
    if (input->dim() != 2 || w_ih->dim() != 2 || w_hh->dim() != 2) return false;
    const int64_t B = input->size(0), H = w_hh->size(1);
    const auto state_fits = [&](const Tensor* t) {
      return !t || (t->dim() == 2 && t->size(0) == B && t->size(1) == H);
    };
    const auto bias_fits = [&](const Tensor* t) { return !t || (t->dim() == 1 && t->size(0) == gates * H); };
    return input->size(1) == w_ih->size(1) && w_ih->size(0) == gates * H && w_hh->size(0) == gates * H &&
           state_fits(h0) && state_fits(c0) && bias_fits(b_ih) && bias_fits(b_hh) && !b_ih == !b_hh;
  }

  bool of_one_dtype_without_gradient() const {
    const at::ScalarType dtype = input->scalar_type();
    if (dtype != at::kFloat && dtype != at::kDouble && dtype != at::kHalf && dtype != at::kBFloat16)
      return false;
    const bool recording = at::GradMode::is_enabled();
    for (const Tensor* t : {input, h0, c0, w_ih, w_hh, b_ih, b_hh})
      if (t && (t->scalar_type() != dtype || (recording && t->requires_grad()))) return false;
    return true;
  }
};

// False where the parameter is missing (parametrized, pruned, replaced) or no plain tensor.
bool find_parameter(PyObject* parameters, PyObject* name, bool optional, const Tensor*& found) {
  PyObject* value = PyDict_GetItemWithError(parameters, name);
  if (!value || (value == Py_None && !optional)) return false;
  return value == Py_None || (found = plain_tensor(value));
}

bool find_parameters(PyObject* parameters, CellTensors& t) {
  static PyObject* const w_ih = PyUnicode_InternFromString("weight_ih");
  static PyObject* const w_hh = PyUnicode_InternFromString("weight_hh");
  static PyObject* const b_ih = PyUnicode_InternFromString("bias_ih");
  static PyObject* const b_hh = PyUnicode_InternFromString("bias_hh");
  return PyDict_Check(parameters) && find_parameter(parameters, w_ih, false, t.w_ih) &&
         find_parameter(parameters, w_hh, false, t.w_hh) && find_parameter(parameters, b_ih, true, t.b_ih) &&
         find_parameter(parameters, b_hh, true, t.b_hh);
}

bool find_states(PyObject* hx, bool cell_state, CellTensors& t) {
  if (hx == Py_None) return true;
  if (!cell_state) return (t.h0 = plain_tensor(hx));
  return PyTuple_CheckExact(hx) && PyTuple_GET_SIZE(hx) == 2 &&
         (t.h0 = plain_tensor(PyTuple_GET_ITEM(hx, 0))) && (t.c0 = plain_tensor(PyTuple_GET_ITEM(hx, 1)));
}

OptTensor optional(const Tensor* tensor) { return tensor ? OptTensor(*tensor) : OptTensor(); }

PyObject* cell_at_once(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 4, "cell_at_once: expected cell, parameters, input, hx");
  Py_ssize_t length = 0;
  const char* name = PyUnicode_AsUTF8AndSize(args[0], &length);
  if (!name) return nullptr;
  const std::string_view cell(name, length);
  const CellTraits traits = cell_traits(cell);
  CellTensors t;
  if (someone_listens() || !(t.input = plain_tensor(args[2])) || !find_parameters(args[1], t) ||
      !find_states(args[3], traits.cell_state, t) || !t.fit(traits.gates) ||
      !t.of_one_dtype_without_gradient())
    Py_RETURN_NONE;
  // Copies: without the lock another thread may replace a parameter.
  const Tensor input = *t.input, w_ih = *t.w_ih, w_hh = *t.w_hh;
  const OptTensor h0 = optional(t.h0), c0 = optional(t.c0), b_ih = optional(t.b_ih), b_hh = optional(t.b_hh);
  Tensor h, c;
  {
    const pybind11::gil_scoped_release unlocked;
    std::tie(h, c, std::ignore) = cell_forward(cell, input, h0, c0, w_ih, w_hh, b_ih, b_hh, false);
  }
  if (!traits.cell_state) return THPVariable_Wrap(std::move(h));
  PyObject* const both = PyTuple_New(2);  // which takes the references over
  if (!both) return nullptr;
  PyTuple_SET_ITEM(both, 0, THPVariable_Wrap(std::move(h)));
  PyTuple_SET_ITEM(both, 1, THPVariable_Wrap(std::move(c)));
  return both;
  END_HANDLE_TH_ERRORS
}

}  // namespace

PyMethodDef kTensorFunctions[] = {
    {"cell_at_once", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&cell_at_once)),
     METH_FASTCALL,
     "cell_at_once(cell, parameters, input, hx): a cell's step, or None where a call must go by way of "
     "torch."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace frnn
