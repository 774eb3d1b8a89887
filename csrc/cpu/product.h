// The products of the scan: a tile of rows of h (or of dgates) times the weights of one panel of units. Two forms,
// one result layout, acc[row][lane][unit of the vector]:
//   packed: weights rearranged once a call as [k][lane][unit], or so for a part of the lanes after the other, so that a
//   step reads them in order (bfloat16.h: pairs of k, [k/2][lane][unit][2]);
//   direct: weights as torch lays them out, for calls too short to repay the packing. lanes.h does the same with many
//   rows.
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

// The lanes that pass over the weights together. With few registers four of them would leave room for three rows, and the
// weights would come from L2 for every three: half of them for six rows is half as much.
constexpr int pass_lanes(int lanes) { return kRegisters == 16 && lanes == 4 ? 2 : lanes; }

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

// A running sum of products.
template <class T>
struct SumOf {
  using Type = Vec<T>;
};
template <class T>
FRNN_HD void add_product(Vec<T>& sum, Vec<T> a, Vec<T> b) {
  sum.v += a.v * b.v;
}
template <class T>
FRNN_HD Vec<T> rounded(Vec<T> sum) {
  return sum;
}
#if FRNN_VECTOR_BYTES == 16 && defined(__x86_64__)
// Without a fused multiply-add a product is rounded before it is added, as none of torch's is: where a sum cancels, that
// is more than twice the error. Only x86 from before 2013 has none, and runs the portable set.
struct WideSum {
  typedef double Native __attribute__((vector_size(2 * FRNN_VECTOR_BYTES)));
  Native v;
  WideSum() = default;
  explicit FRNN_HD WideSum(float) : v{} {}
};
template <>
struct SumOf<float> {
  using Type = WideSum;
};
FRNN_HD void add_product(WideSum& sum, Vec<float> a, Vec<float> b) {
  sum.v += __builtin_convertvector(a.v, WideSum::Native) * __builtin_convertvector(b.v, WideSum::Native);
}
FRNN_HD Vec<float> rounded(WideSum sum) {
  return Vec<float>(__builtin_convertvector(sum.v, Vec<float>::Native));
}
#endif

