// The backward pass of a layer that is itself recorded (create_graph=True): its gradients, open to a further derivative.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <Python.h>
#include <torch/csrc/autograd/custom_function.h>

#include <string>
#include <vector>

#include "gradients.h"

namespace frnn {

using torch::autograd::variable_list;

struct RecordedPass {
  std::string cell;
  OptTensor batch_sizes;
  std::vector<bool> wanted;  // [kGradients], of the gradients of `arguments`
  variable_list gradients;   // of output, hn and cn; undefined: zero
  variable_list arguments;   // [kGradients], as in `layer_forward`; undefined where absent
  // Of the pass forward: constants; what derives from them counts through the arguments.
  Tensor output, saved;
  // A result of the Function that made the pass forward, or undefined. What the second derivative adds to a backward pass
  // (`adds` in library.cpp) is its gradient: so it joins the pass that the loss itself sends back through that Function.
  Tensor link;
};

// By argument; undefined where not wanted.
variable_list derivable_gradients(RecordedPass pass);

// By way of the dispatcher: tensors may be anything that a tensor can be, and modes may listen.
template <class Signature>
auto operator_of(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// layer_backward. Gradients and arguments as in RecordedPass; of the latter the first ones are read.
Tensors14 call_layer_backward(const std::string& cell, const OptTensor& batch_sizes,
                              const variable_list& gradients, const variable_list& arguments,
                              const Tensor& output, const Tensor& saved, int64_t needs,
                              const OptTensor& adds = {});

// Whether the backward pass that runs now meets a transform or carries tangents; whether anything has to do with it but
// the numbers.
bool is_transformed();
bool is_looked_into();

// An undefined tensor is an absent one.
inline OptTensor if_defined(const Tensor& tensor) {
  return tensor.defined() ? OptTensor(tensor) : OptTensor();
}

PyObject* derivable_gradients_of(PyObject*, PyObject* const* args, Py_ssize_t count);

}  // namespace frnn
