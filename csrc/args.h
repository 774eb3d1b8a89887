// What a kernel is told: plain structs of pointers and sizes, without torch. Shared by the CPU and the CUDA rooms.
//
// Names: T steps, B rows of the longest step, I input size, H hidden size, P projection size (0: none), Hr size of
// the recurrent state (P if there is a projection, else H), G gates of the cell, D directions, N = rows of all steps.
//
// Input, output and saved values are in packed form: step t has batch_sizes[t] rows, longest sequence first, and its
// row b lies at offsets[t] + b. A padded batch is the case where all batch sizes are equal.
#pragma once

#include <stdint.h>

#include "dtypes.h"

namespace frnn {

struct Shape {
  int64_t T, B, I, H, P, D, N;
  const int64_t* batch_sizes;  // [T], not increasing
  const int64_t* offsets;      // [T + 1], running sum of batch_sizes
  const int64_t* lengths;      // [B], steps of each row
  int64_t Hr() const { return P > 0 ? P : H; }
};

// One direction of a layer, forward. Rows are contiguous unless a stride is given. Accumulate<T> is T but for the
// 16-bit types.
template <class T>
struct ForwardDirection {
  bool reverse;       // scan from the last step to the first
  const T* x;         // [N, I]
  const T* w_ih;      // [G*H, I]
  const T* b_ih;      // [G*H] or null
  const T* w_hh;      // [G*H, Hr]
  const T* b_hh;      // [G*H] or null
  const T* w_hr;      // [P, H] or null
  const T* h0;        // [B, Hr] or null: zero
  const bool* reset;  // [N] or null; where set, the row's state is zero before this step
  T* output;          // [N, Hr], row stride output_stride
  int64_t output_stride;
  T* hn;                 // [B, Hr] or null: not wanted
  Accumulate<T>* c;      // [B, H], holds c_0, becomes c_n; null for cells without a cell state
  Accumulate<T>* saved;  // [N, kSaved*H] or null: inference
};

// One direction of a layer, backward.
template <class T>
struct BackwardDirection {
  bool reverse;
  const T* w_hh;      // [G*H, Hr]
  const T* w_hr;      // [P, H] or null
  const T* h0;        // [B, Hr] or null: zero
  const T* c0;        // [B, H] or null: zero
  const bool* reset;  // [N] or null, as in the forward pass
  const T* output;    // [N, Hr], row stride output_stride
  int64_t output_stride;
  const Accumulate<T>* saved;  // [N, kSaved*H]
  const T* grad_output;        // [N, Hr], row stride grad_output_stride, or null: zero
  int64_t grad_output_stride;
  const T* grad_hn;  // [B, Hr] or null: zero
  // [N, kGateGrads*H], row stride dgates_stride. Each row may take the place of the first numbers of `saved`'s: what a
  // step reads of the row before, the LSTM's c, lies behind them.
  T* dgates;
  int64_t dgates_stride;
  T* dh;  // [N, Hr], gradient of every h_t; null where not wanted, never with a projection
  // [B, H], see step_grad; holds the gradient of c_n (LSTM) or zero (GRU), becomes that of c_0
  Accumulate<T>* carry;
  T* dh0;  // [B, Hr] or null: not wanted. The GRU's carry is added into it
  // What a second derivative adds on the way (DualBackwardDirection); null: nothing.
  const T* adds_gates;              // [N, kGateGrads*H], added to dgates; may be the same memory
  const Accumulate<T>* adds_carry;  // [N, H], added to what the row's step leaves in `carry`
  const T* adds_previous;           // [N, Hr], added to the gradient of the row's h_{t-1}
};

// One direction of a layer, forward, with how it changes when its arguments do: x -> x + tangent.
template <class T>
struct TangentDirection {
  bool reverse;
  const T* w_hh;    // [G*H, Hr]
  const T* w_hr;    // [P, H] or null
  const T* h0;      // [B, Hr] or null: zero
  const T* c0;      // [B, H] or null: zero
  const T* output;  // [N, Hr], row stride output_stride
  const T* saved;   // [N, kSaved*H]
  const T* x;       // [N, I]
  const T* w_ih;    // [G*H, I]
  // Null: no change.
  const T* x_tangent;     // [N, I]
  const T* w_ih_tangent;  // [G*H, I]
  const T* w_hh_tangent;  // [G*H, Hr]
  const T* b_ih_tangent;  // [G*H]
  const T* b_hh_tangent;  // [G*H]
  const T* hr_tangent;    // [N, P], of the projected state, the part due to w_hr
  const T* h0_tangent;    // [B, Hr]
  const T* c0_tangent;    // [B, H]
  T* output_tangent;      // [N, Hr], row stride output_stride
  int64_t output_stride;
  T* hn_tangent;     // [B, Hr]
  T* c_tangent;      // [B, H], becomes that of c_n; null for cells without a cell state
  T* saved_tangent;  // [N, kSaved*H]
};

// The gates' gradients of the backward pass once more, and how they change at each step by themselves, while what
// arrives from the step after stays as it is. A backward scan carries these changes on.
template <class T>
struct DualBackwardDirection {
  TangentDirection<T> forward;
  const T* dh;         // [N, H], the gradient of every h_t, before a projection
  const T* dh_change;  // [N, H], the part due to w_hr, or null: zero
  T* carry;            // [B, H], as in BackwardDirection
  T* dgates;           // [N, kGateGrads*H]
  T* dgates_change;    // likewise; may be `saved_tangent` itself, of a cell where both are as large
  T* carry_change;     // [N, H], of what the row's step leaves in `carry`; null for cells without one
};

template <class Direction>
struct LayerArgs {
  Shape shape;
  Direction direction[2];
  int threads;  // at most so many
};

template <class T>
using ForwardArgs = LayerArgs<ForwardDirection<T>>;
template <class T>
using BackwardArgs = LayerArgs<BackwardDirection<T>>;
template <class T>
using TangentArgs = LayerArgs<TangentDirection<T>>;
template <class T>
using DualBackwardArgs = LayerArgs<DualBackwardDirection<T>>;

// c = a^T b, or c += a^T b: a sum over the rows of all steps, a gradient of weights.
template <class T>
struct SumOverRows {
  int64_t rows, M, N;
  const T* a;  // [rows, M], row stride a_stride
  int64_t a_stride;
  const T* b;  // [rows, N], row stride b_stride
  int64_t b_stride;
  T* c;  // [M, N]
  bool add;
  int threads;
};

// c = a w, or c += a w: the gradient of the input.
template <class T>
struct RowsTimesMatrix {
  int64_t rows, K, N;
  const T* a;  // [rows, K], row stride a_stride
  int64_t a_stride;
  const T* w;  // [K, N]
  T* c;        // [rows, N]
  bool add;
  int threads;
};

}  // namespace frnn
