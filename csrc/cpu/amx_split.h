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
    const uint32_t bits = largest();
    constexpr uint32_t kBias = 127, kLeast = (kBias - 40) << 23, kMost = (kBias + 40) << 23;
    return bits == 0 || (bits >= kLeast && bits <= kMost);
  }
  void add(const Magnitude& other) { largest_ = _mm512_max_epu32(largest_, other.largest_); }
  bool finite() const { return largest() < kInf; }
  // The power of two below it, as long as neither that nor its inverse is zero or denormal.
  int exponent() const {
    const int exponent = static_cast<int>(largest() >> 23) - 127;
    return exponent < -126 ? -126 : exponent > 126 ? 126 : exponent;
  }

 private:
  static constexpr uint32_t kInf = 0x7f800000;
  uint32_t largest() const { return _mm512_reduce_max_epu32(largest_); }

  __m512i largest_;
};

constexpr int kMostParts = 3;

// Of an exponent from -126 to 127.
FRNN_HD float power_of_two(int exponent) {
  const uint32_t bits = static_cast<uint32_t>(127 + exponent) << 23;
  float power;
  memcpy(&power, &bits, sizeof power);
  return power;
}

// Of numbers side by side.
FRNN_HD Magnitude magnitude_of(const float* a, int64_t count) {
  Magnitude magnitude;
  for (int64_t k = 0; k < count; k += 16) magnitude.add(first_floats(a + k, count - k));
  return magnitude;
}

// How a block lies in parts: each number times 2^-exponent, or, with NaN or Inf, not at all.
struct SplitScale {
  int exponent;
  bool splits;
};

// pack(scale) packs and returns the Magnitude. Gradients that vanish over many steps are brought to where they split.
template <class Pack>
SplitScale pack_to_scale(Pack&& pack) {
  const Magnitude magnitude = pack(1.0f);
  if (magnitude.splits()) return {0, true};
  if (!magnitude.finite()) return {0, false};
  pack(power_of_two(-magnitude.exponent()));
  return {magnitude.exponent(), true};
}

// The upper halves of 32 floats, in order.
FRNN_HD __m512i upper_halves(__m512i low, __m512i high) {
  alignas(64) static constexpr uint16_t kOdd[] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                  23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                  45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  return _mm512_permutex2var_epi16(low, _mm512_load_si512(kOdd), high);
}

// 32 numbers -> part[p], each the next eight bits: rounded to nearest, all but the third, which is exact.
FRNN_HD void split(__m512 low, __m512 high, int parts, __m512i* part) {
  const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
#pragma GCC unroll 3
  for (int p = 0; p < parts; ++p) {
    __m512i first = (__m512i)low, second = (__m512i)high;
    if (p < 2) first = _mm512_add_epi32(first, half), second = _mm512_add_epi32(second, half);
    part[p] = upper_halves(first, second);
    low -= (__m512)_mm512_and_si512(first, upper);
    high -= (__m512)_mm512_and_si512(second, upper);
  }
}

// Row r of up to 32, all K numbers of it times `scale`, a power of two, into tiles [k / 32][part][32 rows][32]; `to` is
// where the row begins there. Returns how large those are.
FRNN_HD Magnitude split_row(const float* a, int64_t K, int parts, float scale, BFloat16* to) {
  const __m512 factor = _mm512_set1_ps(scale);
  Magnitude magnitude;
  for (int64_t k = 0; k < K; k += kAmxDepth) {
    const __m512 low = first_floats(a + k, K - k) * factor;
    const __m512 high = first_floats(a + k + 16, K - k - 16) * factor;
    magnitude.add(low);
    magnitude.add(high);
    __m512i part[kMostParts];
    split(low, high, parts, part);
    for (int p = 0; p < parts; ++p, to += 2 * kAmxTile) _mm512_store_si512(to, part[p]);
  }
  return magnitude;
}

// Up to 32 rows of length K, and the same in parts: [k / 32][part][32 rows][32], tile after tile as the product takes them.
class SplitRows {
 public:
  static int64_t size(int64_t K, int parts) { return divide_up(K, kAmxDepth) * parts * 2 * kAmxTile; }

  SplitRows() = default;
  SplitRows(BFloat16* memory, const float* const* a, int rows, int64_t K, int parts)
      : rows_(a), tiles_(memory), splits_(true) {
    for (int r = 0; r < rows; ++r)
      splits_ &= split_row(a[r], K, parts, 1.0f, memory + r * kAmxDepth).splits();
  }
  bool splits() const { return splits_; }
  const float* const* rows() const { return rows_; }
  const BFloat16* tiles() const { return tiles_; }

 private:
  const float* const* rows_;
  const BFloat16* tiles_;
  bool splits_;
};

// A product of two lanes with the parts of one block of k: tiles are 0 to 3 sums, 4 and 5 rows, 6 and 7 weights. Without
// kTwo there are 16 rows at most, without kPair one lane.
template <bool kTwo, bool kPair>
struct SplitBlock {
  static constexpr int kLanes = kPair ? 2 : 1;
  const BFloat16 *a, *w;  // [part][2][16][32], [part][lane][16][32]

