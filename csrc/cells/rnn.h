// The Elman cell of torch.nn.RNN: h' = act(W_ih x + b_ih + W_hh h + b_hh), act = tanh or relu.
#pragma once

#include "math.h"

namespace frnn {
inline namespace FRNN_ISA {

struct Tanh {
  static constexpr int kExponentials = 1;
  template <class V>
  static FRNN_HD V apply(V x) {
    return tanh_(x);
  }
  template <class V>
  static FRNN_HD V grad(V y) {
    return tanh_grad(y);
  }
};

struct Relu {
  static constexpr int kExponentials = 0;
  template <class V>
  static FRNN_HD V apply(V x) {
    return relu(x);
  }
  template <class V>
  static FRNN_HD V grad(V y) {
    return step_function(y);
  }
};

template <class Activation>
struct Rnn {
  static constexpr int kGates = 1;
  static constexpr int kSaved = 0;  // the output, which is its gate too, is enough for the backward pass
  static constexpr int kGateGrads = 1;
  static constexpr int kExponentials = Activation::kExponentials, kGradExponentials = 0;
  static constexpr bool kHasCellState = false;
  static constexpr bool kHasCarry = false;
  static constexpr bool kGradReadsOutput = true;
  static constexpr bool kReadsPreviousHidden = false;

  // See lstm.h for the contract that the cells share.
  template <class V>
  static FRNN_HD V step(const V* x, const V* h, V h_prev, V& state, V* saved) {
    saved[0] = Activation::apply(x[0] + h[0]);
    return finish(saved, h_prev, state);
  }

  template <class V>
  static FRNN_HD V finish(V* saved, V, V&) {
    return saved[0];
  }

  template <class V>
  static FRNN_HD void gates_tangent(const V* saved, const V* x, const V* h, V* tangent) {
    tangent[0] = Activation::grad(saved[0]) * (x[0] + h[0]);
  }

  template <class V>
  static FRNN_HD void step_grad(const V*, V output, V, V, V dh, V&, V* dgates) {
    dgates[0] = dh * Activation::grad(output);
  }
};

using RnnTanh = Rnn<Tanh>;
using RnnRelu = Rnn<Relu>;

}  // namespace FRNN_ISA
}  // namespace frnn
