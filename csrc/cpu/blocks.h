// What a scan forward multiplies ahead of its steps, for it needs no state of theirs: a block of rows at a time, many
// short steps together or a part of a tall one. Its weights and the recurrent ones seldom fit L2 together; so they are
// read once a block, not once a step, and the sums wait in L2.
#pragma once

#include "weights.h"

namespace frnn {
inline namespace FRNN_ISA {

// Rows that are multiplied together; a step that is taller is cut into blocks of about as many. Weights that come from L3
// at 28 GB/s (measured on Sapphire Rapids) take as long as the products of 64 rows in tiles.
constexpr int kRowsAhead = 128;

// Of tiles of the recurrent product, at most kTileRows high. Operand: what that product takes of a tile's rows.
template <int kTileRows, class Operand>
struct Block {
  static constexpr int kMostRows = kRowsAhead + kTileRows;
  // Tiles are cut into nearly equal heights: none is less than half as high as it may be, but for the last of a step.
  static constexpr int kMostTiles = kMostRows / divide_up(kTileRows, 2) + 2;

  struct Tile {
    int64_t s, b0;
    int rows, first;  // first: its place in the block
    bool ends_step;
    Operand h;
  };
  int rows, tiles;
  Tile tile[kMostRows];
  int64_t row[kMostRows];  // of the packed buffers
};

// The blocks of a member's tiles in the order of the scan.
template <class Block>
class Blocks {
 public:
  Blocks(const Scan& scan, const Tiles& tiles) : scan_(scan), tiles_(tiles), s_(0), turn_(0) {}

  // Fills the next one: whole steps, as many as it holds, or else a part of one. False: none is left.
  bool next(Block& block) {
    block.rows = block.tiles = 0;
    for (; s_ < scan_.shape.T; ++s_, turn_ = 0) {
      const int64_t rows_now = scan_.rows(s_);
      if (turn_ == 0) count_step(rows_now);
      const int64_t rows = step_rows_, count = step_tiles_;
      if (block.tiles > 0 && block.rows + rows > kRowsAhead) return true;
      const int64_t most = rows > kRowsAhead ? divide_up(count, divide_up(rows, kRowsAhead)) : count;
      for (; tiles_.tile(turn_) < tiles_.count; ++turn_) {
        const Range r = tiles_.rows(tiles_.tile(turn_), rows_now);
        if (r.first >= r.last) break;
        const bool full = block.tiles == most || block.rows + r.last - r.first > Block::kMostRows;
        if (block.tiles > 0 && rows > kRowsAhead && full) return true;
        add_tile(block, r);
      }
      if (count > 0) block.tile[block.tiles - 1].ends_step = true;
      if (rows > kRowsAhead) {
        ++s_, turn_ = 0;
        return true;
      }
    }
    return block.tiles > 0;
  }

 private:
  void add_tile(Block& block, Range r) const {
    typename Block::Tile& tile = block.tile[block.tiles++];
    tile.s = s_, tile.b0 = r.first, tile.rows = static_cast<int>(r.last - r.first);
    tile.first = block.rows, tile.ends_step = false;
    for (int64_t b = r.first; b < r.last; ++b) block.row[block.rows++] = scan_.offset(s_) + b;
  }

  // A step's, not a block's: there are as many blocks as the step has rows, if it is tall.
  void count_step(int64_t rows_now) {
    step_rows_ = step_tiles_ = 0;
    tiles_.each(rows_now, [&](int64_t, int height) { step_rows_ += height, ++step_tiles_; });
  }

  const Scan& scan_;
  const Tiles& tiles_;
  int64_t s_, turn_;
  int64_t step_rows_ = 0, step_tiles_ = 0;
};

// The sums of a block: [panel][row of the block][gate][unit of the panel], of a member's panels.
template <class T, int kRow>
struct BlockSums {
  T* memory;
  int64_t first_panel, rows;
  T* at(int64_t panel, int64_t row) const { return memory + ((panel - first_panel) * rows + row) * kRow; }
};

// How the rows of a block are multiplied: in pieces of Products' own height.
template <class Products, int kLanes, int kMostRows>
struct BlockProduct {
  static constexpr int kPieceRows = Products::tile_rows(kLanes);
  static constexpr int kMostPieces = kMostRows / divide_up(kPieceRows, 2) + 2;

  // Numbers of the memory that `multiply` needs for rows of length K.
  static int64_t parts_size(const Products& products, int64_t K) {
    return kMostPieces * products.operand_size(K);
  }

  // sums[panel][row] = rows weights, or, with `add`, are added to.
  template <class Weights, class S, class Sums>
  static void multiply(const Products& products, const Weights& weights, const S* const* rows, int count,
                       int64_t K, Range panels, typename Products::Part* parts, const Sums& sums, bool add) {
    struct Piece {
      int64_t first;
      int rows;
      typename Products::Operand operand;
    } piece[kMostPieces];
    int pieces = 0;
    Tiles(count, kPieceRows, 0, 1).each(count, [&](int64_t first, int height) {
      piece[pieces++] = {first, height, products.operand(parts, rows + first, height, K)};
      parts += products.operand_size(K);
    });
    for (int64_t panel = panels.first; panel < panels.last; ++panel)
      for (int i = 0; i < pieces; ++i)
        weights.multiply(piece[i].operand, piece[i].rows, panel, sums.at(panel, piece[i].first), add);
  }
};

}  // namespace FRNN_ISA
}  // namespace frnn
