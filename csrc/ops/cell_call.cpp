// A cell's step straight from Python (at_once.h): a loop over a cell pays for each call.
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <array>

#include "at_once.h"
#include "scan.h"

namespace frnn {
namespace {

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

  bool go_together() const {
    for (const Tensor* t : all())
      if (!goes_with(t, *input)) return false;
    return has_kernels(input->scalar_type());
  }

  bool recorded() const {
    for (const Tensor* t : all())
      if (is_recorded(t)) return true;
    return false;
  }

  std::array<const Tensor*, 7> all() const { return {input, h0, c0, w_ih, w_hh, b_ih, b_hh}; }
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

}  // namespace

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
      !find_states(args[3], traits.cell_state, t.h0, t.c0) || !t.fit(traits.gates) || !t.go_together())
    Py_RETURN_NONE;
  // Copies: without the lock another thread may replace a parameter.
  const Tensor input = *t.input, w_ih = *t.w_ih, w_hh = *t.w_hh;
  const OptTensor h0 = optional(t.h0), c0 = optional(t.c0), b_ih = optional(t.b_ih), b_hh = optional(t.b_hh);
  const bool with_gradients = t.recorded();
  Tensor h, c;
  {
    const pybind11::gil_scoped_release unlocked;
    if (with_gradients) {
      std::vector<Tensor> results =
          recorded(std::string(cell), true, {input, h0, c0, w_ih, w_hh, b_ih, b_hh});
      if (traits.cell_state) {
        give_own_node(results[0]);
        give_own_node(results[1]);
        c = std::move(results[1]);
      }
      h = std::move(results[0]);
    } else {
      std::tie(h, c, std::ignore) = cell_forward(cell, input, h0, c0, w_ih, w_hh, b_ih, b_hh, false);
    }
  }
  if (!traits.cell_state) return THPVariable_Wrap(std::move(h));
  return tuple_of(THPVariable_Wrap(std::move(h)), THPVariable_Wrap(std::move(c)));
  END_HANDLE_TH_ERRORS
}

}  // namespace frnn