// acc[r][l] = sum over k of a.at(r, k) * weights[k * stride + l * kSize ...], or, with `add`, acc[r][l] += ...
// Never inlined: among the caller's variables its row pointers lose their registers, and an LSTM a tenth of its speed.
template <int kLanes, int kRows, int64_t kLongest, class T, int kAccLanes = kLanes, class Factors>
__attribute__((noinline)) void packed_product_of(const Factors& factors, int64_t K, const T* weights,
                                                 int64_t stride, T* acc, bool add) {
  using V = Vec<T>;
  const Factors a = factors;
  constexpr int64_t kLength = sum_length(kRows, kLongest);
  for (int64_t k0 = 0; k0 < K || k0 == 0; k0 += kLength) {
    const int64_t k1 = k0 + kLength < K ? k0 + kLength : K;
    using Sum = typename SumOf<T>::Type;
    Sum sums[kRows][kLanes];
#pragma GCC unroll 32
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int l = 0; l < kLanes; ++l) sums[r][l] = Sum(T(0));
    const T* w = weights + k0 * stride;
    for (int64_t k = k0; k < k1; ++k, w += stride) {
      V lane[kLanes];
#pragma GCC unroll 8
      for (int l = 0; l < kLanes; ++l) lane[l] = load(w + l * V::kSize);
#pragma GCC unroll 32
      for (int r = 0; r < kRows; ++r) {
        const V x(a.at(r, k));
#pragma GCC unroll 8
        for (int l = 0; l < kLanes; ++l) add_product(sums[r][l], lane[l], x);
      }
    }
    for (int r = 0; r < kRows; ++r)
      for (int l = 0; l < kLanes; ++l) {
        T* to = acc + (r * kAccLanes + l) * V::kSize;
        store(to, k0 == 0 && !add ? rounded(sums[r][l]) : load(to) + rounded(sums[r][l]));
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
  constexpr int kPass = pass_lanes(kLanes), kPassSize = Vec<Accumulate<T>>::kSize;
  with_rows<tile_rows(kPass)>(rows, [&](auto count) {
    constexpr int kRows = decltype(count)::value;
    for (int l = 0; l < kLanes; l += kPass)
      packed_product_of<kPass, kRows, kLongest, T, kLanes>(Rows<T, kRows>(a), K, weights + l * K * kPassSize,
                                                           stride * kPass / kLanes, acc + l * kPassSize, add);
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

// A product that leaves the vector units idle calls for other work in its pauses.
struct NoPause {
  FRNN_HD void operator()() const {}
};

// How the scan multiplies rows stored as S with a packed panel. amx_product.h has tiles for bfloat16.
template <class S>
struct PackedProduct {
  struct Session {};  // what a thread holds while it multiplies
  static constexpr bool kPauses = false;
  static constexpr int64_t pauses(int /*lanes*/, int64_t /*K*/) { return 1; }
  static constexpr int kMaxTileRows = frnn::kMaxTileRows;
  static constexpr int tile_rows(int lanes) { return frnn::tile_rows(pass_lanes(lanes)); }

  template <int kLanes, class Pause>
  FRNN_HD static void multiply(const S* const* a, int rows, int64_t K, const S* weights, int64_t stride,
                               Accumulate<S>* acc, bool add, Pause&& /*pause*/) {
    packed_product<S, kLanes>(a, rows, K, weights, stride, acc, add);
  }
};

// What a dot product reads at a time: a vector of numbers of k; bfloat16.h has those of pairs.
template <class T>
FRNN_HD Vec<T> load_factors(const T* p) {
  return load(p);
}
template <class T>
FRNN_HD Vec<T> load_factors(const T* p, int64_t n) {
  return load(p, static_cast<int>(n));
}
template <class T>
FRNN_HD void add_products(Vec<T>& sums, Vec<T> a, Vec<T> b) {
  sums.v += a.v * b.v;
}

// Dot products of kRows rows a with kUnits rows of weights, K apart: sums[r][u], each a vector of partial sums. Rows of
// weights from `units` on repeat the last one; the caller drops what they give.
template <int kRows, int kUnits, class T>
FRNN_HD void dot_products(const T* const* a, int64_t K, const T* weights, int64_t units,
                          Vec<Accumulate<T>> (&sums)[kRows][kUnits]) {
  constexpr int64_t kStep = Vec<Accumulate<T>>::kSize * kDepth<T>;
  const T* w[kUnits];
#pragma GCC unroll 16
  for (int u = 0; u < kUnits; ++u) {
    w[u] = weights + (u < units ? u : units - 1) * K;
    for (int r = 0; r < kRows; ++r) sums[r][u] = Vec<Accumulate<T>>(0);
  }
  const auto add = [&](int64_t k, auto... n) {
    decltype(load_factors(a[0])) x[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) x[r] = load_factors(a[r] + k, n...);
#pragma GCC unroll 16
    for (int u = 0; u < kUnits; ++u) {
      const auto y = load_factors(w[u] + k, n...);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) add_products(sums[r][u], y, x[r]);
    }
  };
  int64_t k = 0;
  for (; k + kStep <= K; k += kStep) add(k);
  if (k < K) add(k, K - k);
}

// The units of one product, and the rows: as many sums as registers hold beside the operands. A row alone waits for its
// weights, and reads a whole vector of units side by side.
constexpr int kDotUnits = 4, kDotRows = kRegisters == 32 ? 6 : 3;

// acc[r][gate][u] = a[r] . weights[gate * gate_rows + first + u] for the kVectors * kSize units u of a panel, or, with
// `add`, acc[r][gate][u] += ... weights: [gates * gate_rows, K].
template <class T, int kGates, int kVectors>
void direct_product(const T* const* a, int rows, int64_t K, const T* weights, int64_t gate_rows,
                    int64_t first, Accumulate<T>* acc, bool add) {
  using V = Vec<Accumulate<T>>;
  constexpr int kSize = V::kSize, kUnits = kDotUnits < kSize ? kDotUnits : kSize;
  const int tiles = (rows + kDotRows - 1) / kDotRows;
  for (int g = 0; g < kGates; ++g)
    for (int v = 0; v < kVectors && first + v * kSize < gate_rows; ++v) {
      const int64_t row = first + v * kSize;
      const T* w = weights + (g * gate_rows + row) * K;
      V parts[kMaxTileRows][kSize / kUnits];
      if (rows == 1) {
        V sums[1][kSize];
        dot_products(a, K, w, gate_rows - row, sums);
        parts[0][0] = sums_of<kSize>(sums[0]);
      } else {
        for (int u = 0; u < kSize; u += kUnits) {
          // Behind the last unit any row will do.
          const int64_t from = row + u < gate_rows ? u : 0;
          for (int tile = 0; tile < tiles; ++tile) {
            const int r0 = rows * tile / tiles;
            with_rows<kDotRows>(rows * (tile + 1) / tiles - r0, [&](auto count) {
              constexpr int kRows = decltype(count)::value;
              V sums[kRows][kUnits];
              dot_products(a + r0, K, w + from * K, gate_rows - row - from, sums);
#pragma GCC unroll 8
              for (int r = 0; r < kRows; ++r) parts[r0 + r][u / kUnits] = sums_of<kUnits>(sums[r]);
            });
          }
        }
        for (int r = 0; r < rows; ++r) parts[r][0] = sums_of<kSize / kUnits>(parts[r]);
      }
      for (int r = 0; r < rows; ++r) {
        Accumulate<T>* to = acc + ((r * kGates + g) * kVectors + v) * kSize;
        store(to, add ? load(to) + parts[r][0] : parts[r][0]);
      }
    }
}

// weights [kGates * gate_rows, K] -> panel [pass][K][lanes of a pass][kSize] of the units from `first` on, where lanes are
// [gate][kVectors]. Places of units beyond the last repeat it; what they give is dropped.
template <int kGates, int kVectors, class T>
void pack_rows(const T* weights, int64_t gate_rows, int64_t K, int64_t first, T* panel) {
  using V = Vec<T>;
  constexpr int kSize = V::kSize;
  // Gate by gate: the memory system follows sixteen rows side by side, not those of all gates.
  for (int g = 0; g < kGates; ++g)
    for (int v = 0; v < kVectors; ++v) {
      constexpr int kPass = pass_lanes(kGates * kVectors);
      const int l = g * kVectors + v;
      const int64_t rows = gate_rows - first - v * kSize;
      const T* w = weights + (g * gate_rows + (rows > 0 ? first + v * kSize : gate_rows - 1)) * K;
      for (int64_t k = 0; k < K; k += kSize) {
        const int columns = static_cast<int>(K - k < kSize ? K - k : kSize);
        V square[kSize];
#pragma GCC unroll 16
        for (int u = 0; u < kSize; ++u)
          square[u] = load(w + (u < rows ? u : rows > 0 ? rows - 1 : 0) * K + k, columns);
        transpose(square);
        for (int c = 0; c < columns; ++c)
          store(panel + ((l / kPass * K + k + c) * kPass + l % kPass) * kSize, square[c]);
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
