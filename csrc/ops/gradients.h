// What the operators of first and second derivatives share: the order of a layer's gradients, and where in `dgates`
// those of its two sides lie.
#pragma once

#include <array>

#include "scan.h"

namespace frnn {

// Order of the gradients in the results and in the bits of `needs`.
enum Gradient { kInput, kH0, kC0, kFirstWeight };
enum WeightGradient { kWih, kWhh, kBih, kBhh, kWhr, kWeightCount };

constexpr int kGradients = kFirstWeight + 2 * kWeightCount;
// Bits of `needs` above those of the gradients: of layer_backward, of layer_double_backward.
enum { kStateGradients = kGradients, kSavedIsSpent };
enum { kAdds = kGradients };

struct Wanted {
  int64_t bits;
  bool operator()(int gradient) const { return (bits >> gradient) & 1; }
  bool weight(int64_t d, int which) const {
    return (*this)(static_cast<int>(kFirstWeight + d * kWeightCount + which));
  }
};

// Undefined where not wanted.
using Gradients = std::array<Tensor, kGradients>;

// Of a call without rows or units (backward.cpp).
Gradients gradients_of_nothing(const Problem& p, const Wanted& wanted);

// All Adds in one tensor, [D, N * adds_columns]: a direction's parts one after another.
inline int64_t adds_columns(const CellTraits& cell, int64_t H, int64_t Hr) {
  return (cell.gate_grads + cell.carry) * H + Hr;
}
Adds adds_in(const Problem& p, const Tensor& all);

// What follows a backward scan: the gradients of direction d's weights, at their places in `gradients`; that of the
// input (backward.cpp).
void add_weight_gradients(const Problem& p, const BackwardTensors& t, int64_t d, const Wanted& wanted,
                          Tensor* gradients);
Tensor input_gradient(const Problem& p, const BackwardTensors& t);

// Of direction d, h of every row before its projection, [N, H] (backward.cpp). saved: [D, N, kSaved*H]
Tensor hidden_of(const Problem& p, const Tensor& saved, int64_t d);

// The columns of dgates that belong to the input side, and the rows of weight_ih that they meet. They are the first
// ones but for the last gate of the GRU, whose gradient differs on the two sides (csrc/cells/gru.h).
struct InputSide {
  int64_t row, column, count;
};
inline std::vector<InputSide> input_side(const CellTraits& cell, int64_t H) {
  if (cell.gate_grads == cell.gates) return {{0, 0, cell.gates * H}};
  return {{0, 0, (cell.gates - 1) * H}, {(cell.gates - 1) * H, (cell.gate_grads - 1) * H, H}};
}

// tensor.narrow, without its dispatch where it changes nothing: a cell's backward pass has a dozen of them.
inline Tensor part(const Tensor& tensor, int64_t dim, int64_t first, int64_t count) {
  return count == tensor.size(dim) ? tensor : tensor.narrow(dim, first, count);
}

// Of rows of all steps, those that have an h_{t-1} in `previous`: all, or all but the first step's of direction d.
inline Tensor rows_after(const Tensor& previous, const Tensor& rows, int64_t d) {
  const int64_t count = previous.size(0);
  return part(rows, 0, d == 0 ? rows.size(0) - count : 0, count);
}

// Rows of all steps, [N, ...], of padded ([T, B, ...]) or packed ones.
inline OptTensor as_rows(const Problem& p, const OptTensor& t) {
  return t.has_value() && t->dim() != 2 ? OptTensor(t->reshape({p.shape.N, t->size(-1)})) : t;
}

}  // namespace frnn
