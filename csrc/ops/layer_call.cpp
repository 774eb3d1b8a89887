// A module's layers straight from Python (at_once.h): all that fused_rnn/modules.py and functional.py do around them
// for a padded batch and nothing special.
#include <ATen/ops/cat.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include "at_once.h"
#include "scan.h"

namespace frnn {
namespace {

// The attributes that make a module what it is, in torch's names.
struct Names {
  PyObject* const mode = PyUnicode_InternFromString("mode");
  PyObject* const input_size = PyUnicode_InternFromString("input_size");
  PyObject* const hidden_size = PyUnicode_InternFromString("hidden_size");
  PyObject* const proj_size = PyUnicode_InternFromString("proj_size");
  PyObject* const num_layers = PyUnicode_InternFromString("num_layers");
  PyObject* const bias = PyUnicode_InternFromString("bias");
  PyObject* const batch_first = PyUnicode_InternFromString("batch_first");
  PyObject* const bidirectional = PyUnicode_InternFromString("bidirectional");
  PyObject* const training = PyUnicode_InternFromString("training");
  PyObject* const parameters = PyUnicode_InternFromString("_parameters");
  PyObject* const weights = PyUnicode_InternFromString("_flat_weights");
  PyObject* const weight_names = PyUnicode_InternFromString("_flat_weights_names");
};

// Reads a module's own attributes. One that is missing, as a property of a subclass would be, or is of another type
// makes it fail.
class Attributes {
 public:
  explicit Attributes(PyObject* module) : dict_(PyObject_GenericGetDict(module, nullptr)) {
    if (!dict_) PyErr_Clear();
  }
  ~Attributes() { Py_XDECREF(dict_); }
  Attributes(const Attributes&) = delete;
  Attributes& operator=(const Attributes&) = delete;

  bool failed() const { return failed_ || !dict_; }
  PyObject* get(PyObject* name, bool (*is_right)(PyObject*)) {
    PyObject* const value = dict_ ? PyDict_GetItemWithError(dict_, name) : nullptr;
    if (value && is_right(value)) return value;
    failed_ = true;
    return nullptr;
  }
  int64_t number(PyObject* name) {
    PyObject* const value = get(name, [](PyObject* o) { return bool(PyLong_CheckExact(o)); });
    int too_large = 0;
    const int64_t number = value ? PyLong_AsLongLongAndOverflow(value, &too_large) : 0;
    failed_ |= too_large != 0;
    return number;
  }
  bool flag(PyObject* name) {
    return get(name, [](PyObject* o) { return bool(PyBool_Check(o)); }) == Py_True;
  }

 private:
  PyObject* dict_;
  bool failed_ = false;
};

// Whether a tensor is of this dtype, with no gradient to be recorded; null is.
bool is_constant(const Tensor* tensor, at::ScalarType dtype) {
  return !tensor || (tensor->scalar_type() == dtype && !is_recorded(tensor));
}

struct LayerCall {
  std::string cell;
  int64_t input_size, state_size, hidden_size, layers, directions;
  bool batch_first, projected, cell_state;
  Tensor input, h0, c0;                                // as they are given
  std::vector<std::vector<DirectionWeights>> weights;  // [layers][directions]

  bool take(PyObject* module, PyObject* given, PyObject* hx);
  void run(Tensor& output, Tensor& hn, Tensor& cn);