  FRNN_HD void upper(int part) const { load_tile<4>(a + part * 2 * kAmxTile, 64); }
  FRNN_HD void lower(int part) const {
    if constexpr (kTwo) load_tile<5>(a + (part * 2 + 1) * kAmxTile, 64);
  }
  FRNN_HD void left(int part) const { load_tile<6>(w + part * kLanes * kAmxTile, 64); }
  FRNN_HD void right(int part) const {
    if constexpr (kPair) load_tile<7>(w + (part * kLanes + 1) * kAmxTile, 64);
  }
  FRNN_HD void upper_left() const { add_tile_product<0, 4, 6>(); }
  FRNN_HD void upper_right() const {
    if constexpr (kPair) add_tile_product<1, 4, 7>();
  }
  FRNN_HD void lower_left() const {
    if constexpr (kTwo) add_tile_product<2, 5, 6>();
  }
  FRNN_HD void lower_right() const {
    if constexpr (kTwo && kPair) add_tile_product<3, 5, 7>();
  }

  // Of the rows' part that is there with the weights' part that is there; then, as soon as nothing needs it any more, the
  // next part of one side. Loads between products cost less than loads before them (measured: a tenth).
  FRNN_HD void then_weights(int part) const {
    upper_left(), lower_left(), left(part), upper_right(), lower_right(), right(part);
  }
  FRNN_HD void then_rows(int part) const {
    upper_left(), upper_right(), upper(part), lower_left(), lower_right(), lower(part);
  }
  // One part is bfloat16 as it is.
  FRNN_HD void multiply(int parts) const {
    upper(0), left(parts - 1), right(parts - 1), lower(0);
    if (parts == 3) then_weights(1), then_rows(1);
    if (parts > 1) then_weights(0);
    if (parts == 3) then_rows(2), then_rows(0);
    if (parts == 2) then_rows(1);
    upper_left(), upper_right(), lower_left(), lower_right();
  }
};

template <bool kTwo, bool kPair, class Pause>
FRNN_HD void split_lanes(const BFloat16* a, int64_t blocks, const BFloat16* w, int parts, float* acc,
                         int64_t stride, bool add, Pause&& pause) {
  constexpr int kLanes = kPair ? 2 : 1;
  float* const lower = acc + kAmxRows * stride / 4;
  begin_sums<0>(acc, stride, add);
  if constexpr (kPair) begin_sums<1>(acc + 16, stride, add);
  if constexpr (kTwo) begin_sums<2>(lower, stride, add);
  if constexpr (kTwo && kPair) begin_sums<3>(lower + 16, stride, add);
  for (int64_t k = 0; k < blocks; ++k, a += parts * 2 * kAmxTile, w += parts * kLanes * kAmxTile) {
    SplitBlock<kTwo, kPair>{a, w}.multiply(parts);
    pause();
  }
  store_tile<0>(acc, stride);
  if constexpr (kPair) store_tile<1>(acc + 16, stride);
  if constexpr (kTwo) store_tile<2>(lower, stride);
  if constexpr (kTwo && kPair) store_tile<3>(lower + 16, stride);
}

template <bool kPair, class Pause>
FRNN_HD void split_pair(const BFloat16* a, int rows, int64_t blocks, const BFloat16* w, int parts, float* acc,
                        int64_t stride, bool add, Pause&& pause) {
  if (rows > kAmxRows)
    split_lanes<true, kPair>(a, blocks, w, parts, acc, stride, add, pause);
  else
    split_lanes<false, kPair>(a, blocks, w, parts, acc, stride, add, pause);
}

// acc[row][lane][unit], as packed_product leaves it.
template <int kLanes, class Pause>
__attribute__((noinline)) void split_product(const BFloat16* a, int rows, int64_t K, const BFloat16* w,
                                             int parts, float* acc, bool add, Pause&& pause) {
  static_assert(kLanes <= 4, "lanes are taken two at a time");
  AmxShapes::use(rows);
  const int64_t blocks = divide_up(K, kAmxDepth), stride = kLanes * 64;
  split_pair<(kLanes > 1)>(a, rows, blocks, w, parts, acc, stride, add, pause);
  if constexpr (kLanes > 2)
    split_pair<(kLanes > 3)>(a, rows, blocks, w + blocks * parts * 2 * kAmxTile, parts, acc + 32, stride, add,
                             pause);
}

// GateWeights in parts, [pair of lanes][k / 32][part][lane][16 pairs][16 units][2] a panel: tiles in the order of their use.
template <int kGates, int kVectors>
class SplitWeights {
 public:
  static constexpr int kUnits = kVectors * 16, kLanes = kGates * kVectors;

