// The pointwise kernels of strategy "step": the gates of all units of all rows of one time step, in both directions. A
// thread takes N units that lie side by side, so that every access moves 16 bytes of the numbers it computes with.
#pragma once

#include "launch.cuh"
#include "numbers.cuh"
#include "step.h"

namespace frnn {

// A block is `x` threads along the units by `y` along the rows.
constexpr int kPointwiseThreads = 128;
constexpr int kPointwiseBlocks =
    4;  // a multiprocessor; left to itself ptxas spills a register or two to fit one more
constexpr unsigned kMostGridRows = 65535;  // CUDA's bound on gridDim.y; beyond it a block takes several rows

template <int N, class T>
__device__ __forceinline__ void load_previous(Accumulate<T> (&to)[N], const Previous<T>& from, int64_t b,
                                              int64_t u, int64_t H, bool reset) {
  const T* row = b < from.count ? from.rows + b * from.stride : from.initial ? from.initial + b * H : nullptr;
  if (row && !reset) {
    load<N>(to, row + u);
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) to[k] = 0;
  }
}

// to[g][k] = from[g*H + k] (if there is a row) + bias[g*H + k] (if there is one).
template <int G, int N, class T>
__device__ __forceinline__ void load_gates(Accumulate<T> (&to)[G][N], const Accumulate<T>* from,
                                           const T* bias, int64_t H) {
#pragma unroll
  for (int g = 0; g < G; ++g) {
    if (from) {
      load<N>(to[g], from + g * H);
    } else {
#pragma unroll
      for (int k = 0; k < N; ++k) to[g][k] = 0;
    }
    if (bias) {
      Accumulate<T> b[N];
      load<N>(b, bias + g * H);
#pragma unroll
      for (int k = 0; k < N; ++k) to[g][k] += b[k];
    }
  }
}

// x, h: the pre-activations of N units from the input and from the state, biases included. Everything that follows from
// them for row b and the units from u on.
template <class Cell, int N, class T>
__device__ __forceinline__ void finish_units(const StepForwardDirection<T>& p, int64_t H, int64_t b,
                                             int64_t u, const Accumulate<T> (&x)[Cell::kGates][N],
                                             const Accumulate<T> (&h)[Cell::kGates][N], bool reset) {
  using A = Accumulate<T>;
  A h_prev[N], c[N], h_new[N];
  if constexpr (Cell::kReadsPreviousHidden) load_previous<N>(h_prev, p.h, b, u, H, reset);
  if constexpr (Cell::kHasCellState) {
    if (b < p.h.count && !reset)
      load<N>(c, p.c + b * H + u);
    else
      load_previous<N>(c, Previous<T>{nullptr, 0, 0, p.c0}, b, u, H, reset);
  }
  A saved[Cell::kSaved + 1][N];  // an array cannot be empty
#pragma unroll
  for (int k = 0; k < N; ++k) {
    A unit_x[Cell::kGates], unit_h[Cell::kGates], unit_saved[Cell::kSaved + 1];
#pragma unroll
    for (int g = 0; g < Cell::kGates; ++g) unit_x[g] = x[g][k], unit_h[g] = h[g][k];
    h_new[k] = Cell::step(unit_x, unit_h, h_prev[k], c[k], unit_saved);
#pragma unroll
    for (int s = 0; s < Cell::kSaved; ++s) saved[s][k] = unit_saved[s];
  }
  store<N>(p.output + b * p.output_stride + u, h_new);
  if (p.hn) store<N>(p.hn + b * H + u, h_new);
  if constexpr (Cell::kHasCellState) {
    if (p.c) store<N>(p.c + b * H + u, c);
    if (p.cn) store<N>(p.cn + b * H + u, c);
  }
  if (p.saved) {
#pragma unroll
    for (int s = 0; s < Cell::kSaved; ++s) store<N>(p.saved + (b * Cell::kSaved + s) * H + u, saved[s]);
  }
}

