// See derivable.h. What LayerBackward of fused_rnn/transforms.py does under a transform; without one, a Function in C++
// costs a third of one in Python.
#include "derivable.h"

#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <array>

namespace frnn {
namespace {

using torch::autograd::AutogradContext;

constexpr int kPassGradients = 3;  // that a backward pass takes
constexpr int kVariables =
    kPassGradients + kGradients;  // those, then the layer's arguments; behind them the link
// Of what is saved, behind the variables.
enum { kBatchSizes = kVariables, kOutput, kSaved, kDh };
// Keys of what is kept beside tensors.
constexpr const char *kCell = "cell", *kMade = "made", *kIsLinked = "is_linked";

template <class Found>
variable_list as_list(const Found& found) {
  return std::apply([](const auto&... t) { return variable_list{t...}; }, found);
}

// v: [kGradients], the direction; the results by variable, that of the link behind them.
variable_list call_double_backward(const std::string& cell, const variable_list& t, const variable_list& v,
                                   int64_t needs) {
  static const auto call = operator_of<decltype(layer_double_backward)>("fused_rnn::layer_double_backward");
  const auto a = [&](int k) { return if_defined(t[kPassGradients + k]); };
  const auto d = [&](int k) { return if_defined(v[k]); };
  return as_list(call.call(cell, t[kDh], if_defined(t[kPassGradients - 1]), a(0), if_defined(t[kBatchSizes]),
                           a(1), a(2), *a(3), *a(4), a(5), a(6), a(7), a(8), a(9), a(10), a(11), a(12), d(0),
                           d(1), d(2), d(3), d(4), d(5), d(6), d(7), d(8), d(9), d(10), d(11), d(12),
                           t[kOutput], t[kSaved], needs));
}

pybind11::list as_python(const variable_list& tensors, size_t first, size_t last) {
  pybind11::list items;
  for (size_t k = first; k < last; ++k) items.append(pybind11::cast(tensors[k]));
  return items;
}
variable_list from_python(const pybind11::handle& items) {
  variable_list tensors;
  for (const pybind11::handle item : items)
    tensors.push_back(item.is_none() ? Tensor() : item.cast<Tensor>());
  return tensors;
}
// What C++ has no way for: a function of fused_rnn/transforms.py.
template <class... Arguments>
variable_list call_python(const char* name, const Arguments&... arguments) {
  return from_python(pybind11::module_::import("fused_rnn.transforms").attr(name)(arguments...));
}

variable_list gradients_under_transform(const RecordedPass& pass) {
  const pybind11::gil_scoped_acquire locked;
  return call_python("layer_gradients", pass.cell, pass.batch_sizes, pass.wanted,
                     as_python(pass.gradients, 0, kPassGradients), as_python(pass.arguments, 0, kGradients),
                     pass.output, pass.saved);
}

// A third derivative, one under a transform, or one where the second has no kernels.
variable_list other_double_backward(const std::string& cell, const variable_list& t, const variable_list& v,
                                    const std::vector<bool>& wanted) {
  const pybind11::gil_scoped_acquire locked;
  return call_python("second_derivative", cell, t[kBatchSizes], wanted, as_python(t, 0, kVariables),
                     as_python(v, 0, kGradients), t[kOutput], t[kSaved], t[kDh]);
}

struct Derivable : torch::autograd::Function<Derivable> {
  // The gradients that are wanted, one after another.
  template <class... Given>
  static variable_list forward(AutogradContext* ctx, const RecordedPass& pass, const Given&...) {
    int64_t made = 0;
    for (int k = 0; k < kGradients; ++k) made |= int64_t{pass.wanted[k]} << k;
    // The gradient of every state is what a second derivative reads, where it has kernels.
    const int64_t states = int64_t{pass.saved.is_cpu()} << kStateGradients;
    const variable_list found = as_list(call_layer_backward(
        pass.cell, pass.batch_sizes, pass.gradients, pass.arguments, pass.output, pass.saved, made | states));

    variable_list kept = pass.gradients;
    kept.insert(kept.end(), pass.arguments.begin(), pass.arguments.end());
    for (const Tensor& t : {pass.batch_sizes.value_or(Tensor()), pass.output, pass.saved, found[kGradients]})
      kept.push_back(t);
    ctx->save_for_backward(std::move(kept));
    ctx->saved_data[kCell] = pass.cell;
    ctx->saved_data[kMade] = made;
    ctx->saved_data[kIsLinked] = pass.link.defined();
    ctx->set_materialize_grads(false);
    variable_list results;
    for (int k = 0; k < kGradients; ++k)
      if (pass.wanted[k]) results.push_back(found[k]);
    return results;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& cotangents) {
    variable_list result(1 + kVariables + 1);  // that of the pass first, that of the link last
    const variable_list t = ctx->get_saved_variables();
    const std::string cell = ctx->saved_data[kCell].toStringRef();
    const Wanted made{ctx->saved_data[kMade].toInt()};
    variable_list v(kGradients);
    bool changes = false;
    for (int k = 0, next = 0; k < kGradients; ++k)
      if (made(k)) changes |= (v[k] = cotangents[next++]).defined();
    if (!changes) return result;

    std::vector<bool> wanted(kVariables);
    int64_t needs = 0, edge = 0;
    for (int k = 0; k < kVariables; ++k)
      if (t[k].defined()) {
        wanted[k] = ctx->needs_input_grad(edge++);
        needs |= int64_t{wanted[k]} << k;
      }
    if (ctx->saved_data[kIsLinked].toBool())
      needs |= int64_t{ctx->needs_input_grad(edge)} << (kPassGradients + kAdds);
    const bool has_kernels = t[kDh].defined() && !is_looked_into();
    const variable_list found =
        has_kernels ? call_double_backward(cell, t, v, needs) : other_double_backward(cell, t, v, wanted);
    std::copy(found.begin(), found.end(), result.begin() + 1);
    return result;
  }
};

}  // namespace

bool is_transformed() {
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr;
}

bool is_looked_into() { return at::GradMode::is_enabled() || is_transformed(); }

Tensors14 call_layer_backward(const std::string& cell, const OptTensor& batch_sizes, const variable_list& g,
                              const variable_list& t, const Tensor& output, const Tensor& saved,
                              int64_t needs, const OptTensor& adds) {
  static const auto call = operator_of<decltype(layer_backward)>("fused_rnn::layer_backward");
  const auto opt = if_defined;
  return call.call(cell, opt(g[0]), opt(g[1]), opt(g[2]), opt(t[0]), batch_sizes, opt(t[1]), opt(t[2]), t[3],
                   t[4], opt(t[5]), opt(t[6]), opt(t[7]), opt(t[8]), opt(t[9]), opt(t[10]), opt(t[11]),
                   opt(t[12]), output, saved, needs, adds, {});
}

variable_list derivable_gradients(RecordedPass pass) {
  if (is_transformed()) return gradients_under_transform(pass);
  for (int k = 0; k < kGradients; ++k)
    if (!pass.arguments[k].defined()) pass.wanted[k] = false;
  pass.output = pass.output.detach(), pass.saved = pass.saved.detach();
  std::array<OptTensor, kVariables + 1> variables;
  for (int k = 0; k < kPassGradients; ++k) variables[k] = if_defined(pass.gradients[k]);
  for (int k = 0; k < kGradients; ++k) variables[kPassGradients + k] = if_defined(pass.arguments[k]);
  variables[kVariables] = if_defined(pass.link);
  const variable_list found =
      std::apply([&](const auto&... t) { return Derivable::apply(pass, t...); }, variables);
  variable_list result(kGradients);
  for (int k = 0, next = 0; k < kGradients; ++k)
    if (pass.wanted[k]) result[k] = found[next++];
  return result;
}

// (cell, batch_sizes, wanted, gradients, arguments, output, saved, link), as RecordedPass -> a list, None where not wanted.
PyObject* derivable_gradients_of(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(
      count == 8,
      "derivable_gradients: expected cell, batch_sizes, wanted, gradients, arguments, output, saved, link");
  const auto tensor = [](PyObject* item) {
    return item == Py_None ? Tensor() : pybind11::handle(item).cast<Tensor>();
  };
  RecordedPass pass{pybind11::handle(args[0]).cast<std::string>(),
                    if_defined(tensor(args[1])),
                    {},
                    from_python(args[3]),
                    from_python(args[4]),
                    tensor(args[5]),
                    tensor(args[6]),
                    tensor(args[7])};
  for (const pybind11::handle item : pybind11::handle(args[2])) pass.wanted.push_back(item.cast<bool>());
  TORCH_CHECK_VALUE(pass.wanted.size() == kGradients && pass.arguments.size() == kGradients &&
                        pass.gradients.size() == kPassGradients,
                    "derivable_gradients: expected ", kPassGradients, " gradients and ", kGradients,
                    " arguments, came ", pass.gradients.size(), " and ", pass.arguments.size());
  variable_list found;
  {
    const pybind11::gil_scoped_release unlocked;
    found = derivable_gradients(std::move(pass));
  }
  return as_python(found, 0, found.size()).release().ptr();
  END_HANDLE_TH_ERRORS
}

}  // namespace frnn
