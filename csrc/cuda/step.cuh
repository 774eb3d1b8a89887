// The host side of strategy "step", instantiated once a dtype by step_<dtype>.cu.
#pragma once

#include "step_fused.cuh"
#include "step_pointwise.cuh"

namespace frnn {

template <int N, class T>
bool aligned(const Previous<T>& p) {
  return aligned<N>(p.rows, p.stride) && aligned<N>(p.initial);
}
template <int N, class T>
bool aligned(const StepForwardDirection<T>& p) {
  return aligned<N>(p.gates_x) && aligned<N>(p.gates_h) && aligned<N>(p.b_ih) && aligned<N>(p.b_hh) &&
         aligned<N>(p.h) && aligned<N>(p.c0) && aligned<N>(p.c) && aligned<N>(p.cn) &&
         aligned<N>(p.output, p.output_stride) && aligned<N>(p.hn) && aligned<N>(p.saved);
}
template <int N, class T>
bool aligned(const StepBackwardDirection<T>& p) {
  return aligned<N>(p.saved) && aligned<N>(p.output, p.output_stride) && aligned<N>(p.h) && aligned<N>(p.c) &&
         aligned<N>(p.grad_output, p.grad_output_stride) && aligned<N>(p.dh) && aligned<N>(p.carry) &&
         aligned<N>(p.dgates) && aligned<N>(p.previous);
}
template <int N, class Direction>
bool aligned(const StepArgs<Direction>& args) {
  return args.H % N == 0 && aligned<N>(args.direction[0]) && aligned<N>(args.direction[1]);
}

template <class T>
constexpr int kVector = 16 / sizeof(Accumulate<T>);

template <class T>
const char* step_forward(CellKind kind, const StepForward<T>& args, void* stream) {
  return with_cell(kind, [&](auto cell) {
    using Cell = decltype(cell);
    if (aligned<kVector<T>>(args))
      return launch_pointwise<kVector<T>>(&step_forward_kernel<Cell, kVector<T>, T>, args, stream);
    return launch_pointwise<1>(&step_forward_kernel<Cell, 1, T>, args, stream);
  });
}

template <class T>
const char* step_backward(CellKind kind, const StepBackward<T>& args, void* stream) {
  return with_cell(kind, [&](auto cell) {
    using Cell = decltype(cell);
    if (aligned<kVector<T>>(args))
      return launch_pointwise<kVector<T>>(&step_backward_kernel<Cell, kVector<T>, T>, args, stream);
    return launch_pointwise<1>(&step_backward_kernel<Cell, 1, T>, args, stream);
  });
}

template <class T>
const char* step_fused(CellKind kind, const StepForward<T>& args, void* stream) {
  const int64_t rows = args.D > 1 && args.direction[1].rows > args.direction[0].rows ? args.direction[1].rows
                                                                                     : args.direction[0].rows;
  return with_cell(kind, [&](auto cell) {
    using Cell = decltype(cell);
    if (rows == 1) return launch_fused<Cell, 1>(args, rows, stream);
    if (rows <= 4) return launch_fused<Cell, 4>(args, rows, stream);
    return launch_fused<Cell, 8>(args, rows, stream);
  });
}

}  // namespace frnn

// Everything that a .cu file holds.
#define FRNN_INSTANTIATE_STEP(T)                                                      \
  template const char* frnn::step_forward<T>(CellKind, const StepForward<T>&, void*); \
  template const char* frnn::step_fused<T>(CellKind, const StepForward<T>&, void*);   \
  template const char* frnn::step_backward<T>(CellKind, const StepBackward<T>&, void*);
