// Columns of a matrix [K, N] as tiles of AMX, for products whose sums run down its rows: two rows side by side are a
// tile's row of pairs, so nothing is transposed. Tiles come in the order in which a product of kLanes vectors of columns
// takes them, [k / 32][part][lane][16 pairs][16 columns][2], zero beyond K and N.
#pragma once

#include "amx_split.h"

namespace frnn {
inline namespace FRNN_ISA {

// The next eight bits of 16 numbers of two rows, as pairs, taken off the numbers. Rounded to nearest: what is left after
// two parts is the third, exactly, and of either sign.
FRNN_HD __m512i next_pairs(__m512& even, __m512& odd) {
  const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  const __m512i first = _mm512_and_si512(_mm512_add_epi32((__m512i)even, half), upper);
  const __m512i second = _mm512_and_si512(_mm512_add_epi32((__m512i)odd, half), upper);
  even -= (__m512)first;
  odd -= (__m512)second;
  return _mm512_or_si512(_mm512_srli_epi32(first, 16), second);
}

// from: [K, columns], row stride `stride`, each number times `scale`, a power of two. Returns how large those are.
template <int kLanes>
Magnitude split_columns(const float* from, int64_t stride, int64_t K, int64_t columns, int parts, float scale,
                        BFloat16* to) {
  Magnitude magnitude;
  const __m512 factor = _mm512_set1_ps(scale);
  for (int64_t k = 0; k < K; k += kAmxDepth, to += parts * kLanes * kAmxTile)
    for (int pair = 0; pair < kAmxDepth / 2; ++pair) {
      const int64_t row = k + 2 * pair;
      for (int l = 0; l < kLanes; ++l) {
        __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
        if (row < K) even = first_floats(from + row * stride + l * 16, columns - l * 16) * factor;
        if (row + 1 < K) odd = first_floats(from + (row + 1) * stride + l * 16, columns - l * 16) * factor;
        magnitude.add(even);
        magnitude.add(odd);
        for (int p = 0; p < parts; ++p)
          _mm512_store_si512(to + (p * kLanes + l) * kAmxTile + pair * 32, next_pairs(even, odd));
      }
    }
  return magnitude;
}

// The same of numbers that are bfloat16: one part.
template <int kLanes>
void pair_columns(const BFloat16* from, int64_t stride, int64_t K, int64_t columns, BFloat16* to) {
  const auto row_of = [&](int64_t row, int l) {
    const int64_t n = columns - l * 16;
    if (row >= K || n <= 0) return _mm512_setzero_si512();
    const auto mask = static_cast<__mmask16>(n >= 16 ? 0xffff : (1u << n) - 1);
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from + row * stride + l * 16));
  };
  for (int64_t k = 0; k < K; k += kAmxDepth, to += kLanes * kAmxTile)
    for (int pair = 0; pair < kAmxDepth / 2; ++pair)
      for (int l = 0; l < kLanes; ++l)
        _mm512_store_si512(
            to + l * kAmxTile + pair * 32,
            _mm512_or_si512(row_of(k + 2 * pair, l), _mm512_slli_epi32(row_of(k + 2 * pair + 1, l), 16)));
}

}  // namespace FRNN_ISA
}  // namespace frnn
