// A call straight from Python. At a batch of one the way through a module's checks and torch's dispatcher costs as much
// as a step itself. Such a call answers only when nothing listens on that way: no autocast, no transform, mode, trace or
// profiler, and plain tensors alone. Then the dispatcher would come to the same function. Anything else it declines, the
// errors of bad input included, and fused_rnn/cells.py and modules.py go the long way. Autograd may listen
// (recorded.cpp).
#pragma once

#include <Python.h>

#include <array>
#include <string>
#include <vector>

#include "ops.h"

namespace frnn {

// Whether some feature of this thread would have a say in an operator's call.
bool someone_listens();

// Whether a tensor's numbers lie on a device with kernels, with nothing special about them.
bool is_plain(const Tensor& tensor);
// The tensor of a Python object that is torch.Tensor or Parameter itself, and plain. Null for anything else.
const Tensor* plain_tensor(PyObject* object);
// Whether a tensor has the input's dtype and device; null has.
bool goes_with(const Tensor* tensor, const Tensor& input);

// h0 or, of a cell with a cell state, (h0, c0); both stay null for None. False if they are anything else.
bool find_states(PyObject* hx, bool cell_state, const Tensor*& h0, const Tensor*& c0);

// Whether the kernels take this dtype.
bool has_kernels(at::ScalarType dtype);
// Whether autograd records what is done to it; not to null.
bool is_recorded(const Tensor* tensor);

inline OptTensor optional(const Tensor* tensor) { return tensor ? OptTensor(*tensor) : OptTensor(); }

// A tuple that takes over the references of its items; null, with Python's error set, if one of them is.
PyObject* tuple_of(PyObject* first, PyObject* second);

// input, h0, c0, then the weights of both directions as in `layer_forward`; absent where there is none.
constexpr size_t kRecordedArguments = 13;
using RecordedArguments = std::array<OptTensor, kRecordedArguments>;
// A cell's step or a layer's pass with gradients: h, and c of a cell with a cell state; or output, hn and that c.
std::vector<Tensor> recorded(const std::string& cell, bool is_cell, const RecordedArguments& arguments);

// Makes hooks on one of several results of a Function hear of its own gradient alone (own_node.cpp). Not recorded: nothing.
void give_own_node(const Tensor& result);

PyObject* give_own_nodes(PyObject*, PyObject* const* args, Py_ssize_t count);
PyObject* cell_at_once(PyObject*, PyObject* const* args, Py_ssize_t count);
PyObject* layer_at_once(PyObject*, PyObject* const* args, Py_ssize_t count);

}  // namespace frnn
