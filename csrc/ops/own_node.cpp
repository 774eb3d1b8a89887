// A node of autograd's graph for each result of a Function that has several. To a hook on one of them the engine shows
// what has come to it, None where gradients have come to the others alone; torch.nn's results, each made by an operation
// of its own, are not reached then. The node is that of an alias, but no result becomes a view: a view cannot be
// detached in place, as states between two pieces of a sequence are.
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/generated/Functions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <memory>
#include <type_traits>

#include "at_once.h"

namespace frnn {
namespace {

// As the pointers to nodes are in this torch.
template <class Pointer>
Pointer make_identity() {
  using Identity = torch::autograd::generated::AliasBackward0;
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>)
    return std::make_shared<Identity>();
  else
    return c10::make_intrusive<Identity>();
}

}  // namespace

void give_own_node(const Tensor& result) {
  if (!result.defined() || !result.grad_fn()) return;
  using Pointer = std::decay_t<decltype(result.grad_fn())>;
  const Pointer node = make_identity<Pointer>();
  node->set_next_edges({torch::autograd::impl::gradient_edge(result)});
  torch::autograd::set_history(result, node);
}

PyObject* give_own_nodes(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  for (Py_ssize_t k = 0; k < count; ++k) {
    if (args[k] == Py_None) continue;
    TORCH_CHECK_TYPE(THPVariable_Check(args[k]), "give_own_nodes: expected tensors");
    give_own_node(THPVariable_Unpack(args[k]));
  }
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

}  // namespace frnn
