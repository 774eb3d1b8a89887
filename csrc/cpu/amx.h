// Intel AMX: eight tile registers of up to 16 rows of 64 bytes (palette 1), one function an instruction. Written in
// assembly, for gcc's own macros take no template's number and let the stores of a configuration be dropped. Tiles are
// the thread's, and no compiler keeps anything in them.
//
// With FRNN_AMX_EMULATION the same functions are plain C++ (tests/amx), for machines without AMX.
#pragma once

#include <stdint.h>

#include "../cells/math.h"

#ifdef FRNN_AMX_EMULATION
#include <emulated_tiles.h>
#endif

namespace frnn {
inline namespace FRNN_ISA {

// The operand of LDTILECFG.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};  // of tiles 0 to 7; the rest is zero
  uint8_t rows[16] = {};        // likewise

  void set(int tile, int tile_rows, int bytes) {
    rows[tile] = static_cast<uint8_t>(tile_rows);
    row_bytes[tile] = static_cast<uint16_t>(bytes);
  }
};
static_assert(sizeof(TileShapes) == 64, "the instruction reads 64 bytes");

#ifdef FRNN_AMX_EMULATION

inline void shape_tiles(const TileShapes& shapes) { emulated_tiles().configure(&shapes); }
inline void release_tiles() { emulated_tiles().release(); }
template <int kTile>
void zero_tile() {
  emulated_tiles().zero(kTile);
}
template <int kTile>
void load_tile(const void* rows, int64_t stride) {
  emulated_tiles().load(kTile, rows, stride);
}
template <int kTile>
void store_tile(void* rows, int64_t stride) {
  emulated_tiles().store(kTile, rows, stride);
}
template <int kSum, int kA, int kB>
void add_tile_product() {
  emulated_tiles().add_product(kSum, kA, kB);
}

#else

// Every tile becomes zero.
FRNN_HD void shape_tiles(const TileShapes& shapes) { asm volatile("ldtilecfg %0" ::"m"(shapes)); }
FRNN_HD void release_tiles() { asm volatile("tilerelease"); }
template <int kTile>
FRNN_HD void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
// Rows that are `stride` bytes apart.
template <int kTile>
FRNN_HD void load_tile(const void* rows, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(rows), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
FRNN_HD void store_tile(void* rows, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(rows), "r"(stride), "i"(kTile) : "memory");
}
// sum[m][n] += the products of pairs, over all pairs k, of a[m][k] and b[k][n]. Of bfloat16, summed in float.
template <int kSum, int kA, int kB>
FRNN_HD void add_tile_product() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
}

#endif

// The sums of a tile begin with what lies there, or with zero.
template <int kTile>
FRNN_HD void begin_sums(const void* rows, int64_t stride, bool add) {
  if (add)
    load_tile<kTile>(rows, stride);
  else
    zero_tile<kTile>();
}

constexpr int kAmxRows = 16, kAmxDepth = 32;

// Tiles 0 to 3 are sums, 4 and 5 rows, the others weights. With more than 16 rows the sums are two times two, so that
// every tile that is loaded takes part in two products: a product takes 16 cycles, a load 8 from L1 and twice that from
// L2. With up to 16 rows they are one row of up to four, and tile 5 is of weights too.
class AmxShapes {
 public:
  // Every shape change clears the tiles, and most calls have as many rows as the one before.
  static void use(int rows) {
    int& current = rows_in_use();
    if (current == rows) return;
    current = rows;
    const bool two = rows > kAmxRows;
    TileShapes shapes;
    for (int tile = 0; tile < 8; ++tile) {
      const bool weights = tile >= (two ? 6 : 5), lower = tile == 2 || tile == 3 || tile == 5;
      shapes.set(tile, weights ? kAmxDepth / 2 : !two ? rows : lower ? rows - kAmxRows : kAmxRows, 64);
    }
    shape_tiles(shapes);
  }
  static void release() {
    if (rows_in_use() == 0) return;
    rows_in_use() = 0;
    release_tiles();
  }

 private:
  static int& rows_in_use() {
    static thread_local int rows = 0;
    return rows;
  }
};

// What a thread that multiplies with tiles holds. Until it gives them back, the system saves them with the thread.
struct AmxSession {
  ~AmxSession() { AmxShapes::release(); }
};

}  // namespace FRNN_ISA
}  // namespace frnn
