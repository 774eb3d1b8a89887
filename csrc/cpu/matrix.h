// The matrix products around the backward scan, on its micro-kernel: gradients of weights, sums over the rows of all
// steps, and the gradient of the input. Both run on a team of threads, each with a share of the result.
#pragma once

#include "weights.h"

namespace frnn {
inline namespace FRNN_ISA {

// A team's share of a loop over `count` pieces, run by f(first, last) on each of up to `threads` threads. There may be
// none: a matrix without columns.
template <class F>
void on_team(int threads, int64_t count, F&& f) {
  if (count < 1) return;
  struct Work {
    F& f;
    int64_t count;
    int threads;
    static void run(void* context, int rank) {
      const FlushDenormals flush;
      auto& self = *static_cast<Work*>(context);
      const Range share = share_of(self.count, rank, self.threads);
      if (share.first < share.last) self.f(share.first, share.last);
    }
  };
  for (threads = available_threads(static_cast<int>(smallest(threads, count)));; threads = 1) {
    Work work{f, count, threads};
    if (run_team(threads, &Work::run, &work)) return;
  }
}

// As kTeamWork in plan.cpp: below so many multiply-adds a call stays on its own thread.
constexpr int64_t kProductTeamWork = 1 << 18;

constexpr int kProductVectors = 2;

// Blocks of the sum over rows. A block of b, [kBlockRows, kBlockColumns], fills half of a core's L2, a block of a,
// [kBlockRows, kBlockUnits], a part of the rest; one panel of the first stays in L1 while the second passes.
constexpr int64_t kBlockRows = 256, kBlockUnits = 64, kBlockColumns = 512;

// [rows, count] with a row stride -> [rows][kBlockUnits]: what a tile reads of it lies together.
template <class T>
void copy_block(const T* from, int64_t stride, int64_t rows, int64_t count, T* to) {
  constexpr int kSize = Vec<T>::kSize;
  for (int64_t k = 0; k < rows; ++k)
    for (int64_t m = 0; m < count; m += kSize)
      with_count<kSize>(count - m,
                        [&](auto n) { store(to + k * kBlockUnits + m, load(from + k * stride + m, n)); });
}

// Where the result of a tile goes: c[m * m_stride + n * n_stride].
template <class T>
struct Result {
  T* c;
  int64_t m_stride, n_stride;

  // Asks for a tile that will be added to: its rows lie too far apart for the hardware to see them coming.
  FRNN_HD void fetch(int64_t m, int rows, int64_t n) const {
    if (n_stride == 1)
      for (int r = 0; r < rows; ++r) frnn::fetch<kProductVectors>(c + (m + r) * m_stride + n);
  }
  FRNN_HD void put(int64_t m, int64_t n, Vec<T> sum, int count, bool add) const {
    T* to = c + m * m_stride + n * n_stride;
    if (n_stride == 1) return store(to, add ? load(to, count) + sum : sum, count);
    for (int k = 0; k < count; ++k) to[k * n_stride] = sum.v[k] + (add ? to[k * n_stride] : T(0));
  }
};

// One tile's product, from column n of the result on: the rows `row[0 .. rows)` times a panel.
template <class T, class Multiply>
FRNN_HD void finish_tile(const Result<T>& result, int64_t m, int rows, int64_t n, int64_t N, bool add,
                         Multiply&& multiply) {
  constexpr int kSize = Vec<T>::kSize, kPanel = kProductVectors * kSize;
  alignas(64) T acc[kMaxTileRows * kProductVectors * kSize];
  multiply(acc);
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < kProductVectors; ++v) {
      const int count = static_cast<int>(smallest(N - n - v * kSize, kSize));
      if (count > 0) result.put(m + r, n + v * kSize, load(acc + r * kPanel + v * kSize), count, add);
    }
}

// The columns [m0, m1) of a against all of b.
template <class T>
void sum_over_rows_of(const SumOverRows<T>& p, const Result<T>& result, int64_t m0, int64_t m1) {
  constexpr int kSize = Vec<T>::kSize, kPanel = kProductVectors * kSize,
                kTileRows = tile_rows(kProductVectors);
  const Buffer<T> b_block(kBlockRows * divide_up(smallest(p.N, kBlockColumns), kPanel) * kPanel);
  const Buffer<T> a_block(kBlockRows * kBlockUnits);
  for (int64_t n0 = 0; n0 < p.N; n0 += kBlockColumns)
    for (int64_t k0 = 0; k0 < p.rows; k0 += kBlockRows) {
      const int64_t n1 = smallest(n0 + kBlockColumns, p.N), K = smallest(p.rows - k0, kBlockRows);
      for (int64_t n = n0; n < n1; n += kPanel)
        pack_columns<kProductVectors>(p.b + k0 * p.b_stride, p.N, p.b_stride, K, n,
                                      b_block.get() + (n - n0) * K);
      for (int64_t m = m0; m < m1; m += kBlockUnits) {
        const int64_t units = smallest(m1 - m, kBlockUnits);
        copy_block(p.a + k0 * p.a_stride + m, p.a_stride, K, units, a_block.get());
        const Tiles tiles(units, kTileRows, 0, 1);
        for (int64_t n = n0; n < n1; n += kPanel)
          tiles.each(units, [&](int64_t first, int rows) {
            const bool add = p.add || k0 > 0;
            if (add) result.fetch(m + first, rows, n);
            finish_tile<T>(result, m + first, rows, n, p.N, add, [&](T* acc) {
              packed_product_of_columns<kBlockUnits, kProductVectors, kRowSum>(
                  a_block.get() + first, rows, K, b_block.get() + (n - n0) * K, kPanel, acc);
            });
          });
      }
    }
}

template <class T>
void sum_over_rows(const SumOverRows<T>& p) {
  // Vectors lie along b's columns: were those few, they would be mostly empty, and a's take their place.
  const bool swap = p.N < kProductVectors * Vec<T>::kSize && p.N < p.M;
  SumOverRows<T> q = p;
  if (swap) {
    q.M = p.N, q.a = p.b, q.a_stride = p.b_stride;
    q.N = p.M, q.b = p.a, q.b_stride = p.a_stride;
  }
  const Result<T> result{p.c, swap ? 1 : p.N, swap ? p.N : 1};
  // Few columns are shared out by the rows of the result, few rows by its columns.
  constexpr int64_t kPanel = kProductVectors * Vec<T>::kSize;
  const int threads = p.rows * p.M * p.N < kProductTeamWork ? 1 : p.threads;
  if (q.M >= 8 * threads) {
    on_team(threads, divide_up(q.M, 8), [&](int64_t first, int64_t last) {
      sum_over_rows_of(q, result, first * 8, smallest(last * 8, q.M));
    });
  } else {
    on_team(threads, divide_up(q.N, kPanel), [&](int64_t first, int64_t last) {
      SumOverRows<T> part = q;
      part.b += first * kPanel;
      part.N = smallest(last * kPanel, q.N) - first * kPanel;
      sum_over_rows_of(part, {result.c + first * kPanel * result.n_stride, result.m_stride, result.n_stride},
                       0, q.M);
    });
  }
}

// Rows of a that pass all panels of w together: what they hold stays in L2.
constexpr int64_t kRowBlock = 32;

template <class T>
void multiply(const RowsTimesMatrix<T>& p) {
  constexpr int kTileRows = tile_rows(kProductVectors);
  const ColumnWeights<T, kProductVectors> weights(p.w, p.K, p.N, p.rows <= 2 * kTileRows);
  const int threads = p.rows * p.K * p.N < kProductTeamWork ? 1 : p.threads;
  on_team(threads, weights.panels(), [&](int64_t first, int64_t last) {
    for (int64_t panel = first; panel < last; ++panel) weights.pack(panel);
  });
  on_team(threads, divide_up(p.rows, kTileRows), [&](int64_t first_tile, int64_t last_tile) {
    const int64_t end = smallest(last_tile * kTileRows, p.rows);
    for (int64_t b0 = first_tile * kTileRows; b0 < end; b0 += kRowBlock) {
      const int64_t block = smallest(kRowBlock, end - b0);
      const Tiles tiles(block, kTileRows, 0, 1);
      for (int64_t panel = 0; panel < weights.panels(); ++panel)
        tiles.each(block, [&](int64_t first, int rows) {
          const T* row[kMaxTileRows];
          for (int r = 0; r < rows; ++r) row[r] = p.a + (b0 + first + r) * p.a_stride;
          finish_tile<T>({p.c, p.N, 1}, b0 + first, rows, panel * weights.kUnits, p.N, p.add,
                         [&](T* acc) { weights.multiply(row, rows, panel, acc); });
        });
    }
  });
}

}  // namespace FRNN_ISA
}  // namespace frnn
