// The tile registers of AMX as an array of each thread, and their instructions as Intel documents them: what
// csrc/cpu/amx.h is compiled with where FRNN_AMX_EMULATION is defined.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <atomic>

namespace frnn {

class EmulatedTiles {
 public:
  static constexpr int kTiles = 8, kRows = 16, kRowBytes = 64, kPairs = 16;

  // Threads that have tiles in use.
  static std::atomic<int>& users() {
    static std::atomic<int> count{0};
    return count;
  }

  void configure(const void* shapes) {
    uint8_t bytes[64];
    memcpy(bytes, shapes, sizeof bytes);
    require(bytes[0] == 1 && bytes[1] == 0, "ldtilecfg: palette 1, from its first row on");
    for (int i = 2; i < 64; ++i)
      require((i >= 16 && i < 32) || (i >= 48 && i < 56) || bytes[i] == 0,
              "ldtilecfg: reserved bytes are zero");
    for (int tile = 0; tile < kTiles; ++tile) {
      uint16_t row_bytes;
      memcpy(&row_bytes, bytes + 16 + 2 * tile, sizeof row_bytes);
      const int rows = bytes[48 + tile];
      require(rows <= kRows && row_bytes <= kRowBytes, "ldtilecfg: 16 rows of 64 bytes at most");
      require((rows == 0) == (row_bytes == 0), "ldtilecfg: rows without bytes, or bytes without rows");
      rows_[tile] = rows;
      row_bytes_[tile] = row_bytes;
    }
    if (!configured_) ++users();
    configured_ = true;
    memset(data_, 0, sizeof data_);
  }
  void release() {
    if (configured_) --users();
    configured_ = false;
  }
  void zero(int tile) {
    check(tile);
    memset(data_[tile], 0, sizeof data_[tile]);
  }
  void load(int tile, const void* from, int64_t stride) {
    zero(tile);
    for (int r = 0; r < rows_[tile]; ++r)
      memcpy(data_[tile][r], static_cast<const char*>(from) + r * stride, row_bytes_[tile]);
  }
  void store(int tile, void* to, int64_t stride) const {
    check(tile);
    for (int r = 0; r < rows_[tile]; ++r)
      memcpy(static_cast<char*>(to) + r * stride, data_[tile][r], row_bytes_[tile]);
  }
  // Sums of the even and of the odd numbers of the pairs, then the sum of both, then the tile's: each rounded to
  // nearest, denormals zero before and after.
  void add_product(int sum, int a, int b) {
    check(sum), check(a), check(b);
    require(sum != a && sum != b && a != b, "tdpbf16ps: three tiles");
    require(row_bytes_[sum] % 4 == 0 && row_bytes_[a] % 4 == 0 && row_bytes_[b] % 4 == 0,
            "tdpbf16ps: rows of whole pairs");
    require(rows_[sum] == rows_[a] && row_bytes_[a] / 4 == rows_[b] && row_bytes_[sum] == row_bytes_[b],
            "tdpbf16ps: [M, K] times [K, N]");
    float right[kRows][kPairs][2];
    for (int k = 0; k < kRows; ++k)
      for (int n = 0; n < kPairs; ++n)
        for (int half = 0; half < 2; ++half) right[k][n][half] = number(b, k, 2 * n + half);
    for (int m = 0; m < rows_[sum]; ++m) {
      float parts[kPairs][2] = {};
      for (int k = 0; k < row_bytes_[a] / 4; ++k) {
        const float left[2] = {number(a, m, 2 * k), number(a, m, 2 * k + 1)};
        for (int n = 0; n < kPairs; ++n)
          for (int half = 0; half < 2; ++half)
            parts[n][half] = flushed(fmaf(left[half], right[k][n][half], parts[n][half]));
      }
      for (int n = 0; n < row_bytes_[sum] / 4; ++n) {
        float old;
        memcpy(&old, data_[sum][m] + 4 * n, sizeof old);
        const float now = flushed(flushed(old) + flushed(parts[n][0] + parts[n][1]));
        memcpy(data_[sum][m] + 4 * n, &now, sizeof now);
      }
    }
    for (int m = rows_[sum]; m < kRows; ++m) memset(data_[sum][m], 0, kRowBytes);
  }

 private:
  static void require(bool holds, const char* what) {
    if (holds) return;
    fprintf(stderr, "emulated AMX refuses: %s\n", what);
    abort();
  }
  void check(int tile) const {
    require(configured_, "no tiles are configured");
    require(rows_[tile] > 0, "a tile of no rows");
  }
  static float flushed(float x) { return fabsf(x) < 1.17549435e-38f ? copysignf(0.0f, x) : x; }
  float number(int tile, int row, int i) const {
    uint16_t upper;
    memcpy(&upper, data_[tile][row] + 2 * i, sizeof upper);
    const uint32_t bits = static_cast<uint32_t>(upper) << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return flushed(x);
  }

  bool configured_ = false;
  int rows_[kTiles] = {}, row_bytes_[kTiles] = {};
  char data_[kTiles][kRows][kRowBytes] = {};
};

inline EmulatedTiles& emulated_tiles() {
  static thread_local EmulatedTiles tiles;
  return tiles;
}

}  // namespace frnn
