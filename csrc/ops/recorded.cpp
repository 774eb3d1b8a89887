// What autograd.Layer and autograd.Cell of fused_rnn/autograd.py do, for calls straight from Python (at_once.h): a
// Function in C++ costs a third of one in Python. A backward pass that is itself recorded or transformed goes on in
// derivable.cpp.
#include <ATen/SavedTensorHooks.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/graph_task.h>

#include <algorithm>
#include <array>

#include "at_once.h"
#include "derivable.h"

namespace frnn {
namespace {

using torch::autograd::AutogradContext;

constexpr int kCellArguments = 7;  // the first ones: a cell has one direction, and no projection
// Of what is saved, behind the arguments.
enum { kOutput = kRecordedArguments, kSaved, kLink, kSavedTensors };
// Keys of what is kept beside tensors.
constexpr const char *kCell = "cell", *kIsCell = "is_cell", *kUnseen = "unseen";

struct Call {
  const std::string& cell;
  bool is_cell;
};

// Whether the backward pass that runs now is the only reader of what was saved, in one call of the operator.
bool read_once(const variable_list& gradients, const variable_list& saved) {
  const auto plain = [](const Tensor& t) { return !t.defined() || is_plain(t); };
  return !torch::autograd::get_current_graph_task_keep_graph() &&
         c10::impl::TorchDispatchModeTLS::stack_len() == 0 &&
         std::all_of(gradients.begin(), gradients.end(), plain) &&
         std::all_of(saved.begin(), saved.end(), plain);
}

Tensors7 call_cell_backward(const std::string& cell, const variable_list& g, const variable_list& t,
                            int64_t needs) {
  static const auto call = operator_of<decltype(cell_backward)>("fused_rnn::cell_backward");
  const auto opt = if_defined;
  return call.call(cell, opt(g[0]), opt(g[1]), opt(t[0]), opt(t[1]), opt(t[2]), t[3], t[4], opt(t[5]),
                   opt(t[6]), t[kOutput], t[kSaved], needs);
}

template <class Found>
void put(const Found& found, variable_list& result) {
  std::apply(
      [&](const auto&... t) {
        size_t k = 0;
        ((k < kRecordedArguments ? void(result[++k] = t) : void()), ...);
      },
      found);
}

// The last result of a layer's Function: not a number of it is ever read, but its gradient carries what a second
// derivative adds to the pass back (RecordedPass). Undefined where there are no kernels for that, and where hooks would
// take it for data.
Tensor link_of(const Tensor& output, const Tensor& saved, const RecordedArguments& t,
               const CellTraits& cell) {
  if (!output.is_cpu() || output.numel() == 0 || !at::SavedTensorDefaultHooks::get_tls_state().stack.empty())
    return {};
  const int64_t H = t[kFirstWeight + kWhh]->size(0) / cell.gates, Hr = t[kFirstWeight + kWhh]->size(1);
  const int64_t rows = output.numel() / output.size(-1);
  // Over the memory of the output, in the dtype of sums.
  Tensor link = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(output.storage()), c10::DispatchKeySet(c10::DispatchKey::CPU), saved.dtype());
  const std::array<int64_t, 2> sizes{saved.size(0), rows * adds_columns(cell, H, Hr)}, strides{};
  link.unsafeGetTensorImpl()->set_sizes_and_strides(at::IntArrayRef(sizes), at::IntArrayRef(strides));
  return link;
}

// A cell's as that of a layer of one step: what has rows gets a dimension in front.
RecordedPass pass_of(const Call& call, const variable_list& gradients, const variable_list& t,
                     const std::vector<bool>& wanted) {
  RecordedPass pass{call.cell,
                    {},
                    wanted,
                    gradients,
                    {t.begin(), t.begin() + wanted.size()},
                    t[kOutput],
                    t[kSaved],
                    torch::autograd::get_current_graph_task_keep_graph() ? t[kLink] : Tensor()};
  pass.wanted.resize(kRecordedArguments);
  pass.arguments.resize(kRecordedArguments);
  if (!call.is_cell) return pass;
  const at::AutoGradMode recorded(true);  // whatever is differentiated, they require grad as a layer's do
  pass.gradients.insert(pass.gradients.begin(), Tensor());  // a cell has no output but h
  for (variable_list* rows : {&pass.gradients, &pass.arguments})
    for (int k = 0; k < kFirstWeight; ++k)
      if (Tensor& tensor = (*rows)[k]; tensor.defined()) tensor = tensor.unsqueeze(0);
  pass.output = pass.output.unsqueeze(0);
  return pass;
}

struct Recorded : torch::autograd::Function<Recorded> {
  // Compiled autograd takes the backward pass into its graph: it looks at no data, and calls operators alone.
  static constexpr bool is_traceable = true;

