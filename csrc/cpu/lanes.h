// How a single step multiplies many rows. They stand side by side in the lanes of vectors, and each number of the weights,
// read as it lies, meets all of them: the rows are rearranged, which are few, not the weights, and no sum runs across a
// vector.
#pragma once

#include "weights.h"

namespace frnn {
inline namespace FRNN_ISA {

// Vectors of rows side by side: with eight rows of weights there are sums enough to hide the latency of a multiply-add.
constexpr int kRowVectors = 2;

// [kGates * units, K], as GateWeights.
template <class T, int kGates, int kVectors>
class RowWeights {
  using V = Vec<T>;
  static constexpr int kSize = V::kSize, kRowLanes = kRowVectors * kSize;

 public:
  static constexpr int kUnits = kVectors * kSize;  // of a panel

  RowWeights(const T* weights, int64_t units, int64_t K) : weights_(weights), units_(units), K_(K) {}

  int64_t panels() const { return divide_up(units_, kUnits); }
  void pack(int64_t /*panel*/) const {}
  static constexpr int64_t pauses() { return 1; }

  // acc[row][gate][unit of the panel]; `add`: to what is there. x: [K][kRowLanes], the rows side by side.
  template <class Pause>
  void multiply(const T* x, int rows, int64_t panel, T* acc, bool add, Pause&& /*pause*/) const {
    multiply(x, rows, panel, acc, add);
  }
  void multiply(const T* x, int rows, int64_t panel, T* acc, bool add = false) const {
    for (int g = 0; g < kGates; ++g)
      for (int v = 0; v < kVectors; ++v) {
        const int64_t first = panel * kUnits + v * kSize;
        if (first >= units_) continue;
        const T* unit[kSize];
        for (int u = 0; u < kSize; ++u)  // behind the last unit any will do
          unit[u] = weights_ + (g * units_ + (first + u < units_ ? first + u : first)) * K_;
        T* const to = acc + g * kUnits + v * kSize;
        rows > kSize ? multiply_units<kRowVectors>(x, rows, unit, to, add)
                     : multiply_units<1>(x, rows, unit, to, add);
      }
  }

 private:
  // Of a vector of units: to[row * kGates * kUnits + unit].
  template <int kLanes>
  void multiply_units(const T* x, int rows, const T* const* unit, T* to, bool add) const {
    constexpr int kTiles = divide_up(kSize, tile_rows(pass_lanes(kLanes))), kTile = divide_up(kSize, kTiles);
    alignas(64) T sums[kSize * kLanes * kSize];  // [unit][row]
    for (int u = 0; u < kSize; u += kTile)
      packed_product<T, kLanes>(unit + u, kSize - u < kTile ? kSize - u : kTile, K_, x, kRowLanes,
                                sums + u * kLanes * kSize);
    for (int l = 0; l < kLanes; ++l) {
      V square[kSize];
#pragma GCC unroll 16
      for (int u = 0; u < kSize; ++u) square[u] = load(sums + (u * kLanes + l) * kSize);
      transpose(square);
      for (int r = 0; r < kSize && l * kSize + r < rows; ++r) {
        T* const row = to + (l * kSize + r) * kGates * kUnits;
        store(row, add ? load(row) + square[r] : square[r]);
      }
    }
  }

  const T* weights_;
  int64_t units_, K_;
};

template <class T>
struct LaneProducts {
  struct Session {};
  template <int kGates, int kVectors>
  using Weights = RowWeights<T, kGates, kVectors>;
  using Operand = const T*;
  using Part = T;
  static constexpr int kSize = Vec<T>::kSize, kRowLanes = kRowVectors * kSize;
  static constexpr bool kPauses = false;

  static constexpr int tile_rows(int /*lanes*/) { return kRowLanes; }
  template <int kGates, int kVectors>
  static Weights<kGates, kVectors> weights(const T* weights, int64_t units, int64_t K, Packing) {
    return {weights, units, K};
  }
  static int64_t operand_size(int64_t K) { return K * kRowLanes; }
  // [K][kRowLanes]; behind the last row it is repeated, and what that gives is dropped.
  static Operand operand(T* parts, const T* const* rows, int count, int64_t K) {
    for (int first = 0; first < count; first += kSize)
      for (int64_t k = 0; k < K; k += kSize) {
        const int columns = static_cast<int>(smallest(K - k, kSize));
        Vec<T> square[kSize];
#pragma GCC unroll 16
        for (int r = 0; r < kSize; ++r)
          square[r] = load(rows[first + r < count ? first + r : count - 1] + k, columns);
        transpose(square);
        for (int c = 0; c < columns; ++c) store(parts + (k + c) * kRowLanes + first, square[c]);
      }
    return parts;
  }
};

// Whether a step takes its rows so: from half a vector on.
template <class S>
bool takes_lanes(const Shape& shape) {
  return kDepth<S> == 1 && shape.T == 1 && 2 * shape.B > Vec<Accumulate<S>>::kSize;
}

}  // namespace FRNN_ISA
}  // namespace frnn
