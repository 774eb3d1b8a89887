// What a persistent kernel's cells compute with: float, but the exponential and the reciprocal are those of the
// special-function unit. A step cannot be shorter than its cells take, and the exact functions take three times as many
// instructions. Their error is below 2^-18 of the result, and so below a rounding of any product that these kernels make;
// but for products in true float32, whose cells have the exact functions, all but the last bit of a reciprocal.
#pragma once

#include <type_traits>

#include "../cells/cells.h"
#include "../dtypes.h"
#include "ptx.cuh"

namespace frnn {

// T: the numbers that the kernel stores.
template <class T>
struct CellNumber {
  float value;
  CellNumber() = default;
  __device__ __forceinline__ explicit CellNumber(float x) : value(x) {}
};

template <class T>
__device__ __forceinline__ CellNumber<T> operator+(CellNumber<T> a, CellNumber<T> b) {
  return CellNumber<T>(a.value + b.value);
}
template <class T>
__device__ __forceinline__ CellNumber<T> operator-(CellNumber<T> a, CellNumber<T> b) {
  return CellNumber<T>(a.value - b.value);
}
template <class T>
__device__ __forceinline__ CellNumber<T> operator*(CellNumber<T> a, CellNumber<T> b) {
  return CellNumber<T>(a.value * b.value);
}

// The cells find these by their argument; see csrc/cells/math.h. An infinite exponential ends as 0 or -1, and NaN as NaN.
template <class T>
__device__ __forceinline__ CellNumber<T> sigmoid(CellNumber<T> x) {
  constexpr float kLog2E = 1.4426950408889634f;
  const float power = std::is_same_v<T, Exact> ? expf(-x.value) : exp2_approximate(-kLog2E * x.value);
  return CellNumber<T>(reciprocal_approximate(1.0f + power));
}
template <class T>
__device__ __forceinline__ CellNumber<T> tanh_(CellNumber<T> x) {
  if constexpr (std::is_same_v<T, Exact>) {
    return CellNumber<T>(tanh_(x.value));
  } else {
    constexpr float kLog2E = 1.4426950408889634f;
    const float far = 1.0f - 2.0f * reciprocal_approximate(1.0f + exp2_approximate(2.0f * kLog2E * x.value));
    // There a difference of nearly equal numbers would be left of it.
    const float near = x.value - x.value * (x.value * x.value * (1.0f / 3.0f));
    return CellNumber<T>(fabsf(x.value) < 1.0f / 16.0f ? near : far);
  }
}
template <class T>
__device__ __forceinline__ CellNumber<T> relu(CellNumber<T> x) {
  return CellNumber<T>(relu(x.value));
}
template <class T>
__device__ __forceinline__ CellNumber<T> step_function(CellNumber<T> x) {
  return CellNumber<T>(step_function(x.value));
}

}  // namespace frnn