  SplitWeights(const float* weights, int64_t units, int64_t K, int parts, bool kept)
      : weights_(weights), units_(units), K_(K), parts_(parts),
        panels_({weights, &kLayout, units, K, parts}, panels(), panel_size(), kept) {}

  int64_t panels() const { return divide_up(units_, kUnits); }

  void pack(int64_t panel) const {
    panels_.renew(
        panel, [&] { return digest_of_units<kGates>(weights_, units_, K_, panel * kUnits, kUnits); },
        [&](BFloat16*) { return split(panel, 1.0f).splits(); });
  }

  // As GateWeights.
  template <class Pause = NoPause>
  void multiply(const SplitRows& a, int rows, int64_t panel, float* acc, bool add = false,
                Pause&& pause = NoPause()) const {
    if (a.splits() && panels_.note(panel))
      multiply_parts(a.tiles(), rows, panel, acc, add, pause);
    else
      multiply_floats(a.rows(), rows, panel, acc, add);
  }

  int64_t pauses() const { return divide_up(K_, kAmxDepth) * divide_up(kLanes, 2); }

 protected:
  // Packs each number times `scale`, a power of two. Returns how large those are.
  Magnitude split(int64_t panel, float scale) const {
    Magnitude magnitude;
    const __m512 factor = _mm512_set1_ps(scale);
    const int64_t pair_size = divide_up(K_, kAmxDepth) * parts_ * 2 * kAmxTile;
    for (int lane = 0; lane < kLanes; ++lane) {
      const int lanes = lane / 2 * 2 + 1 < kLanes ? 2 : 1;  // of its pair
      BFloat16* to = panels_.at(panel) + lane / 2 * pair_size + lane % 2 * kAmxTile;
      const float* of_gate = weights_ + lane / kVectors * units_ * K_;
      for (int64_t k = 0; k < K_; k += kAmxDepth) {
        Vec<float> square[kMostParts][16];  // a pair of k where a float would be
        for (int u = 0; u < 16; ++u) {
          // Places of units beyond the last repeat it; what they give is dropped.
          const int64_t unit = smallest(panel * kUnits + lane % kVectors * 16 + u, units_ - 1);
          const float* w = of_gate + unit * K_ + k;
          const __m512 low = first_floats(w, K_ - k) * factor;
          const __m512 high = first_floats(w + 16, K_ - k - 16) * factor;
          magnitude.add(low);
          magnitude.add(high);
          __m512i part[kMostParts];
          frnn::split(low, high, parts_, part);
          for (int p = 0; p < parts_; ++p) square[p][u] = Vec<float>((Vec<float>::Native)part[p]);
        }
        for (int p = 0; p < parts_; ++p, to += lanes * kAmxTile) {
          transpose(square[p]);
          for (int pair = 0; pair < 16; ++pair) memcpy(to + pair * 32, &square[p][pair].v, 64);
        }
      }
    }
    return magnitude;
  }

  template <class Pause>
  void multiply_parts(const BFloat16* a, int rows, int64_t panel, float* acc, bool add, Pause&& pause) const {
    split_product<kLanes>(a, rows, K_, panels_.at(panel), parts_, acc, add, pause);
  }
  void multiply_floats(const float* const* a, int rows, int64_t panel, float* acc, bool add) const {
    for (int r = 0; r < rows; r += kMaxTileRows)
      direct_product<float, kGates, kVectors>(a + r, static_cast<int>(smallest(rows - r, kMaxTileRows)), K_,
                                              weights_, units_, panel * kUnits, acc + r * kGates * kUnits,
                                              add);
  }

 private:
  int64_t panel_size() const { return divide_up(K_, kAmxDepth) * parts_ * kLanes * kAmxTile; }
  static constexpr char kLayout = 0;  // its address

  const float* weights_;
  int64_t units_, K_;
  int parts_;
  Panels<BFloat16> panels_;  // noted of each: whether it splits
};

// As PlainProducts, by parts. Absent weights have no panels.
template <template <int, int> class WeightsInParts, class Rows>
struct ProductsInParts {
  using Session = AmxSession;
  template <int kGates, int kVectors>
  using Weights = WeightsInParts<kGates, kVectors>;
  using Operand = Rows;
  using Part = BFloat16;
  static constexpr bool kPauses = true;

  int parts;  // of a number: 3, or 2 for less accuracy

  static constexpr int tile_rows(int /*lanes*/) { return 2 * kAmxRows; }
  template <int kGates, int kVectors>
  Weights<kGates, kVectors> weights(const float* weights, int64_t units, int64_t K, Packing packing) const {
    return {weights, weights ? units : 0, K, parts, packing == Packing::kept};
  }
  int64_t operand_size(int64_t K) const { return SplitRows::size(K, parts); }
  Operand operand(BFloat16* memory, const float* const* rows, int count, int64_t K) const {
    return {memory, rows, count, K, parts};
  }
};
using SplitProducts = ProductsInParts<SplitWeights, SplitRows>;

}  // namespace FRNN_ISA
}  // namespace frnn
