// The products of the scan: a tile of rows of h (or of dgates) times the weights of one panel of units. Two forms,
// one result layout, acc[row][lane][unit of the vector]:
//   packed: weights rearranged once a call as [k][lane][unit], so that a step reads them in order (bfloat16.h: pairs
//   of k, [k/2][lane][unit][2]);
//   direct: weights as torch lays them out, for calls too short to repay the packing.
#pragma once

#include "vector.h"

namespace frnn {
inline namespace FRNN_ISA {

// Registers bound a tile: rows * lanes accumulators, plus one vector of weights a lane.
constexpr int kRegisters = FRNN_VECTOR_BYTES == 64 ? 32 : 16;
constexpr int kMaxTileRows = 8;

constexpr int tile_rows(int lanes) {
  const int rows = (kRegisters - (kRegisters == 32 ? lanes + 1 : 3)) / lanes;
  return rows < kMaxTileRows ? rows : kMaxTileRows;
}

// A single running sum over a long k loses accuracy; partial sums of this many products keep the error at the level
// of torch's matrix products. Those are more accurate for few rows, where short sums cost nothing here either: such a
// tile waits for its weights. Sums over the rows of all steps are sums of one product a step in torch: shorter still.
constexpr int64_t kStateSum = 128, kRowSum = 64;
constexpr int64_t sum_length(int rows, int64_t longest) { return rows <= 3 ? 32 : longest; }

// The factors of a tile's rows: number k of row r.
template <class T, int kRows>
struct Rows {
  const T* row[kRows];
  explicit FRNN_HD Rows(const T* const* a) {
    for (int r = 0; r < kRows; ++r) row[r] = a[r];
  }
  FRNN_HD T at(int r, int64_t k) const { return row[r][k]; }
};
// The same where k is the slow index, kStride numbers apart.
template <class T, int64_t kStride>
struct Columns {
  const T* first;
  FRNN_HD T at(int r, int64_t k) const { return first[k * kStride + r]; }
};

// acc[r][l] = sum over k of a.at(r, k) * weights[k * stride + l * kSize ...], or, with `add`, acc[r][l] += ...
// Never inlined: among the caller's variables its row pointers lose their registers, and an LSTM a tenth of its speed.
template <int kLanes, int kRows, int64_t kLongest, class T, class Factors>
__attribute__((noinline)) void packed_product_of(const Factors& factors, int64_t K, const T* weights,
                                                 int64_t stride, T* acc, bool add) {
  using V = Vec<T>;
  const Factors a = factors;
  constexpr int64_t kLength = sum_length(kRows, kLongest);
  for (int64_t k0 = 0; k0 < K || k0 == 0; k0 += kLength) {
    const int64_t k1 = k0 + kLength < K ? k0 + kLength : K;
    V sums[kRows][kLanes];
#pragma GCC unroll 32
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int l = 0; l < kLanes; ++l) sums[r][l] = V(T(0));
    const T* w = weights + k0 * stride;
    for (int64_t k = k0; k < k1; ++k, w += stride) {
      V lane[kLanes];
#pragma GCC unroll 8
      for (int l = 0; l < kLanes; ++l) lane[l] = load(w + l * V::kSize);
#pragma GCC unroll 32
      for (int r = 0; r < kRows; ++r) {
        const V x(a.at(r, k));
#pragma GCC unroll 8
        for (int l = 0; l < kLanes; ++l) sums[r][l].v += lane[l].v * x.v;
      }
    }
    for (int r = 0; r < kRows; ++r)
      for (int l = 0; l < kLanes; ++l) {
        T* to = acc + (r * kLanes + l) * V::kSize;
        store(to, k0 == 0 && !add ? sums[r][l] : load(to) + sums[r][l]);
      }
  }
}

// f(std::integral_constant<int, rows>), of at most kMost.
template <int kMost, class F>
FRNN_HD void with_rows(int rows, F&& f) {
  if constexpr (kMost > 1)
    if (rows < kMost) return with_rows<kMost - 1>(rows, f);
  f(std::integral_constant<int, kMost>{});
}

template <class T, int kLanes, int64_t kLongest = kStateSum>
void packed_product(const T* const* a, int rows, int64_t K, const T* weights, int64_t stride,
                    Accumulate<T>* acc, bool add = false) {
  with_rows<tile_rows(kLanes)>(rows, [&](auto count) {
    constexpr int kRows = decltype(count)::value;
    packed_product_of<kLanes, kRows, kLongest, T>(Rows<T, kRows>(a), K, weights, stride, acc, add);
  });
}
// The rows are columns of `a`, kStride apart in k.
template <int64_t kStride, int kLanes, int64_t kLongest, class T>
void packed_product_of_columns(const T* a, int rows, int64_t K, const T* weights, int64_t stride, T* acc) {
  with_rows<tile_rows(kLanes)>(rows, [&](auto count) {
    packed_product_of<kLanes, decltype(count)::value, kLongest, T>(Columns<T, kStride>{a}, K, weights, stride,
                                                                   acc, false);
  });
}

// One row a times a vector's worth of rows of weights, K apart: their dot products. Rows from `rows` on repeat the
// last one; the caller drops what they give.
template <class T>
FRNN_HD Vec<T> dot_products(const T* a, int64_t K, const T* weights, int64_t rows) {
  using V = Vec<T>;
  const T* w[V::kSize];
  V sums[V::kSize];
#pragma GCC unroll 16
  for (int j = 0; j < V::kSize; ++j) {
    w[j] = weights + (j < rows ? j : rows - 1) * K;
    sums[j] = V(T(0));
  }
  int64_t k = 0;
  for (; k + V::kSize <= K; k += V::kSize) {
    const V x = load(a + k);
#pragma GCC unroll 16
    for (int j = 0; j < V::kSize; ++j) sums[j].v += load(w[j] + k).v * x.v;
  }
  if (k < K) {
    const int n = static_cast<int>(K - k);
    const V x = load(a + k, n);
#pragma GCC unroll 16
    for (int j = 0; j < V::kSize; ++j) sums[j].v += load(w[j] + k, n).v * x.v;
  }
  return sums_of(sums);
}

// acc[r][gate][u] = a[r] . weights[gate * gate_rows + first + u] for the kVectors * kSize units u of a panel.
// weights: [gates * gate_rows, K].
template <class T, int kGates, int kVectors>
void direct_product(const T* const* a, int rows, int64_t K, const T* weights, int64_t gate_rows,
                    int64_t first, Accumulate<T>* acc, bool add) {
  constexpr int kSize = Vec<Accumulate<T>>::kSize;
  for (int r = 0; r < rows; ++r)
    for (int g = 0; g < kGates; ++g)
      for (int v = 0; v < kVectors && first + v * kSize < gate_rows; ++v) {
        const int64_t row = first + v * kSize;
        Accumulate<T>* to = acc + ((r * kGates + g) * kVectors + v) * kSize;
        const auto sums = dot_products(a[r], K, weights + (g * gate_rows + row) * K, gate_rows - row);
        store(to, add ? load(to) + sums : sums);
      }
}

// weights [kGates * gate_rows, K] -> panel [K][gate][kVectors * kSize] of the units from `first` on. Places of units
// beyond the last repeat it; what they give is dropped.
template <int kGates, int kVectors, class T>
void pack_rows(const T* weights, int64_t gate_rows, int64_t K, int64_t first, T* panel) {
  using V = Vec<T>;
  constexpr int kSize = V::kSize;
  for (int64_t k = 0; k < K; k += kSize) {
    const int columns = static_cast<int>(K - k < kSize ? K - k : kSize);
    for (int g = 0; g < kGates; ++g)
      for (int v = 0; v < kVectors; ++v) {
        const int64_t rows = gate_rows - first - v * kSize;
        const T* w = weights + (g * gate_rows + (rows > 0 ? first + v * kSize : gate_rows - 1)) * K + k;
        V square[kSize];
#pragma GCC unroll 16
        for (int u = 0; u < kSize; ++u)
          square[u] = load(w + (u < rows ? u : rows > 0 ? rows - 1 : 0) * K, columns);
        transpose(square);
        for (int c = 0; c < columns; ++c)
          store(panel + (((k + c) * kGates + g) * kVectors + v) * kSize, square[c]);
      }
  }
}

// weights [K, columns], row stride `stride` -> panel [K][kVectors * kSize] of the columns from `first` on, zero beyond.
template <int kVectors, class T>
void pack_columns(const T* weights, int64_t columns, int64_t stride, int64_t K, int64_t first, T* panel) {
  constexpr int kUnits = kVectors * Vec<T>::kSize;
  const int64_t units = columns - first < kUnits ? columns - first : kUnits;
  for (int64_t k = 0; k < K; ++k, panel += kUnits, weights += stride) {
    memcpy(panel, weights + first, units * sizeof(T));
    for (int64_t u = units; u < kUnits; ++u) panel[u] = T(0);
  }
}

}  // namespace FRNN_ISA
}  // namespace frnn