  template <class... Given>
  static variable_list forward(AutogradContext* ctx, const Call& call, const Given&... given) {
    const RecordedArguments t{given...};
    const CellTraits traits = cell_traits(call.cell);
    variable_list results;
    Tensor saved;
    if (call.is_cell) {
      results.resize(2);
      std::tie(results[0], results[1], saved) =
          cell_forward(call.cell, *t[0], t[1], t[2], *t[3], *t[4], t[5], t[6], true);
    } else {
      results.resize(3);
      std::tie(results[0], results[1], results[2], saved) =
          layer_forward(call.cell, *t[0], {}, t[1], t[2], *t[3], *t[4], t[5], t[6], t[7], t[8], t[9], t[10],
                        t[11], t[12], true, {});
    }
    if (!traits.cell_state) results.pop_back();
    const Tensor link = call.is_cell ? Tensor() : link_of(results[0], saved, t, traits);
    if (link.defined()) results.push_back(link);

    variable_list kept;
    kept.reserve(kSavedTensors);
    for (const OptTensor& tensor : t) kept.push_back(tensor.value_or(Tensor()));
    constexpr int kWeights = kFirstWeight;  // of the first direction
    const auto varies = [&](int k) { return kept[k].defined() && kept[k].requires_grad(); };
    if (!varies(kInput) && !varies(kWeights + kWih) && !varies(kWeights + kWeightCount + kWih))
      kept[kInput] = Tensor();
    for (const Tensor& tensor : {results[0], saved, link}) kept.push_back(tensor);
    ctx->save_for_backward(std::move(kept));
    ctx->saved_data[kCell] = call.cell;
    ctx->saved_data[kIsCell] = call.is_cell;
    // Where as much is saved as the gates' gradients take, they may lie in its place, unless a hook has seen it.
    ctx->saved_data[kUnseen] = !call.is_cell && traits.saved >= traits.gate_grads &&
                               at::SavedTensorDefaultHooks::get_tls_state().stack.empty();
    ctx->set_materialize_grads(false);
    return results;
  }

  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    variable_list result(1 + kRecordedArguments);  // that of the call first
    const auto absent = [](const Tensor& g) { return !g.defined(); };
    if (std::all_of(gradients.begin(), gradients.end(), absent)) return result;
    const variable_list t = ctx->get_saved_variables();
    const std::string cell = ctx->saved_data[kCell].toStringRef();
    const bool is_cell = ctx->saved_data[kIsCell].toBool();
    Tensor adds;
    if (t[kLink].defined()) {
      adds = gradients.back();
      gradients.pop_back();
    }
    gradients.resize(is_cell ? 2 : 3);

    std::vector<bool> wanted(is_cell ? kCellArguments : kRecordedArguments);
    int64_t needs = 0;
    for (size_t k = 0, edge = 0; k < wanted.size(); ++k) {
      if (k > 0 && !t[k].defined()) continue;  // the input alone is always there, whether it was kept or not
      wanted[k] = ctx->needs_input_grad(edge++);
      needs |= int64_t{wanted[k]} << k;
    }
    if (is_looked_into()) {
      TORCH_INTERNAL_ASSERT(!adds.defined(),
                            "fused_rnn: a second derivative without a graph met a pass with one");
      const variable_list found = derivable_gradients(pass_of({cell, is_cell}, gradients, t, wanted));
      for (size_t k = 0; k < wanted.size(); ++k)
        result[k + 1] = is_cell && k < kFirstWeight && found[k].defined() ? found[k].squeeze(0) : found[k];
    } else if (is_cell) {
      put(call_cell_backward(cell, gradients, t, needs), result);
    } else {
      if (ctx->saved_data[kUnseen].toBool() && read_once(gradients, t)) {
        needs |= int64_t{1} << kSavedIsSpent;
        // Whatever happens from here on, no second pass may read it: torch says that it was changed in place.
        t[kSaved].unsafeGetTensorImpl()->bump_version();
      }
      put(call_layer_backward(cell, {}, gradients, t, t[kOutput], t[kSaved], needs, if_defined(adds)),
          result);
    }
    return result;
  }
};

}  // namespace

std::vector<Tensor> recorded(const std::string& cell, bool is_cell, const RecordedArguments& arguments) {
  return std::apply([&](const auto&... t) { return Recorded::apply(Call{cell, is_cell}, t...); }, arguments);
}

}  // namespace frnn
