// Strategy "step": one launch a time step finishes the gates of all rows of a step, in both directions. The recurrent
// product comes from a matrix product before it (step_forward), or is made by the same launch (step_fused).
//
// Names as in args.h: B rows, I input size, H hidden size, G gates, K = size of the state that the product reads. A
// step has `rows` rows of the B, the longest sequences first. A is the dtype of sums, Accumulate<T>.
#pragma once

#include <stdint.h>

#include "../cells/cells.h"
#include "../dtypes.h"

namespace frnn {

// A state one step earlier: of the first `count` rows as that step left it, of the others the initial one.
template <class T>
struct Previous {
  const T* rows;   // [count, H], row stride `stride`
  int64_t stride;  // 16-byte loads want the rows aligned: see `aligned` in step.cuh
  int64_t count;
  const T* initial;  // [B, H] or null: zero
};

// One direction of one step, forward.
template <class T>
struct StepForwardDirection {
  using A = Accumulate<T>;
  int64_t rows;
  const A* gates_x;   // [rows, G*H] = x w_ih^T, or null where the kernel multiplies x itself
  const A* gates_h;   // [rows, G*H] = h_{t-1} w_hh^T, or null: zero, or the kernel's own product
  const T* x;         // [rows, I], step_fused without gates_x
  const T* w_ih;      // [G*H, I], likewise
  const T* w_hh;      // [G*H, H], step_fused alone
  const T* b_ih;      // [G*H] or null
  const T* b_hh;      // [G*H] or null
  Previous<T> h;      // read by step_fused, and by cells that read their own h_{t-1}
  const bool* reset;  // [rows] or null; where set, the row's state is zero before this step
  const T* c0;        // [B, H] or null: zero. Cell state of the rows from h.count on, which start here
  A* c;       // [B, H] cell state of the others, in place; null for cells without, and if no step follows
  T* cn;      // [B, H], the latest cell state of every row, or null
  T* output;  // [rows, H], row stride output_stride
  int64_t output_stride;
  T* hn;     // [B, H], the latest state of every row, or null
  T* saved;  // [rows, kSaved*H] or null: inference
};

// One direction of one step, backward: from the gradient of h_t to those of the gates.
template <class T>
struct StepBackwardDirection {
  using A = Accumulate<T>;
  int64_t rows;
  const T* saved;   // [rows, kSaved*H]
  const T* output;  // [rows, H], row stride output_stride; read by cells that need it
  int64_t output_stride;
  Previous<T> h, c;      // likewise
  const T* grad_output;  // [rows, H], row stride grad_output_stride, or null: zero
  int64_t grad_output_stride;
  const A* dh;        // [B, H], gradient that reached h_t through the step after it
  const bool* reset;  // [rows] or null, as in the forward pass
  A* carry;           // [B, H], see step_grad
  T* dgates;          // [rows, kGateGrads*H]
  T* previous;        // [rows, H] or null; receives h_{t-1}, which the gradient of w_hh multiplies
};

template <class Direction>
struct StepArgs {
  int64_t I, H, D;
  Direction direction[2];
};
template <class T>
using StepForward = StepArgs<StepForwardDirection<T>>;
template <class T>
using StepBackward = StepArgs<StepBackwardDirection<T>>;

// Each launches one kernel on `stream` (a cudaStream_t of the current device). Returns null, or what CUDA says is wrong.
// T: float, double, Half, BFloat16.
template <class T>
const char* step_forward(CellKind cell, const StepForward<T>& args, void* stream);
template <class T>
const char* step_fused(CellKind cell, const StepForward<T>& args, void* stream);
template <class T>
const char* step_backward(CellKind cell, const StepBackward<T>& args, void* stream);

}  // namespace frnn
