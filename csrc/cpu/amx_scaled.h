// float products in parts, as in amx_split.h, of operands of any size: each row, and each panel of weights where it must,
// times a power of two that brings it to where it splits. Changes fade from step to step, as gradients do.
#pragma once

#include "amx_split.h"

namespace frnn {
inline namespace FRNN_ISA {

// As SplitRows.
class ScaledSplitRows {
 public:
  ScaledSplitRows() = default;
  ScaledSplitRows(BFloat16* memory, const float* const* a, int rows, int64_t K, int parts)
      : rows_(a), tiles_(memory), splits_(true) {
    for (int r = 0; r < rows; ++r) {
      const Magnitude magnitude = magnitude_of(a[r], K);
      splits_ &= magnitude.finite();
      exponent_[r] = magnitude.exponent();
      split_row(a[r], K, parts, power_of_two(-exponent_[r]), memory + r * kAmxDepth);
    }
  }
  bool splits() const { return splits_; }
  const float* const* rows() const { return rows_; }
  const BFloat16* tiles() const { return tiles_; }
  int exponent(int r) const { return exponent_[r]; }

 private:
  const float* const* rows_;
  const BFloat16* tiles_;
  int exponent_[2 * kAmxRows];  // each number times 2^-exponent
  bool splits_;
};

template <int kGates, int kVectors>
class ScaledSplitWeights : public SplitWeights<kGates, kVectors> {
  using Base = SplitWeights<kGates, kVectors>;

 public:
  ScaledSplitWeights(const float* weights, int64_t units, int64_t K, int parts, bool /*kept*/)
      : Base(weights, units, K, parts, false), scales_(Base::panels()) {}

  void pack(int64_t panel) const {
    scales_.get()[panel] = pack_to_scale([&](float scale) { return Base::split(panel, scale); });
  }

  // As GateWeights.
  void multiply(const ScaledSplitRows& a, int rows, int64_t panel, float* acc, bool add = false) const {
    const SplitScale scale = scales_.get()[panel];
    if (!a.splits() || !scale.splits) return Base::multiply_floats(a.rows(), rows, panel, acc, add);
    constexpr int kRow = Base::kLanes * 16;
    alignas(64) float sums[2 * kAmxRows * kRow];
    Base::multiply_parts(a.tiles(), rows, panel, sums, false, NoPause());
    for (int r = 0; r < rows; ++r) {
      const __m512 power = _mm512_set1_ps(static_cast<float>(a.exponent(r) + scale.exponent));
      for (int i = r * kRow; i < (r + 1) * kRow; i += 16) {
        const __m512 sum = _mm512_maskz_scalef_ps(0xffff, _mm512_load_ps(sums + i), power);
        _mm512_storeu_ps(acc + i, add ? _mm512_loadu_ps(acc + i) + sum : sum);
      }
    }
  }

 private:
  Buffer<SplitScale> scales_;  // of a panel
};

using ScaledSplitProducts = ProductsInParts<ScaledSplitWeights, ScaledSplitRows>;

}  // namespace FRNN_ISA
}  // namespace frnn
