// What a persistent kernel's cells compute with: float, but the exponential and the reciprocal are those of the
// special-function unit. A step cannot be shorter than its cells take, and the exact functions take three times as many
// instructions. Their error is below 2^-18 of the result, and so below a rounding of any product that these kernels make.
#pragma once

#include "../cells/cells.h"
#include "ptx.cuh"

namespace frnn {

struct Approximate {
  float value;
  Approximate() = default;
  __device__ __forceinline__ explicit Approximate(float x) : value(x) {}
};

__device__ __forceinline__ Approximate operator+(Approximate a, Approximate b) {
  return Approximate(a.value + b.value);
}
__device__ __forceinline__ Approximate operator-(Approximate a, Approximate b) {
  return Approximate(a.value - b.value);
}
__device__ __forceinline__ Approximate operator*(Approximate a, Approximate b) {
  return Approximate(a.value * b.value);
}

// The cells find these by their argument; see csrc/cells/math.h. An infinite exponential ends as 0 or -1, and NaN as NaN.
__device__ __forceinline__ Approximate sigmoid(Approximate x) {
  constexpr float kLog2E = 1.4426950408889634f;
  return Approximate(reciprocal_approximate(1.0f + exp2_approximate(-kLog2E * x.value)));
}
__device__ __forceinline__ Approximate tanh_(Approximate x) {
  constexpr float kLog2E = 1.4426950408889634f;
  const float far = 1.0f - 2.0f * reciprocal_approximate(1.0f + exp2_approximate(2.0f * kLog2E * x.value));
  // There a difference of nearly equal numbers would be left of it.
  const float near = x.value - x.value * (x.value * x.value * (1.0f / 3.0f));
  return Approximate(fabsf(x.value) < 1.0f / 16.0f ? near : far);
}
__device__ __forceinline__ Approximate relu(Approximate x) { return Approximate(relu(x.value)); }
__device__ __forceinline__ Approximate step_function(Approximate x) {
  return Approximate(step_function(x.value));
}

}  // namespace frnn
