// bfloat16 as the operands of a scan, for machines whose instructions multiply it (AVX512_BF16): loading, storing, and
// the products of product.h, on pairs of k. An instruction adds two products to each sum of a vector. It takes denormal
// operands as zero and rounds as float32 does; NaN and Inf pass through.
#pragma once

#include <immintrin.h>

#include "product.h"

namespace frnn {
inline namespace FRNN_ISA {

static_assert(Vec<float>::kSize == 16, "bfloat16 products come in vectors of 16");

FRNN_HD Vec<float> widen(__m256i x) {
  return Vec<float>((Vec<float>::Native)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
FRNN_HD __m256i rounded(Vec<float> x) { return (__m256i)_mm512_cvtneps_pbh((__m512)x.v); }
FRNN_HD __mmask16 first_of_16(int n) { return static_cast<__mmask16>((1u << n) - 1); }

FRNN_HD Vec<float> load(const BFloat16* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
FRNN_HD void store(BFloat16* p, Vec<float> x) { _mm256_storeu_si256((__m256i*)p, rounded(x)); }
FRNN_HD Vec<float> load(const BFloat16* p, int n) {
  return n >= 16 ? load(p) : widen(_mm256_maskz_loadu_epi16(first_of_16(n), p));
}
FRNN_HD void store(BFloat16* p, Vec<float> x, int n) {
  n >= 16 ? store(p, x) : _mm256_mask_storeu_epi16(p, first_of_16(n), rounded(x));
}

// The cells' functions within 2^-16.5 of their value, a hundredth of a rounding to bfloat16: a shorter series, and no
// division. As in vector.h NaN passes, and the ends are exact.
FRNN_HD Vec<float> clamped(Vec<float> x, float limit) {
  return Vec<float>((Vec<float>::Native)_mm512_max_ps(
      _mm512_set1_ps(-limit),
      _mm512_min_ps(_mm512_set1_ps(limit), (__m512)x.v)));  // in this order NaN stays NaN
}
// 1 / x, by one step of Newton's from an estimate of 14 bits.
FRNN_HD Vec<float> inverse(Vec<float> x) {
  const Vec<float> y((Vec<float>::Native)_mm512_rcp14_ps((__m512)x.v));
  return y + y * (Vec<float>(1.0f) - x * y);
}
// exp_parts of vector.h with a shorter series.
FRNN_HD void short_exp_parts(Vec<float> x, Vec<float>& two_n, Vec<float>& expm1_r) {
  using R = Real<float>;
  using V = Vec<float>;
  const V shifted = x * V(R::kLog2e) + V(R::kShift);
  const V r = x - (shifted - V(R::kShift)) * V(0.693147181f);
  expm1_r = r + r * r * (V(0.5f) + r * (V(1.0f / 6) + r * (V(1.0f / 24) + r * V(1.0f / 120))));
  two_n = V((V::Native)(((V::NativeInt)shifted.v + R::kBias) << R::kMantissa));
}
FRNN_HD Vec<float> sigmoid(Vec<float> x) {
  Vec<float> two_n, expm1_r;
  short_exp_parts(clamped(Vec<float>(0.0f) - x, Real<float>::kExpMax), two_n, expm1_r);
  return inverse(Vec<float>(1.0f) + (two_n + two_n * expm1_r));
}
FRNN_HD Vec<float> tanh_(Vec<float> x) {
  Vec<float> two_n, expm1_r;
  short_exp_parts(clamped(x + x, 2 * Real<float>::kTanhMax), two_n, expm1_r);
  const Vec<float> e = two_n * expm1_r + (two_n - Vec<float>(1.0f));
  return e * inverse(e + Vec<float>(2.0f));
}

// 32 numbers, or the first n of them and zeros.
FRNN_HD __m512bh load_pairs(const BFloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }
FRNN_HD __m512bh load_pairs(const BFloat16* p, int64_t n) {
  return n >= 32 ? load_pairs(p)
                 : (__m512bh)_mm512_maskz_loadu_epi16(static_cast<__mmask32>((1ull << n) - 1), p);
}
// A pair of a row, or its last number and zero, for every unit of a vector.
FRNN_HD __m512bh every_unit(const BFloat16* pair) {
  int32_t bits;
  memcpy(&bits, pair, sizeof bits);
  return (__m512bh)_mm512_set1_epi32(bits);
}
FRNN_HD __m512bh every_unit_last(const BFloat16* last) { return (__m512bh)_mm512_set1_epi32(last->bits); }

// acc[r][l] = sum over k of a.at(r, k) * weights[k / 2 * stride + l * 32 + k % 2 ...], or, with `add`, acc[r][l] += ...
// One running sum: float32's rounding is nothing beside that of the operands.
template <int kLanes, int kRows, int64_t kLongest, class T, int kAccLanes>
__attribute__((noinline)) void packed_product_of(const Rows<BFloat16, kRows>& factors, int64_t K,
                                                 const BFloat16* weights, int64_t stride, float* acc,
                                                 bool add) {
  const Rows<BFloat16, kRows> a = factors;
  __m512 sums[kRows][kLanes];
#pragma GCC unroll 32
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int l = 0; l < kLanes; ++l)
      sums[r][l] = add ? _mm512_loadu_ps(acc + (r * kLanes + l) * 16) : _mm512_setzero_ps();
  int64_t k = 0;
  for (; k + 2 <= K; k += 2, weights += stride) {
    __m512bh lane[kLanes];
#pragma GCC unroll 8
    for (int l = 0; l < kLanes; ++l) lane[l] = load_pairs(weights + l * 32);
#pragma GCC unroll 32
    for (int r = 0; r < kRows; ++r) {
      const __m512bh x = every_unit(a.row[r] + k);
#pragma GCC unroll 8
      for (int l = 0; l < kLanes; ++l) sums[r][l] = _mm512_dpbf16_ps(sums[r][l], lane[l], x);
    }
  }
  if (k < K)
    for (int r = 0; r < kRows; ++r) {
      const __m512bh x = every_unit_last(a.row[r] + k);
      for (int l = 0; l < kLanes; ++l)
        sums[r][l] = _mm512_dpbf16_ps(sums[r][l], load_pairs(weights + l * 32), x);
    }
#pragma GCC unroll 32
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int l = 0; l < kLanes; ++l) _mm512_storeu_ps(acc + (r * kLanes + l) * 16, sums[r][l]);
}

FRNN_HD __m512bh load_factors(const BFloat16* p) { return load_pairs(p); }
FRNN_HD __m512bh load_factors(const BFloat16* p, int64_t n) { return load_pairs(p, n); }
FRNN_HD void add_products(Vec<float>& sums, __m512bh a, __m512bh b) {
  sums.v = (Vec<float>::Native)_mm512_dpbf16_ps((__m512)sums.v, a, b);
}

// weights [kGates * gate_rows, K] -> panel [K / 2][gate][kVectors * 16][2], zero beyond K. See product.h.
template <int kGates, int kVectors>
void pack_rows(const BFloat16* weights, int64_t gate_rows, int64_t K, int64_t first, BFloat16* panel) {
  for (int64_t k = 0; k < K; k += 32) {
    const int64_t columns = K - k < 32 ? K - k : 32;
    constexpr int kFilled = kPanelDepth<BFloat16>;
    const int64_t pairs = (columns + kFilled - 1) / kFilled * (kFilled / 2);
    for (int g = 0; g < kGates; ++g)
      for (int v = 0; v < kVectors; ++v) {
        const int64_t rows = gate_rows - first - v * 16;
        const BFloat16* w = weights + (g * gate_rows + (rows > 0 ? first + v * 16 : gate_rows - 1)) * K + k;
        Vec<float> square[16];  // a pair of k where a float would be
#pragma GCC unroll 16
        for (int u = 0; u < 16; ++u)
          square[u] = Vec<float>((Vec<float>::Native)load_pairs(w + (u < rows   ? u
                                                                     : rows > 0 ? rows - 1
                                                                                : 0) *
                                                                        K,
                                                                columns));
        transpose(square);
        for (int64_t pair = 0; pair < pairs; ++pair)
          memcpy(panel + (((k / 2 + pair) * kGates + g) * kVectors + v) * 32, &square[pair].v, 64);
      }
  }
}

}  // namespace FRNN_ISA
}  // namespace frnn
