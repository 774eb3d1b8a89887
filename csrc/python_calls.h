// Functions of the module `fused_rnn._C` that take tensors: written in csrc/ops, added to the module by module.cpp,
// neither of which may include the other.
#pragma once

#include <Python.h>

namespace frnn {

extern PyMethodDef kTensorFunctions[];  // ends with an empty entry

}  // namespace frnn
