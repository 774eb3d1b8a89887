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
  PyObject* const dropout = PyUnicode_InternFromString("dropout");
  PyObject* const recompute = PyUnicode_InternFromString("recompute");
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

// A module's attribute or, without one, its class's: False, and nothing else.
bool is_false(PyObject* module, PyObject* name) {
  PyObject* const value = PyObject_GetAttr(module, name);
  if (!value) PyErr_Clear();
  Py_XDECREF(value);
  return value == Py_False;
}

struct LayerCall {
  std::string cell;
  int64_t input_size, state_size, hidden_size, layers, directions;
  bool batch_first, projected, cell_state;
  bool with_gradients = false;
  Tensor input, h0, c0;                                // as they are given
  std::vector<std::vector<DirectionWeights>> weights;  // [layers][directions]

  bool take(PyObject* module, PyObject* given, PyObject* hx);
  std::vector<Tensor> run();

 private:
  std::vector<Tensor> run_layer(const Tensor& rows, int64_t k);
  bool take_tensor(const Tensor* tensor, Tensor& to);
  bool take_weights(Attributes& of, const Names& names, bool bias);
  bool states_fit(int64_t B) const;
};

// A copy: without Python's lock another thread may replace a parameter. An absent one stays undefined.
bool LayerCall::take_tensor(const Tensor* tensor, Tensor& to) {
  if (!goes_with(tensor, input)) return false;
  if (tensor) to = *tensor;
  with_gradients |= is_recorded(tensor);
  return true;
}

// What torch.nn calls the flat weights, as long as they are the module's parameters still: not parametrized, pruned,
// replaced in a way that torch.nn finds out at the next call.
bool LayerCall::take_weights(Attributes& of, const Names& names, bool bias) {
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
    return tensor && take_tensor(tensor, to);
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
  if (!x || x->dim() != 3 || !has_kernels(x->scalar_type())) return false;
  static const Names names;
  if (!is_false(module, names.recompute)) return false;
  input = *x;
  with_gradients = is_recorded(x);

  Attributes of(module);
  PyObject* const mode = of.get(names.mode, [](PyObject* o) { return bool(PyUnicode_CheckExact(o)); });
  input_size = of.number(names.input_size), hidden_size = of.number(names.hidden_size);
  const int64_t proj_size = of.number(names.proj_size);
  projected = proj_size > 0, state_size = projected ? proj_size : hidden_size;
  layers = of.number(names.num_layers), directions = of.flag(names.bidirectional) ? 2 : 1;
  batch_first = of.flag(names.batch_first);
  const bool bias = of.flag(names.bias);
  if (of.failed() || layers < 1) return false;
  if (layers > 1 && of.flag(names.training)) {
    PyObject* const dropout = of.get(names.dropout, [](PyObject* o) { return bool(PyFloat_CheckExact(o)); });
    if (!dropout || PyFloat_AS_DOUBLE(dropout) != 0) return false;
  }

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
  if (!find_states(hx, cell_state, h, c) || !take_tensor(h, h0) || !take_tensor(c, c0)) return false;
  const int64_t T = input.size(batch_first ? 1 : 0), B = input.size(batch_first ? 0 : 1);
  return T > 0 && input.size(2) == input_size && states_fit(B) && take_weights(of, names, bias);
}

// Output, hn and, of a cell with a cell state, cn.
std::vector<Tensor> LayerCall::run_layer(const Tensor& rows, int64_t k) {
  const auto part = [&](const Tensor& state) {
    if (!state.defined()) return OptTensor();
    return OptTensor(layers == 1 ? state : state.narrow(0, k * directions, directions));
  };
  if (!with_gradients) {
    auto [output, hn, cn, _] =
        layer_of(cell_traits(cell), rows, {}, part(h0), part(c0), std::move(weights[k]), false);
    return {output, hn, cn};
  }
  RecordedArguments arguments{rows, part(h0), part(c0)};
  size_t next = 3;
  for (const DirectionWeights& w : weights[k])
    for (const Tensor& weight : {w.w_ih, w.w_hh, w.b_ih, w.b_hh, w.w_hr}) arguments[next++] = weight;
  return recorded(cell, false, arguments);
}

std::vector<Tensor> LayerCall::run() {
  std::optional<PlainDispatch> guard;
  if (!with_gradients) guard.emplace();
  std::vector<Tensor> results, last_h, last_c;
  Tensor rows = batch_first ? input.transpose(0, 1) : input;
  for (int64_t k = 0; k < layers; ++k) {
    results = run_layer(rows, k);
    rows = results[0];
    if (layers == 1) break;
    last_h.push_back(results[1]);
    if (cell_state) last_c.push_back(results[2]);
  }
  if (layers > 1) {
    results[1] = at::cat(last_h);
    if (cell_state) results[2] = at::cat(last_c);
  }
  // What concatenates or transposes is a node already.
  if (layers == 1)
    for (size_t k = 1; k < (cell_state ? 3 : 2); ++k) give_own_node(results[k]);
  if (batch_first)
    results[0] = results[0].transpose(0, 1);
  else
    give_own_node(results[0]);
  return results;
}

}  // namespace

PyObject* layer_at_once(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 3, "layer_at_once: expected module, input, hx");
  LayerCall call;
  if (someone_listens() || !call.take(args[0], args[1], args[2])) Py_RETURN_NONE;
  std::vector<Tensor> results;
  {
    const pybind11::gil_scoped_release unlocked;
    results = call.run();
  }
  PyObject* states = THPVariable_Wrap(std::move(results[1]));
  if (call.cell_state) states = tuple_of(states, THPVariable_Wrap(std::move(results[2])));
  return tuple_of(THPVariable_Wrap(std::move(results[0])), states);
  END_HANDLE_TH_ERRORS
}

}  // namespace frnn
