// The fused kernel of strategy "step": products, biases and gates of one time step in one launch, for the few rows at
// which a matrix product would leave the GPU idle. A warp takes one unit: its G rows of the weights are read once, 16
// bytes a lane, for up to R batch rows at a time. Bound by reading the weights; h and x come from L1.
#pragma once

#include "step_pointwise.cuh"

namespace frnn {

constexpr int kFusedWarps = 4;
constexpr int kFusedBlocks =
    4;  // a multiprocessor; left to itself ptxas spills a register or two to fit one more

// The sum over all lanes of each of the V values, V a power of two up to 32, in V - 1 + log2(32 / V) shuffles: at each
// level a lane keeps half of the values and hands the other half over. That of value v ends in the lanes
// v * (32 / V) to (v + 1) * (32 / V) - 1. Recursive, so that no index is left to run time: registers have none.
template <int V, int kDistance = 16, class A>
__device__ __forceinline__ A reduce_to_lanes(const A (&values)[V]) {
  A rest[V > 1 ? V / 2 : 1];
  if constexpr (V == 1) {
    rest[0] = values[0] + __shfl_xor_sync(0xffffffffu, values[0], kDistance);
  } else {
    const bool upper = threadIdx.x & kDistance;
#pragma unroll
    for (int v = 0; v < V / 2; ++v) {
      const A given = upper ? values[v] : values[v + V / 2];
      const A kept = upper ? values[v + V / 2] : values[v];
      rest[v] = kept + __shfl_xor_sync(0xffffffffu, given, kDistance);
    }
  }
  if constexpr (kDistance == 1)
    return rest[0];
  else
    return reduce_to_lanes<(V > 1 ? V / 2 : 1), kDistance / 2>(rest);
}

// sums[r][g] += this lane's share of  row_r . w[g*H + u],  K numbers long, read N at a time.
template <int R, int G, int P, int N, class T, class Row>
__device__ __forceinline__ void add_products(Accumulate<T> (&sums)[R * P], const T* w, int64_t H, int64_t K,
                                             const Row& row_of) {
  using A = Accumulate<T>;
  for (int64_t k = int64_t{threadIdx.x % 32} * N; k < K; k += 32 * N) {
    A weights[G][N];
#pragma unroll
    for (int g = 0; g < G; ++g) load<N>(weights[g], w + g * H * K + k);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const T* row = row_of(r);
      if (!row) continue;  // the same for the whole warp
      A state[N];
      load<N>(state, row + k);
#pragma unroll
      for (int g = 0; g < G; ++g)
#pragma unroll
        for (int n = 0; n < N; ++n) sums[r * P + g] += weights[g][n] * state[n];
    }
  }
}

// The pre-activation of gate g of row r, in lane (r * P + g) * (32 / (R * P)).
template <int R, int G, int P, class T, class Row>
__device__ __forceinline__ Accumulate<T> products(const T* w, int64_t H, int64_t K, bool vectors,
                                                  const Row& row_of) {
  constexpr int N = 16 / sizeof(T);
  Accumulate<T> sums[R * P] = {};
  if (vectors)
    add_products<R, G, P, N>(sums, w, H, K, row_of);
  else
    add_products<R, G, P, 1>(sums, w, H, K, row_of);
  return reduce_to_lanes(sums);
}

// Whether rows of K numbers from here on can be read 16 bytes at a time.
template <class T>
__device__ __forceinline__ bool in_vectors(const T* first, int64_t stride) {
  return reinterpret_cast<uintptr_t>(first) % 16 == 0 && stride * sizeof(T) % 16 == 0;
}

template <class Cell, int R, class T>
__global__ void __launch_bounds__(kFusedWarps * 32, kFusedBlocks)
    step_fused_kernel(const StepForward<T> args) {
  constexpr int G = Cell::kGates;
  constexpr int P = G == 3 ? 4 : G;  // gates padded to a power of two, for the reduction
  constexpr int kLanes = 32 / (R * P);
  using A = Accumulate<T>;
  const StepForwardDirection<T>& p = args.direction[blockIdx.z];
  const int64_t H = args.H, I = args.I;
  const int64_t u = int64_t{blockIdx.x} * kFusedWarps + threadIdx.x / 32;
  const int64_t first = int64_t{blockIdx.y} * R;
  if (u >= H || first >= p.rows) return;

  const auto x_row = [&](int r) { return first + r < p.rows ? p.x + (first + r) * I : nullptr; };
  const auto h_row = [&](int r) -> const T* {
    const int64_t b = first + r;
    if (b >= p.rows || (p.reset && p.reset[b])) return nullptr;
    return b < p.h.count ? p.h.rows + b * p.h.stride : p.h.initial ? p.h.initial + b * H : nullptr;
  };
  const bool h_vectors =
      in_vectors(p.w_hh, H) && in_vectors(p.h.rows, p.h.stride) && in_vectors(p.h.initial, H);
  A lane_x = 0;
  if (!p.gates_x)
    lane_x = products<R, G, P>(p.w_ih + u * I, H, I, in_vectors(p.w_ih, I) && in_vectors(p.x, I), x_row);
  const A lane_h = products<R, G, P>(p.w_hh + u * H, H, H, h_vectors, h_row);

  // One lane a row finishes the cell; all lanes take part in the exchange that brings it its gates.
  const int r = (threadIdx.x % 32) / (P * kLanes);
  const int64_t b = first + r;
  const bool mine = (threadIdx.x % 32) % (P * kLanes) == 0 && b < p.rows;
  A x[G][1], h[G][1];
#pragma unroll
  for (int g = 0; g < G; ++g) {
    x[g][0] = __shfl_sync(0xffffffffu, lane_x, (r * P + g) * kLanes);
    h[g][0] = __shfl_sync(0xffffffffu, lane_h, (r * P + g) * kLanes);
    if (!mine) continue;
    if (p.gates_x) x[g][0] = p.gates_x[(b * G + g) * H + u];
    if (p.b_ih) x[g][0] += to_accumulate(p.b_ih[g * H + u]);
    if (p.b_hh) h[g][0] += to_accumulate(p.b_hh[g * H + u]);
  }
  if (mine) finish_units<Cell, 1, T>(p, H, b, u, x, h, p.reset && p.reset[b]);
}

template <class Cell, int R, class T>
const char* launch_fused(const StepForward<T>& args, int64_t rows, void* stream) {
  const dim3 grid(static_cast<unsigned>((args.H + kFusedWarps - 1) / kFusedWarps),
                  static_cast<unsigned>((rows + R - 1) / R), static_cast<unsigned>(args.D));
  return launch(&step_fused_kernel<Cell, R, T>, grid, dim3(kFusedWarps * 32), 0, stream, args);
}

}  // namespace frnn
