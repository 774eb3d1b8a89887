// float products in the tiles of AMX: a float is the sum of three bfloat16, exactly, and a product of two floats the
// sum of six products of their parts. The other three are below 2^-24 of it. With two parts and three products the
// error is some 2^-16: only where the user has asked for speed.
#pragma once

#include <immintrin.h>

#include "amx.h"
#include "weights.h"

namespace frnn {
inline namespace FRNN_ISA {

constexpr int64_t kAmxTile = kAmxRows * kAmxDepth;  // numbers of a tile

static_assert(Vec<float>::kSize == 16, "a tile's row is 16 sums");

// 16 numbers, or the first n of them and zeros.
FRNN_HD __m512 first_floats(const float* p, int64_t n) {
  return n >= 16 ? _mm512_loadu_ps(p)
                 : _mm512_maskz_loadu_ps(static_cast<__mmask16>(n > 0 ? (1u << n) - 1 : 0), p);
}

// How large the numbers of an operand are: the largest magnitude, as an integer. NaN and Inf are the largest integers.
class Magnitude {
 public:
  FRNN_HD Magnitude() : largest_(_mm512_setzero_si512()) {}
  FRNN_HD void add(__m512 x) {
    largest_ = _mm512_max_epu32(largest_, _mm512_and_si512((__m512i)x, _mm512_set1_epi32(0x7fffffff)));
  }
  // Whether products of it may be made of parts. Beyond 2^40 they could overflow where the products themselves do not,
  // and a part of Inf is NaN. Tiles take denormal parts as zero and make denormal sums zero: with the largest numbers
  // of both operands above 2^-40 what is lost so is nothing beside a rounding of their product.
  bool splits() const {
    const uint32_t bits = _mm512_reduce_max_epu32(largest_);
    constexpr uint32_t kBias = 127, kLeast = (kBias - 40) << 23, kMost = (kBias + 40) << 23;
    return bits == 0 || (bits >= kLeast && bits <= kMost);
  }

 private:
  __m512i largest_;
};

constexpr int kMostParts = 3;

// 32 numbers -> part[p], each the next eight bits.
FRNN_HD void split(__m512 low, __m512 high, int parts, __m512i* part) {
  for (int p = 0; p < parts; ++p) {
    const __m256i first = (__m256i)_mm512_cvtneps_pbh(low), second = (__m256i)_mm512_cvtneps_pbh(high);
    part[p] = _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
    low -= (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(first), 16);
    high -= (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16);
  }
}

// Up to 32 rows of length K in parts: [k / 32][part][32 rows][32], tile after tile as the product takes them.
class SplitRows {
 public:
  static int64_t size(int64_t K, int parts) { return divide_up(K, kAmxDepth) * parts * 2 * kAmxTile; }

  void split_into(BFloat16* memory, const float* const* a, int rows, int64_t K, int parts) {
    tiles_ = memory;
    splits_ = true;
    for (int r = 0; r < rows; ++r) {
      Magnitude magnitude;
      BFloat16* to = memory + r * kAmxDepth;
      for (int64_t k = 0; k < K; k += kAmxDepth) {
        const __m512 low = first_floats(a[r] + k, K - k), high = first_floats(a[r] + k + 16, K - k - 16);
        magnitude.add(low);
        magnitude.add(high);
        __m512i part[kMostParts];
        split(low, high, parts, part);
        for (int p = 0; p < parts; ++p, to += 2 * kAmxTile) _mm512_store_si512(to, part[p]);
      }
      splits_ &= magnitude.splits();
    }
  }
  bool splits() const { return splits_; }
  const BFloat16* tiles() const { return tiles_; }

 private:
  const BFloat16* tiles_;
  bool splits_;
};

// What a product of two lanes does with the parts of one block of k: tiles are 0 to 3 sums, 4 and 5 rows, 6 and 7
// weights. Without kTwo there are 16 rows at most, without kPair one lane.
template <bool kTwo, bool kPair, int kLanes>
struct SplitBlock {
  const BFloat16 *a, *w;  // [part][2][16][32], [part][lane][16][32]

  FRNN_HD void rows(int part) const {
    load_tile<4>(a + part * 2 * kAmxTile, 64);
    if constexpr (kTwo) load_tile<5>(a + (part * 2 + 1) * kAmxTile, 64);
  }
  FRNN_HD void weights(int part) const {
    load_tile<6>(w + part * kLanes * kAmxTile, 64);
    if constexpr (kPair) load_tile<7>(w + (part * kLanes + 1) * kAmxTile, 64);
  }
  FRNN_HD void multiply() const {
    add_tile_product<0, 4, 6>();
    if constexpr (kPair) add_tile_product<1, 4, 7>();
    if constexpr (kTwo) add_tile_product<2, 5, 6>();
    if constexpr (kTwo && kPair) add_tile_product<3, 5, 7>();
  }
};

template <bool kTwo, bool kPair, int kLanes>
FRNN_HD void split_lanes(const BFloat16* a, int64_t blocks, const BFloat16* w, int parts, float* acc,
                         bool add) {
  constexpr int64_t kStride = kLanes * 64;
  float* const lower = acc + kAmxRows * kLanes * 16;
  begin_sums<0>(acc, kStride, add);
  if constexpr (kPair) begin_sums<1>(acc + 16, kStride, add);
  if constexpr (kTwo) begin_sums<2>(lower, kStride, add);
  if constexpr (kTwo && kPair) begin_sums<3>(lower + 16, kStride, add);
  for (int64_t k = 0; k < blocks; ++k, a += parts * 2 * kAmxTile, w += parts * kLanes * kAmxTile) {
    const SplitBlock<kTwo, kPair, kLanes> block{a, w};
    // In an order that loads little: from one product to the next, one side's part stays.
    block.rows(0), block.weights(0), block.multiply();
    block.weights(1), block.multiply();
    block.rows(1);
    if (parts == 3) block.multiply();
    block.weights(0), block.multiply();
    if (parts == 3) block.rows(2), block.multiply(), block.rows(0), block.weights(2), block.multiply();
  }
  store_tile<0>(acc, kStride);
  if constexpr (kPair) store_tile<1>(acc + 16, kStride);
  if constexpr (kTwo) store_tile<2>(lower, kStride);
  if constexpr (kTwo && kPair) store_tile<3>(lower + 16, kStride);
}

template <int kFirst, int kLanes>
FRNN_HD void split_pair(const BFloat16* a, int rows, int64_t blocks, const BFloat16* w, int parts, float* acc,
                        bool add) {
  constexpr bool kPair = kFirst + 1 < kLanes;
  w += kFirst * kAmxTile, acc += kFirst * 16;
  if (rows > kAmxRows)
    split_lanes<true, kPair, kLanes>(a, blocks, w, parts, acc, add);
  else
    split_lanes<false, kPair, kLanes>(a, blocks, w, parts, acc, add);
}

// acc[row][lane][unit], as packed_product leaves it.
template <int kLanes>
__attribute__((noinline)) void split_product(const BFloat16* a, int rows, int64_t K, const BFloat16* w,
                                             int parts, float* acc, bool add) {
  static_assert(kLanes <= 4, "lanes are taken two at a time");
  AmxShapes::use(rows);
  const int64_t blocks = divide_up(K, kAmxDepth);
  split_pair<0, kLanes>(a, rows, blocks, w, parts, acc, add);
  if constexpr (kLanes > 2) split_pair<2, kLanes>(a, rows, blocks, w, parts, acc, add);
}

// GateWeights in parts, [k / 32][part][lane][16 pairs][16 units][2] a panel: the tiles in the order of their use.
template <int kGates, int kVectors>
class SplitWeights {
 public:
  static constexpr int kUnits = kVectors * 16, kLanes = kGates * kVectors;

  SplitWeights(const float* weights, int64_t units, int64_t K, int parts)
      : weights_(weights), units_(units), K_(K), parts_(parts), panels_(panels() * panel_size()),
        splits_(panels()) {}

  int64_t panels() const { return divide_up(units_, kUnits); }

  void pack(int64_t panel) const {
    Magnitude magnitude;
    BFloat16* to = packed(panel);
    for (int64_t k = 0; k < K_; k += kAmxDepth, to += parts_ * kLanes * kAmxTile)
      for (int g = 0; g < kGates; ++g)
        for (int v = 0; v < kVectors; ++v) {
          Vec<float> square[kMostParts][16];  // a pair of k where a float would be
          for (int u = 0; u < 16; ++u) {
            // Places of units beyond the last repeat it; what they give is dropped.
            const int64_t unit = smallest(panel * kUnits + v * 16 + u, units_ - 1);
            const float* w = weights_ + (g * units_ + unit) * K_ + k;
            const __m512 low = first_floats(w, K_ - k), high = first_floats(w + 16, K_ - k - 16);
            magnitude.add(low);
            magnitude.add(high);
            __m512i part[kMostParts];
            split(low, high, parts_, part);
            for (int p = 0; p < parts_; ++p) square[p][u] = Vec<float>((Vec<float>::Native)part[p]);
          }
          for (int p = 0; p < parts_; ++p) {
            transpose(square[p]);
            for (int pair = 0; pair < 16; ++pair)
              memcpy(to + (p * kLanes + g * kVectors + v) * kAmxTile + pair * 32, &square[p][pair].v, 64);
          }
        }
    splits_.get()[panel] = magnitude.splits();
  }

  // acc[row][gate][unit of the panel], from the rows a, or from the same rows split; `add`: to what is there.
  void multiply(const float* const* a, const SplitRows& rows_split, int rows, int64_t panel, float* acc,
                bool add) const {
    if (rows_split.splits() && splits_.get()[panel])
      return split_product<kLanes>(rows_split.tiles(), rows, K_, packed(panel), parts_, acc, add);
    for (int r = 0; r < rows; r += kMaxTileRows)
      direct_product<float, kGates, kVectors>(a + r, static_cast<int>(smallest(rows - r, kMaxTileRows)), K_,
                                              weights_, units_, panel * kUnits, acc + r * kGates * kUnits,
                                              add);
  }

 private:
  int64_t panel_size() const { return divide_up(K_, kAmxDepth) * parts_ * kLanes * kAmxTile; }
  BFloat16* packed(int64_t panel) const { return panels_.get() + panel * panel_size(); }

  const float* weights_;
  int64_t units_, K_;
  int parts_;
  Buffer<BFloat16> panels_;
  Buffer<bool> splits_;  // of a panel
};

}  // namespace FRNN_ISA
}  // namespace frnn
