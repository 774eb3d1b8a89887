// The GRU of torch.nn.GRU, reset gate applied after the recurrent product:
//   r, z = sigmoid(W_i[rz] x + b_i[rz] + W_h[rz] h + b_h[rz]),   n = tanh(W_in x + b_in + r * (W_hn h + b_hn)),
//   h' = (1 - z) * n + z * h.
#pragma once

#include "math.h"

namespace frnn {
inline namespace FRNN_ISA {

struct Gru {
  static constexpr int kGates = 3;
  static constexpr int kSaved = 4;  // r, z, n, and q = W_hn h + b_hn
  // r, z, q, n: the candidate's gradient differs on the recurrent side (q) and on the input side (n). The first
  // three are the gradient of the recurrent product, in the order of the rows of weight_hh.
  static constexpr int kGateGrads = 4;
  static constexpr int kExponentials = 3, kGradExponentials = 0;
  static constexpr bool kHasCellState = false;
  static constexpr bool kHasCarry = true;  // z * dh, which goes to h_{t-1} past the product
  static constexpr bool kGradReadsOutput = false;
  static constexpr bool kReadsPreviousHidden = true;

  // See lstm.h for the contract that the cells share.
  template <class V>
  static FRNN_HD V step(const V* x, const V* h, V h_prev, V& state, V* saved) {
    saved[0] = sigmoid(x[0] + h[0]);
    saved[1] = sigmoid(x[1] + h[1]);
    saved[2] = tanh_(x[2] + saved[0] * h[2]);
    saved[3] = h[2];
    return finish(saved, h_prev, state);
  }

  template <class V>
  static FRNN_HD V finish(V* saved, V h_prev, V&) {
    const V z = saved[1], n = saved[2];
    return n + z * (h_prev - n);
  }

  template <class V>
  static FRNN_HD void gates_tangent(const V* saved, const V* x, const V* h, V* tangent) {
    const V r = saved[0], q = saved[3];
    tangent[0] = sigmoid_grad(r) * (x[0] + h[0]);
    tangent[1] = sigmoid_grad(saved[1]) * (x[1] + h[1]);
    tangent[2] = tanh_grad(saved[2]) * (x[2] + r * h[2] + tangent[0] * q);
    tangent[3] = h[2];
  }

  template <class V>
  static FRNN_HD void step_grad(const V* saved, V, V h_prev, V, V dh, V& carry, V* dgates) {
    const V r = saved[0], z = saved[1], n = saved[2], q = saved[3];
    dh = dh + carry;
    const V dn = dh * (V(1) - z) * tanh_grad(n);
    dgates[0] = dn * q * sigmoid_grad(r);
    dgates[1] = dh * (h_prev - n) * sigmoid_grad(z);
    dgates[2] = dn * r;
    dgates[3] = dn;
    carry = dh * z;
  }
};

}  // namespace FRNN_ISA
}  // namespace frnn
