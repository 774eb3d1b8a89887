// What autograd.Cell of fused_rnn/autograd.py does, for calls straight from Python (at_once.h): a Function in C++ costs
// a third of one in Python. A backward pass that is itself recorded, or transformed, goes on in Python.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/utils/pybind.h>

#include "at_once.h"
#include "gradients.h"

namespace frnn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr int kArguments = 7;  // input, h0, c0, w_ih, w_hh, b_ih, b_hh
constexpr const char* kCell = "cell";

bool looked_into() {
  return at::GradMode::is_enabled() ||
         c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr;
}

OptTensor optional(const Tensor& tensor) { return tensor.defined() ? OptTensor(tensor) : OptTensor(); }

// By way of the dispatcher: gradients may be anything that a tensor can be, and modes may listen by now.
Tensors7 call_cell_backward(std::string_view cell, const Tensor& grad_h, const Tensor& grad_c,
                            const variable_list& t, int64_t needs) {
  static const auto call = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("fused_rnn::cell_backward", "")
                               .typed<decltype(cell_backward)>();
  return call.call(cell, optional(grad_h), optional(grad_c), optional(t[0]), optional(t[1]), optional(t[2]),
                   t[3], t[4], optional(t[5]), optional(t[6]), t[7], t[8], needs);
}

// Gradients that can be differentiated again: transforms.cell_gradients.
variable_list open_gradients(const std::string& cell, const variable_list& gradients, const variable_list& t,
                             const std::array<bool, kArguments>& wanted) {
  const pybind11::gil_scoped_acquire locked;
  const auto list = [](auto first, auto last) {
    pybind11::list items;
    for (; first != last; ++first) items.append(*first);
    return items;
  };
  const pybind11::object found =
      pybind11::module_::import("fused_rnn.transforms")
          .attr("cell_gradients")(cell, pybind11::tuple(list(wanted.begin(), wanted.end())),
                                  list(gradients.begin(), gradients.end()),
                                  list(t.begin(), t.begin() + kArguments), t[7], t[8]);
  variable_list result;
  for (const pybind11::handle item : found) result.push_back(item.is_none() ? Tensor() : item.cast<Tensor>());
  return result;
}

struct CellFunction : torch::autograd::Function<CellFunction> {
  static variable_list forward(AutogradContext* ctx, const std::string& cell, const Tensor& input,
                               const OptTensor& h0, const OptTensor& c0, const Tensor& w_ih,
                               const Tensor& w_hh, const OptTensor& b_ih, const OptTensor& b_hh) {
    auto [h, c, saved] = cell_forward(cell, input, h0, c0, w_ih, w_hh, b_ih, b_hh, true);
    const auto get = [](const OptTensor& t) { return t.value_or(Tensor()); };
    const Tensor kept = input.requires_grad() || w_ih.requires_grad() ? input : Tensor();
    ctx->saved_data[kCell] = cell;
    ctx->save_for_backward({kept, get(h0), get(c0), w_ih, w_hh, get(b_ih), get(b_hh), h, saved});
    ctx->set_materialize_grads(false);
    return cell_traits(cell).cell_state ? variable_list{h, c} : variable_list{h};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& given) {
    const variable_list t = ctx->get_saved_variables();
    const std::string cell = ctx->saved_data[kCell].toStringRef();
    const variable_list gradients{given[0], given.size() > 1 ? given[1] : Tensor()};
    variable_list result(1 + kArguments);  // that of the cell's name first
    if (!gradients[0].defined() && !gradients[1].defined()) return result;

    std::array<bool, kArguments> wanted{};
    int64_t needs = 0;
    for (size_t k = 0, edge = 0; k < kArguments; ++k) {
      if (k > 0 && !t[k].defined()) continue;  // the input alone is always there, whether it was kept or not
      wanted[k] = ctx->needs_input_grad(edge++);
      needs |= int64_t{wanted[k]} << k;
    }
    if (looked_into()) {
      const variable_list found = open_gradients(cell, gradients, t, wanted);
      std::copy(found.begin(), found.end(), result.begin() + 1);
    } else {
      std::tie(result[1], result[2], result[3], result[4], result[5], result[6], result[7]) =
          call_cell_backward(cell, gradients[0], gradients[1], t, needs);
    }
    return result;
  }
};

}  // namespace

std::pair<Tensor, Tensor> recorded_cell(const std::string& cell, const Tensor& input, const OptTensor& h0,
                                        const OptTensor& c0, const Tensor& w_ih, const Tensor& w_hh,
                                        const OptTensor& b_ih, const OptTensor& b_hh) {
  variable_list results = CellFunction::apply(cell, input, h0, c0, w_ih, w_hh, b_ih, b_hh);
  return {results[0], results.size() > 1 ? results[1] : Tensor()};
}

}  // namespace frnn
