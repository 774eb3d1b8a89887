// The float products of matrix.h on AMX, of operands in parts (amx_split.h). A block of the right operand in parts stays
// in L2 while all rows of the result pass, 32 of the left operand's in L1 while they meet it.
#pragma once

#include "amx_columns.h"
#include "matrix.h"

namespace frnn {
inline namespace FRNN_ISA {

constexpr int kSplitTile = 2 * kAmxRows;  // rows of the result at a time, and columns

// A block of k: 32 rows of the left operand in three parts are half of L1, and so many columns of the right one 768 KB of
// L2's 2 MB. Measured on two cores of a Sapphire Rapids: 256 k and 512 columns are up to a quarter slower.
constexpr int64_t kBlockDepth = 128, kRightColumns = 1024;

// Left operands: rows m of the result, up to 32 of them, and K numbers of k. Both split as SplitRows does,
// [k / 32][part][32 rows][32], each number times `scale`.
struct LeftRows {
  const float* a;  // [M, K], row stride `stride`
  int64_t stride;

  // Brings the i-th of `count` shares of what `split` reads to L2: its rows lie in other pages each time, and the hardware
  // sees no order in them. Measured on two cores of a Sapphire Rapids: a fifth of the product's time. Columns, which come
  // back to the same pages, gain nothing.
  static constexpr bool kFetches = true;
  FRNN_HD void fetch(int64_t m, int rows, int64_t k0, int64_t K, int64_t i, int64_t count) const {
    const Range share = share_of(rows, static_cast<int>(i), static_cast<int>(count));
    for (int64_t r = share.first; r < share.last; ++r)
      for (int64_t k = 0; k < K; k += 16) _mm_prefetch(a + (m + r) * stride + k0 + k, _MM_HINT_T1);
  }

  Magnitude split(int64_t m, int rows, int64_t k0, int64_t K, int parts, float scale, BFloat16* to) const {
    Magnitude magnitude;
    for (int r = 0; r < rows; ++r)
      magnitude.add(split_row(a + (m + r) * stride + k0, K, parts, scale, to + r * kAmxDepth));
    return magnitude;
  }

  // acc[row][column of the panel] in float. panel: [K][32]
  void multiply(int64_t m, int rows, int64_t k0, int64_t K, const float* panel, float* acc) const {
    const float* row[kSplitTile];
    for (int r = 0; r < rows; ++r) row[r] = a + (m + r) * stride + k0;
    for (int r = 0; r < rows; r += kMaxTileRows)
      packed_product<float, kProductVectors>(row + r, static_cast<int>(smallest(rows - r, kMaxTileRows)), K,
                                             panel, kSplitTile, acc + r * kSplitTile);
  }
};

struct LeftColumns {
  const float* a;  // [K, M], row stride `stride`
  int64_t stride;
  static constexpr bool kFetches = false;

  Magnitude split(int64_t m, int rows, int64_t k0, int64_t K, int parts, float scale, BFloat16* to) const {
    const __m512 factor = _mm512_set1_ps(scale);
    Magnitude magnitude;
    for (int64_t k = 0; k < K; k += kAmxDepth, to += parts * 2 * kAmxTile)
      for (int half = 0; half < rows; half += kAmxRows) {
        const float* from = a + (k0 + k) * stride + m + half;
        Vec<float> even[kAmxRows], odd[kAmxRows];
        for (int pair = 0; pair < kAmxRows; ++pair, from += 2 * stride) {
          const int64_t left = K - k - 2 * pair;
          const __m512 first = left > 0 ? first_floats(from, rows - half) * factor : _mm512_setzero_ps();
          const __m512 second =
              left > 1 ? first_floats(from + stride, rows - half) * factor : _mm512_setzero_ps();
          magnitude.add(first);
          magnitude.add(second);
          even[pair].v = (Vec<float>::Native)first, odd[pair].v = (Vec<float>::Native)second;
        }
        transpose(even);
        transpose(odd);
        for (int r = 0; r < kAmxRows; ++r) {
          __m512 low = (__m512)even[r].v, high = (__m512)odd[r].v;
          for (int p = 0; p < parts; ++p)
            _mm512_store_si512(to + p * 2 * kAmxTile + (half + r) * kAmxDepth, next_pairs(low, high));
        }
      }
    return magnitude;
  }

  void multiply(int64_t m, int rows, int64_t k0, int64_t K, const float* panel, float* acc) const {
    const Buffer<float> block(K * kBlockUnits);
    copy_block(a + k0 * stride + m, stride, K, rows, block.get());
    for (int r = 0; r < rows; r += kMaxTileRows)
      packed_product_of_columns<kBlockUnits, kProductVectors, kRowSum>(
          block.get() + r, static_cast<int>(smallest(rows - r, kMaxTileRows)), K, panel, kSplitTile,
          acc + r * kSplitTile);
  }
};

// A tile of the result that waits in `sums` to be added to c while the next one is multiplied: the sums of a tile come
// long after its last product has begun, and who waits for them leaves the tiles idle.
struct WaitingTile {
  const float* sums;  // [32][32]
  float* to;
  int64_t stride;
  int rows, columns, exponent;  // each sum times 2^exponent
  bool add;

  FRNN_HD void put(Range share) const {
    const __m512 power = _mm512_set1_ps(static_cast<float>(exponent));
    for (int v = 0; v < kSplitTile; v += 16)
      with_count<16>(columns - v, [&](auto count) {
        for (int64_t r = share.first; r < share.last; ++r) {
          Vec<float> sum = load(sums + r * kSplitTile + v);
          if (exponent != 0) sum.v = (Vec<float>::Native)_mm512_maskz_scalef_ps(0xffff, (__m512)sum.v, power);
          float* at = to + r * stride + v;
          store(at, add ? load(at, count) + sum : sum, count);
        }
      });
  }
};

// c = left right, or c += left right.
template <class Left>
struct SplitProduct {
  Left left;
  const float* right;  // [K, N], row stride right_stride
  int64_t right_stride, M, N, K;
  float* c;  // [M, N]
  bool add;
  int parts;

  // The tiles of some rows and columns of c.
  void run(Range row_tiles, Range column_tiles) const {
    const AmxSession session;
    const Range m{row_tiles.first * kSplitTile, smallest(row_tiles.last * kSplitTile, M)};
    const int64_t n0 = column_tiles.first * kSplitTile, n1 = smallest(column_tiles.last * kSplitTile, N);
    // Blocks of nearly the same depth, of whole tiles.
    const int64_t depth = divide_up(divide_up(K, divide_up(K, kBlockDepth)), kAmxDepth) * kAmxDepth;
    const int64_t panels = divide_up(smallest(n1 - n0, kRightColumns), kSplitTile);
    const Buffer<BFloat16> left_parts(depth * kSplitTile * parts);
    const Buffer<BFloat16> right_parts(panels * depth * kSplitTile * parts);
    const Buffer<SplitScale> scales(panels);
    for (int64_t n = n0; n < n1; n += kRightColumns)
      for (int64_t k = 0; k < K; k += depth)
        run_block(m, {n, smallest(n1, n + kRightColumns)}, {k, smallest(K, k + depth)}, left_parts.get(),
                  right_parts.get(), scales.get());
  }

 private:
  void run_block(Range m_range, Range n_range, Range k_range, BFloat16* left_parts, BFloat16* right_parts,
                 SplitScale* scales) const {
    const int64_t k = k_range.first, depth = k_range.last - k, blocks = divide_up(depth, kAmxDepth);
    const int64_t panels = divide_up(n_range.last - n_range.first, kSplitTile);
    const int64_t panel_size = blocks * parts * 2 * kAmxTile;
    for (int64_t n = n_range.first, i = 0; n < n_range.last; n += kSplitTile, ++i)
      scales[i] = pack_to_scale([&](float scale) {
        return split_columns<2>(right + k * right_stride + n, right_stride, depth, N - n, parts, scale,
                                right_parts + i * panel_size);
      });
    alignas(64) float sums[2][kSplitTile * kSplitTile];
    WaitingTile waiting{sums[1], c, N, 0, 0, 0, false};
    for (int64_t m = m_range.first; m < m_range.last; m += kSplitTile) {
      const int rows = static_cast<int>(smallest(m_range.last - m, kSplitTile));
      const int next_rows = static_cast<int>(smallest(m_range.last - m - rows, kSplitTile));
      const SplitScale left_scale =
          pack_to_scale([&](float scale) { return left.split(m, rows, k, depth, parts, scale, left_parts); });
      for (int64_t n = n_range.first, i = 0; n < n_range.last; n += kSplitTile, ++i) {
        float* const now = waiting.sums == sums[0] ? sums[1] : sums[0];
        const bool splits = left_scale.splits && scales[i].splits;
        if (splits) {
          int64_t block = 0;
          split_product<2>(left_parts, rows, depth, right_parts + i * panel_size, parts, now, false, [&] {
            waiting.put(share_of(waiting.rows, static_cast<int>(block), static_cast<int>(blocks)));
            if constexpr (Left::kFetches)
              left.fetch(m + kSplitTile, next_rows, k, depth, i * blocks + block, panels * blocks);
            ++block;
          });
        } else {
          waiting.put({0, waiting.rows});
          multiply_floats(m, rows, k, depth, n, now);
        }
        waiting = {now,
                   c + m * N + n,
                   N,
                   rows,
                   static_cast<int>(smallest(N - n, kSplitTile)),
                   splits ? left_scale.exponent + scales[i].exponent : 0,
                   add || k > 0};
      }
    }
    waiting.put({0, waiting.rows});
  }

  __attribute__((noinline)) void multiply_floats(int64_t m, int rows, int64_t k, int64_t K_block, int64_t n,
                                                 float* acc) const {
    const Buffer<float> panel(K_block * kSplitTile);
    pack_columns<kProductVectors>(right + k * right_stride, N, right_stride, K_block, n, panel.get());
    left.multiply(m, rows, k, K_block, panel.get(), acc);
  }
};

// How a team cuts c: in `rows` times `columns` shares.
struct SplitGrid {
  int rows, columns;
};

// A member splits its share of both operands for itself: that costs about as much as one more row and one more column of
// tiles.
inline SplitGrid split_grid(int64_t row_tiles, int64_t column_tiles, int threads) {
  SplitGrid best{1, 1};
  int64_t least = -1;
  for (int columns = 1; columns <= threads && columns <= column_tiles; ++columns) {
    const int rows = static_cast<int>(smallest(threads / columns, row_tiles));
    const int64_t cost = (divide_up(row_tiles, rows) + 1) * (divide_up(column_tiles, columns) + 1);
    if (least < 0 || cost < least) least = cost, best = {rows, columns};
  }
  return best;
}

template <class Left>
void run_split_product(const SplitProduct<Left>& p, int threads) {
  if (p.M * p.N * p.K < kProductTeamWork) threads = 1;
  const int64_t row_tiles = divide_up(p.M, kSplitTile), column_tiles = divide_up(p.N, kSplitTile);
  if (row_tiles == 0 || column_tiles == 0) return;
  const SplitGrid grid = split_grid(row_tiles, column_tiles, threads);
  on_team(threads, grid.rows * grid.columns, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      p.run(share_of(row_tiles, static_cast<int>(i / grid.columns), grid.rows),
            share_of(column_tiles, static_cast<int>(i % grid.columns), grid.columns));
  });
}

}  // namespace FRNN_ISA
}  // namespace frnn
