// The LSTM of torch.nn.LSTM, gates in its order:
//   i, f, g, o = sigmoid, sigmoid, tanh, sigmoid (W_ih x + b_ih + W_hh h + b_hh),   c' = f * c + i * g,
//   h' = o * tanh(c').
#pragma once

#include "math.h"

namespace frnn {
inline namespace FRNN_ISA {

// What every cell of this folder provides:
//   kGates      blocks of hidden_size rows in weight_ih and weight_hh
//   kSaved      values a unit that step() hands to step_grad() (`saved`)
//   kGateGrads  values a unit that step_grad() returns; the first kGates of them belong to the recurrent product
//   kExponentials, kGradExponentials  sigmoids and tanhs a unit of step() and of step_grad(): what they cost a GPU
//   step        x, h: the kGates pre-activations from the input and from the hidden state, biases included;
//               h_prev: this unit's own h_{t-1}; state: the cell state, in place. Returns h_t.
//   finish      the end of step, once the gates are in `saved`
//   gates_tangent  x, h: changes of the pre-activations; `tangent`: those of the gates in `saved`. dual.h carries them
//               on through finish and step_grad
//   step_grad   dh: gradient of h_t; carry: what this unit's step t+1 left for step t, replaced by what step t
//               leaves for t-1 (LSTM: the gradient of the cell state). Writes dgates.
// Values that a cell does not need (kGradReadsOutput, kReadsPreviousHidden, ... false) are not loaded for it.
struct Lstm {
  static constexpr int kGates = 4;
  static constexpr int kSaved = 5;  // i, f, g, o, c'
  static constexpr int kGateGrads = 4;
  static constexpr int kExponentials = 5, kGradExponentials = 1;
  static constexpr bool kHasCellState = true;
  static constexpr bool kHasCarry = true;
  static constexpr bool kGradReadsOutput = false;
  static constexpr bool kReadsPreviousHidden = false;
  static constexpr int kSavedCell = 4;    // where c' lies in `saved`
  static constexpr int kSavedOutput = 3;  // where o lies in `saved`

  template <class V>
  static FRNN_HD V step(const V* x, const V* h, V, V& state, V* saved) {
    saved[0] = sigmoid(x[0] + h[0]);
    saved[1] = sigmoid(x[1] + h[1]);
    saved[2] = tanh_(x[2] + h[2]);
    saved[3] = sigmoid(x[3] + h[3]);
    return finish(saved, V(0), state);
  }

  template <class V>
  static FRNN_HD V finish(V* saved, V, V& state) {
    const V i = saved[0], f = saved[1], g = saved[2], o = saved[3];
    state = f * state + i * g;
    saved[4] = state;
    return o * tanh_(state);
  }

  template <class V>
  static FRNN_HD void gates_tangent(const V* saved, const V* x, const V* h, V* tangent) {
    tangent[0] = sigmoid_grad(saved[0]) * (x[0] + h[0]);
    tangent[1] = sigmoid_grad(saved[1]) * (x[1] + h[1]);
    tangent[2] = tanh_grad(saved[2]) * (x[2] + h[2]);
    tangent[3] = sigmoid_grad(saved[3]) * (x[3] + h[3]);
  }

  template <class V>
  static FRNN_HD void step_grad(const V* saved, V, V, V c_prev, V dh, V& carry, V* dgates) {
    const V i = saved[0], f = saved[1], g = saved[2], o = saved[3];
    const V tanh_c = tanh_(saved[4]);
    const V dc = carry + dh * o * tanh_grad(tanh_c);
    dgates[0] = dc * g * sigmoid_grad(i);
    dgates[1] = dc * c_prev * sigmoid_grad(f);
    dgates[2] = dc * i * tanh_grad(g);
    dgates[3] = dh * tanh_c * sigmoid_grad(o);
    carry = dc * f;
  }
};

}  // namespace FRNN_ISA
}  // namespace frnn
