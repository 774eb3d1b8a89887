// A value with its tangent: how it changes along one direction. On this type a cell's finish() and step_grad() give
// their own derivatives, so that no formula of the second order is written down.
//
// The derivative of a backward pass in a direction v, which is the product of its Hessian with v, is then one more
// pass forward and back: forward with the tangents of the states, backward with those of the gradients.
#pragma once

#include "math.h"

namespace frnn {
inline namespace FRNN_ISA {

template <class V>
struct Dual {
  V value, tangent;

  FRNN_HD Dual() {}
  FRNN_HD Dual(V value_, V tangent_) : value(value_), tangent(tangent_) {}
  explicit FRNN_HD Dual(int constant) : value(V(constant)), tangent(V(0)) {}

  friend FRNN_HD Dual operator+(Dual a, Dual b) { return {a.value + b.value, a.tangent + b.tangent}; }
  friend FRNN_HD Dual operator-(Dual a, Dual b) { return {a.value - b.value, a.tangent - b.tangent}; }
  friend FRNN_HD Dual operator*(Dual a, Dual b) {
    return {a.value * b.value, a.value * b.tangent + a.tangent * b.value};
  }
};

template <class V>
FRNN_HD Dual<V> tanh_(Dual<V> x) {
  const V y = tanh_(x.value);
  return {y, tanh_grad(y) * x.tangent};
}

template <class V>
FRNN_HD Dual<V> step_function(Dual<V> x) {
  return {step_function(x.value), V(0)};
}

}  // namespace FRNN_ISA
}  // namespace frnn