 private:
  bool take_weights(Attributes& of, const Names& names, bool bias, at::ScalarType dtype);
  bool states_fit(int64_t B) const;
};

// What torch.nn calls the flat weights, as long as they are the module's parameters still: not parametrized, pruned,
// replaced in a way that torch.nn finds out at the next call.
bool LayerCall::take_weights(Attributes& of, const Names& names, bool bias, at::ScalarType dtype) {
  PyObject* const parameters = of.get(names.parameters, [](PyObject* o) { return bool(PyDict_Check(o)); });
  const auto is_list = [](PyObject* o) { return bool(PyList_CheckExact(o)); };
  PyObject* const flat = of.get(names.weights, is_list);
  PyObject* const flat_names = of.get(names.weight_names, is_list);
  const Py_ssize_t count = layers * directions * (2 + 2 * bias + projected);
  if (of.failed() || PyList_GET_SIZE(flat) != count || PyList_GET_SIZE(flat_names) != count) return false;
  Py_ssize_t next = 0;
  const auto take_next = [&](Tensor& to) {
    PyObject *const weight = PyList_GET_ITEM(flat, next), *const name = PyList_GET_ITEM(flat_names, next);
    ++next;
    if (!PyUnicode_CheckExact(name) || PyDict_GetItemWithError(parameters, name) != weight) return false;
    const Tensor* const tensor = plain_tensor(weight);
    if (!tensor || !is_constant(tensor, dtype)) return false;
    to = *tensor;
    return true;
  };
  weights.resize(layers);
  for (std::vector<DirectionWeights>& layer : weights) {
    layer.resize(directions);
    for (DirectionWeights& w : layer)
      if (!take_next(w.w_ih) || !take_next(w.w_hh) || (bias && !(take_next(w.b_ih) && take_next(w.b_hh))) ||
          (projected && !take_next(w.w_hr)))
        return false;
  }
  return true;
}

bool LayerCall::states_fit(int64_t B) const {
  const auto fits = [&](const Tensor& t, int64_t size) {
    return !t.defined() ||
           (t.dim() == 3 && t.size(0) == layers * directions && t.size(1) == B && t.size(2) == size);
  };
  return fits(h0, state_size) && fits(c0, hidden_size);
}

// False where the call is none for here, or has an error that Python knows the words for.
bool LayerCall::take(PyObject* module, PyObject* given, PyObject* hx) {
  const Tensor* const x = plain_tensor(given);
  if (!x || x->dim() != 3 || !has_kernels(x->scalar_type()) || is_recorded(x)) return false;

  static const Names names;
  Attributes of(module);
  PyObject* const mode = of.get(names.mode, [](PyObject* o) { return bool(PyUnicode_CheckExact(o)); });
  input_size = of.number(names.input_size), hidden_size = of.number(names.hidden_size);
  const int64_t proj_size = of.number(names.proj_size);
  projected = proj_size > 0, state_size = projected ? proj_size : hidden_size;
  layers = of.number(names.num_layers), directions = of.flag(names.bidirectional) ? 2 : 1;
  batch_first = of.flag(names.batch_first);
  const bool bias = of.flag(names.bias);
  if (of.failed() || layers < 1) return false;
  if (layers > 1 && of.flag(names.training)) return false;  // dropout, maybe

  Py_ssize_t length = 0;
  const char* const text = PyUnicode_AsUTF8AndSize(mode, &length);
  if (!text) {
    PyErr_Clear();
    return false;
  }
  cell.assign(text, length);
  for (char& c : cell) c = static_cast<char>(c >= 'A' && c <= 'Z' ? c - 'A' + 'a' : c);
  cell_state = cell_traits(cell).cell_state;

  const Tensor *h = nullptr, *c = nullptr;
  if (!find_states(hx, cell_state, h, c) || !is_constant(h, x->scalar_type()) ||
      !is_constant(c, x->scalar_type()))
    return false;
  // Copies: without the lock another thread may replace a parameter.
  input = *x;
  if (h) h0 = *h;
  if (c) c0 = *c;
  const int64_t T = input.size(batch_first ? 1 : 0), B = input.size(batch_first ? 0 : 1);
  return T > 0 && input.size(2) == input_size && states_fit(B) &&
         take_weights(of, names, bias, x->scalar_type());
}

void LayerCall::run(Tensor& output, Tensor& hn, Tensor& cn) {
  const PlainDispatch guard;
  const CellTraits traits = cell_traits(cell);
  std::vector<Tensor> last_h, last_c;
  output = batch_first ? input.transpose(0, 1) : input;
  for (int64_t k = 0; k < layers; ++k) {
    const auto part = [&](const Tensor& state) {
      if (!state.defined()) return OptTensor();
      return OptTensor(layers == 1 ? state : state.narrow(0, k * directions, directions));
    };
    std::tie(output, hn, cn, std::ignore) =
        layer_of(traits, output, {}, part(h0), part(c0), std::move(weights[k]), false);
    if (layers == 1) break;
    last_h.push_back(hn);
    last_c.push_back(cn);
  }
  if (layers > 1) {
    hn = at::cat(last_h);
    if (cell_state) cn = at::cat(last_c);
  }
  if (batch_first) output = output.transpose(0, 1);
}

}  // namespace

PyObject* layer_at_once(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 3, "layer_at_once: expected module, input, hx");
  LayerCall call;
  if (someone_listens() || !call.take(args[0], args[1], args[2])) Py_RETURN_NONE;
  Tensor output, hn, cn;
  {
    const pybind11::gil_scoped_release unlocked;
    call.run(output, hn, cn);
  }
  PyObject* states = THPVariable_Wrap(std::move(hn));
  if (call.cell_state) states = tuple_of(states, THPVariable_Wrap(std::move(cn)));
  return tuple_of(THPVariable_Wrap(std::move(output)), states);
  END_HANDLE_TH_ERRORS
}

}  // namespace frnn