template <class Cell, int N, class T>
__global__ void __launch_bounds__(kPointwiseThreads, kPointwiseBlocks)
    step_forward_kernel(const StepForward<T> args) {
  constexpr int G = Cell::kGates;
  using A = Accumulate<T>;
  const StepForwardDirection<T>& p = args.direction[blockIdx.z];
  const int64_t H = args.H, u = N * (int64_t{blockIdx.x} * blockDim.x + threadIdx.x);
  if (u >= H) return;
  for (int64_t b = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; b < p.rows;
       b += int64_t{gridDim.y} * blockDim.y) {
    const bool reset = p.reset && p.reset[b];
    A x[G][N], h[G][N];
    load_gates<G, N, T>(x, p.gates_x ? p.gates_x + b * G * H + u : nullptr, p.b_ih ? p.b_ih + u : nullptr, H);
    load_gates<G, N, T>(h, p.gates_h && !reset ? p.gates_h + b * G * H + u : nullptr,
                        p.b_hh ? p.b_hh + u : nullptr, H);
    finish_units<Cell, N, T>(p, H, b, u, x, h, reset);
  }
}

template <class Cell, int N, class T>
__global__ void __launch_bounds__(kPointwiseThreads, kPointwiseBlocks)
    step_backward_kernel(const StepBackward<T> args) {
  using A = Accumulate<T>;
  const StepBackwardDirection<T>& p = args.direction[blockIdx.z];
  const int64_t H = args.H, u = N * (int64_t{blockIdx.x} * blockDim.x + threadIdx.x);
  if (u >= H) return;
  for (int64_t b = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; b < p.rows;
       b += int64_t{gridDim.y} * blockDim.y) {
    const bool reset = p.reset && p.reset[b];
    A dh[N], saved[Cell::kSaved + 1][N], output[N], h_prev[N], c_prev[N], carry[N],
        dgates[Cell::kGateGrads][N];
    load<N>(dh, p.dh + b * H + u);
    if (p.grad_output) {
      A grad[N];
      load<N>(grad, p.grad_output + b * p.grad_output_stride + u);
#pragma unroll
      for (int k = 0; k < N; ++k) dh[k] += grad[k];
    }
#pragma unroll
    for (int s = 0; s < Cell::kSaved; ++s) load<N>(saved[s], p.saved + (b * Cell::kSaved + s) * H + u);
    if constexpr (Cell::kGradReadsOutput) load<N>(output, p.output + b * p.output_stride + u);
    if (Cell::kReadsPreviousHidden || p.previous) load_previous<N>(h_prev, p.h, b, u, H, reset);
    if constexpr (Cell::kHasCellState) load_previous<N>(c_prev, p.c, b, u, H, reset);
    if constexpr (Cell::kHasCarry) load<N>(carry, p.carry + b * H + u);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      A unit_saved[Cell::kSaved + 1], unit_grads[Cell::kGateGrads];
#pragma unroll
      for (int s = 0; s < Cell::kSaved; ++s) unit_saved[s] = saved[s][k];
      Cell::step_grad(unit_saved, output[k], h_prev[k], c_prev[k], dh[k], carry[k], unit_grads);
#pragma unroll
      for (int g = 0; g < Cell::kGateGrads; ++g) dgates[g][k] = unit_grads[g];
      carry[k] = reset ? A(0) : carry[k];
    }
#pragma unroll
    for (int g = 0; g < Cell::kGateGrads; ++g)
      store<N>(p.dgates + (b * Cell::kGateGrads + g) * H + u, dgates[g]);
    if constexpr (Cell::kHasCarry) store<N>(p.carry + b * H + u, carry);
    if (p.previous) store<N>(p.previous + b * H + u, h_prev);
  }
}

inline unsigned at_least_one(int64_t x) { return x > 1 ? static_cast<unsigned>(x) : 1u; }

// Launches a pointwise kernel over H units in steps of N, and as many rows as the longer direction has.
template <int N, class T, template <class> class Direction>
const char* launch_pointwise(void (*kernel)(StepArgs<Direction<T>>), const StepArgs<Direction<T>>& args,
                             void* stream) {
  const int64_t rows = args.D > 1 && args.direction[1].rows > args.direction[0].rows ? args.direction[1].rows
                                                                                     : args.direction[0].rows;
  const int64_t across = (args.H + N - 1) / N;
  unsigned x = kPointwiseThreads;
  while (x > 1 && x / 2 >= across) x /= 2;
  const unsigned y = kPointwiseThreads / x;
  const int64_t row_blocks = (rows + y - 1) / y;
  const dim3 grid(at_least_one((across + x - 1) / x),
                  row_blocks < kMostGridRows ? at_least_one(row_blocks) : kMostGridRows,
                  static_cast<unsigned>(args.D));
  return launch(kernel, grid, dim3(x, y), 0, stream, args);
}

}  // namespace frnn
