// A call straight from Python. At a batch of one the way through a module's checks and torch's dispatcher costs as much
// as a step itself. Such a call answers only when nothing listens on that way: no autocast, no transform, mode, trace or
// profiler, and plain tensors alone. Then the dispatcher would come to the same function. Anything else it declines, the
// errors of bad input included, and fused_rnn/cells.py and modules.py go the long way. Autograd listens to a cell alone
// (cell_autograd.cpp).
#pragma once

#include <Python.h>

#include <string>
#include <utility>

#include "ops.h"

namespace frnn {

// Whether some feature of this thread would have a say in an operator's call.
bool someone_listens();

// The tensor of a Python object that is torch.Tensor or Parameter itself, on the CPU, with nothing special about it.
// Null for anything else.
const Tensor* plain_tensor(PyObject* object);

// h0 or, of a cell with a cell state, (h0, c0); both stay null for None. False if they are anything else.
bool find_states(PyObject* hx, bool cell_state, const Tensor*& h0, const Tensor*& c0);

// Whether the kernels take this dtype.
bool has_kernels(at::ScalarType dtype);
// Whether autograd records what is done to it; not to null.
bool is_recorded(const Tensor* tensor);

inline OptTensor optional(const Tensor* tensor) { return tensor ? OptTensor(*tensor) : OptTensor(); }

// A tuple that takes over the references of its items; null, with Python's error set, if one of them is.
PyObject* tuple_of(PyObject* first, PyObject* second);

// A cell's step with gradients: h, and c of a cell with a cell state.
std::pair<Tensor, Tensor> recorded_cell(const std::string& cell, const Tensor& input, const OptTensor& h0,
                                        const OptTensor& c0, const Tensor& w_ih, const Tensor& w_hh,
                                        const OptTensor& b_ih, const OptTensor& b_hh);

PyObject* cell_at_once(PyObject*, PyObject* const* args, Py_ssize_t count);
PyObject* layer_at_once(PyObject*, PyObject* const* args, Py_ssize_t count);

}  // namespace frnn
