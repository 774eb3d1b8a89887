// The products of product.h for bfloat16 on AMX. A packed panel is a column of tiles as it lies: 16 pairs of k, of each
// of which a vector of 16 units is one row of a tile, [pair][unit][2]. Rows of h and x are tiles of 16 rows and 32 k.
#pragma once

#include "amx.h"
#include "bfloat16.h"
#include "product.h"

namespace frnn {
inline namespace FRNN_ISA {

// The rows of a product, a block of 32 k at a time: where they lie, if they are evenly spaced there; else, and for what
// is left of K after the last whole block, copied and filled up with zeros.
class AmxRows {
 public:
  AmxRows(const BFloat16* const* a, int rows, int64_t K) : a_(a), rows_(rows), K_(K) {
    stride_ = rows > 1 ? address(1) - address(0) : 0;
    even_ = true;
    for (int r = 2; r < rows; ++r) even_ &= address(r) - address(r - 1) == stride_;
  }

  // Loads tile 4, and tile 5 where there are more than 16 rows.
  template <bool kTwo>
  FRNN_HD void load(int64_t k) {
    if (even_ && k + kAmxDepth <= K_) {
      load_tile<4>(a_[0] + k, stride_);
      if constexpr (kTwo) load_tile<5>(a_[kAmxRows] + k, stride_);
      return;
    }
    for (int r = 0; r < rows_; ++r) _mm512_store_si512(copy_[r], (__m512i)load_pairs(a_[r] + k, K_ - k));
    load_tile<4>(copy_[0], sizeof copy_[0]);
    if constexpr (kTwo) load_tile<5>(copy_[kAmxRows], sizeof copy_[0]);
  }

 private:
  intptr_t address(int r) const { return reinterpret_cast<intptr_t>(a_[r]); }

  const BFloat16* const* a_;
  int rows_;
  int64_t K_, stride_;
  bool even_;
  alignas(64) BFloat16 copy_[2 * kAmxRows][kAmxDepth];
};

// Sums of the lanes kFirst, kFirst + 1, ... of a panel. Up to 16 rows, four lanes.
template <int kFirst, int kLanes, class Pause, int... l>
FRNN_HD void amx_row_of_sums(AmxRows& a, int64_t K, const BFloat16* weights, int64_t stride, float* acc,
                             bool add, Pause&& pause, std::integer_sequence<int, l...>) {
  (begin_sums<l>(acc + (kFirst + l) * 16, kLanes * 64, add), ...);
  for (int64_t k = 0; k < K; k += kAmxDepth, weights += kAmxDepth / 2 * stride) {
    a.load<false>(k);
    ((load_tile<5 + l % 3>(weights + (kFirst + l) * 32, stride * sizeof(BFloat16)),
      add_tile_product<l, 4, 5 + l % 3>()),
     ...);
    pause();
  }
  (store_tile<l>(acc + (kFirst + l) * 16, kLanes * 64), ...);
}

// Up to 32 rows, two lanes.
template <int kFirst, int kLanes, class Pause, int... l>
FRNN_HD void amx_square_of_sums(AmxRows& a, int64_t K, const BFloat16* weights, int64_t stride, float* acc,
                                bool add, Pause&& pause, std::integer_sequence<int, l...>) {
  float* const lower = acc + kAmxRows * kLanes * 16;
  (begin_sums<l>(acc + (kFirst + l) * 16, kLanes * 64, add), ...);
  (begin_sums<2 + l>(lower + (kFirst + l) * 16, kLanes * 64, add), ...);
  for (int64_t k = 0; k < K; k += kAmxDepth, weights += kAmxDepth / 2 * stride) {
    a.load<true>(k);
    (load_tile<6 + l>(weights + (kFirst + l) * 32, stride * sizeof(BFloat16)), ...);
    (add_tile_product<l, 4, 6 + l>(), ...);
    (add_tile_product<2 + l, 5, 6 + l>(), ...);
    pause();
  }
  (store_tile<l>(acc + (kFirst + l) * 16, kLanes * 64), ...);
  (store_tile<2 + l>(lower + (kFirst + l) * 16, kLanes * 64), ...);
}

// acc[row][lane][unit], as packed_product leaves it.
template <int kLanes, class Pause = NoPause>
__attribute__((noinline)) void amx_product(const BFloat16* const* a, int rows, int64_t K,
                                           const BFloat16* weights, int64_t stride, float* acc, bool add,
                                           Pause&& pause = NoPause()) {
  static_assert(kLanes <= 4, "a row of sums is four tiles");
  constexpr int kPair = kLanes > 1 ? 2 : 1;
  AmxShapes::use(rows);
  AmxRows tiles(a, rows, K);
  if (rows <= kAmxRows)
    return amx_row_of_sums<0, kLanes>(tiles, K, weights, stride, acc, add, pause,
                                      std::make_integer_sequence<int, kLanes>());
  amx_square_of_sums<0, kLanes>(tiles, K, weights, stride, acc, add, pause,
                                std::make_integer_sequence<int, kPair>());
  if constexpr (kLanes > 2)
    amx_square_of_sums<2, kLanes>(tiles, K, weights, stride, acc, add, pause,
                                  std::make_integer_sequence<int, kLanes - 2>());
}

// A product of tiles takes its 16 cycles for one row as for 16 rows; without tiles one row takes as long (AVX512_BF16,
// a product of pairs a cycle). But storing the sums of a tile costs another 68 ns (measured on Sapphire Rapids), some
// 12 products. So tiles should gain from about four rows on; that is not measured, and this is twice as many.
constexpr int kFewestAmxRows = 8;

template <>
struct PackedProduct<BFloat16> {
  using Session = AmxSession;
  static constexpr int kMaxTileRows = 2 * kAmxRows;
  static constexpr int tile_rows(int) { return kMaxTileRows; }

  static constexpr bool kPauses = true;
  // With up to 16 rows there are half as many: then some rows wait until the end.
  static constexpr int64_t pauses(int lanes, int64_t K) {
    return (K + kAmxDepth - 1) / kAmxDepth * (lanes > 2 ? 2 : 1);
  }

  template <int kLanes, class Pause>
  static void multiply(const BFloat16* const* a, int rows, int64_t K, const BFloat16* weights, int64_t stride,
                       float* acc, bool add, Pause&& pause) {
    if (rows >= kFewestAmxRows) return amx_product<kLanes>(a, rows, K, weights, stride, acc, add, pause);
    constexpr int kRows = frnn::tile_rows(kLanes);
    for (int first = 0; first < rows; first += kRows)
      packed_product<BFloat16, kLanes>(a + first, rows - first < kRows ? rows - first : kRows, K, weights,
                                       stride, acc + first * kLanes * 16, add);
  }
};

}  // namespace FRNN_ISA
}  // namespace frnn
