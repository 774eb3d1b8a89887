// Elementary functions of the gates. The cells call sigmoid, tanh and relu on a value type V: a float or double
// here (host scalar or CUDA thread), a whole vector of units in csrc/cpu/vector.h, found by argument-dependent look-up.
#pragma once

#include <math.h>

#ifdef __CUDACC__
#define FRNN_HD __host__ __device__ __forceinline__
#else
#define FRNN_HD inline __attribute__((always_inline))
#endif

// The same templates are compiled once for each CPU instruction set. Were their names equal, the linker would keep
// one copy of each for all of them, perhaps one in AVX-512, and crash on a machine without it: so each set has its
// own namespace.
#ifndef FRNN_ISA
#define FRNN_ISA scalar
#endif

namespace frnn {
inline namespace FRNN_ISA {

FRNN_HD float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
FRNN_HD double sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }

// Named so as not to be ambiguous with ::tanh of the C library.
FRNN_HD float tanh_(float x) { return tanhf(x); }
FRNN_HD double tanh_(double x) { return ::tanh(x); }

// NaN passes through, as in torch.
FRNN_HD float relu(float x) { return x < 0.0f ? 0.0f : x; }
FRNN_HD double relu(double x) { return x < 0.0 ? 0.0 : x; }

FRNN_HD float step_function(float x) { return x <= 0.0f ? 0.0f : 1.0f; }
FRNN_HD double step_function(double x) { return x <= 0.0 ? 0.0 : 1.0; }

// Derivatives written in the function's own output y, so that no pre-activation has to be saved.
template <class V>
FRNN_HD V sigmoid_grad(V y) {
  return y * (V(1) - y);
}
template <class V>
FRNN_HD V tanh_grad(V y) {
  return V(1) - y * y;
}

}  // namespace FRNN_ISA
}  // namespace frnn
