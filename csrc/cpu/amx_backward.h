// The backward scan of backward.h on AMX: of float in parts (amx_split.h), or of bfloat16 as it is stored. Without a
// projection.
#pragma once

#include "amx_columns.h"
#include "backward.h"
#include "forward.h"

namespace frnn {
inline namespace FRNN_ISA {

// A row into the tiles of TileBackwardScan: of float in parts, of bfloat16 as it is.
template <int kParts>
FRNN_HD void lay_row(const float* a, int64_t K, float scale, BFloat16* to) {
  split_row(a, K, kParts, scale, to);
}
template <int kParts>
FRNN_HD void lay_row(const BFloat16* a, int64_t K, float, BFloat16* to) {
  for (int64_t k = 0; k < K; k += kAmxDepth, to += 2 * kAmxTile)
    _mm512_store_si512(to, K - k >= kAmxDepth ? _mm512_loadu_si512(a + k)
                                              : _mm512_maskz_loadu_epi16((1u << (K - k)) - 1, a + k));
}

// acc[row][2 vectors], or, with `add`, added to it.
template <int kParts, bool kTwo>
void tile_product(const BFloat16* a, const BFloat16* w, int64_t blocks, float* acc, bool add) {
  constexpr int64_t kStride = 2 * 64, kSums = (kTwo ? 2 : 1) * kAmxRows * 2 * 16;
  if (kParts == 1 || !add) return split_lanes<kTwo, true>(a, blocks, w, kParts, acc, kStride, add, NoPause());
  // Of float, sums of parts of k are added up apart: one running sum over all of it would lose accuracy.
  alignas(64) float apart[kSums];
  split_lanes<kTwo, true>(a, blocks, w, kParts, apart, kStride, false, NoPause());
  for (int i = 0; i < kSums; i += 16) store(acc + i, load(acc + i) + load(apart + i));
}

// The recurrent weights [kGates * H, Hr] in panels of 32 columns, the K of every gate filled up to whole tiles:
// [gate][k / 32][part][vector][16 pairs][16][2].
template <class S, int kGates, int kParts>
class TileColumns {
 public:
  static constexpr int kUnits = 32;

  TileColumns(const S* weights, int64_t H, int64_t Hr)
      : weights_(weights), H_(H), Hr_(Hr), panels_(panels() * panel_size()), splits_(panels()) {}

  int64_t panels() const { return divide_up(Hr_, kUnits); }
  int64_t blocks_of_gate() const { return divide_up(H_, kAmxDepth); }
  static int64_t block_size() { return kParts * 2 * kAmxTile; }

  void pack(int64_t panel) const {
    bool splits = true;
    for (int g = 0; g < kGates; ++g) {
      const S* from = weights_ + g * H_ * Hr_ + panel * kUnits;
      BFloat16* to = packed(panel) + g * blocks_of_gate() * block_size();
      if constexpr (kParts > 1)
        splits &= split_columns<2>(from, Hr_, H_, Hr_ - panel * kUnits, kParts, 1.0f, to).splits();
      else
        pair_columns<2>(from, Hr_, H_, Hr_ - panel * kUnits, to);
    }
    splits_.get()[panel] = splits;
  }
  BFloat16* packed(int64_t panel) const { return panels_.get() + panel * panel_size(); }
  bool splits(int64_t panel) const { return splits_.get()[panel]; }

 private:
  int64_t panel_size() const { return kGates * blocks_of_gate() * block_size(); }

  const S* weights_;
  int64_t H_, Hr_;
  Buffer<BFloat16> panels_;
  Buffer<bool> splits_;  // of a panel
};

template <class Cell, class S, int kParts>
class TileBackwardScan {
  using Units = BackwardUnits<Cell, S>;
  using V = Vec<float>;
  static constexpr int kGates = Cell::kGates, kVectors = Units::kVectors, kUnits = Units::kUnits;
  static constexpr int kTileRows = 2 * kAmxRows;
  static constexpr bool kSplit = kParts > 1;
  static_assert(kUnits == 32, "two tiles of units");

  // Blocks of k that are summed up together, and the panels that take them in turn. Measured on two cores of a Sapphire
  // Rapids: products of parts wait little for L2, those of bfloat16 as it is do: rows and weights of 16 KB stay in L1.
  static constexpr int kDepthBlocks = kSplit ? 16 : 8, kPanels = kSplit ? 1 : 4;
  // Rows that pass a panel's weights together, as long as what they hold stays in L2 beside those.
  static constexpr int kMostTiles = 4;
  static constexpr int64_t kMostBytes = 512 << 10;

  // Rows between asking for what finish_unit reads and its turn: two are enough, measured there too, and without them
  // an LSTM's scan in bfloat16 takes 1.4 times as long.
  static constexpr int kAhead = 2;

  struct Tile {
    int64_t b0;
    int rows, summed;  // the first so many have a product
    bool splits;
    const S* a[kTileRows];
    BFloat16* parts;  // [k / 32][part][32 rows][32]
    float inverse[kTileRows];
  };

 public:
  TileBackwardScan(const Shape& shape, const BackwardDirection<S>& d, const CpuPlan& plan)
      : shape_(shape), d_(d), plan_(plan), units_(shape, d), scan_{shape, d.reverse}, H_(shape.H),
        weights_(d.w_hh, H_, H_), plain_(plain_weights(d), kGates * H_, H_, true),
        zeros_(d.reset ? kGates * H_ : 0) {
    if (d.reset) memset(zeros_.get(), 0, kGates * H_ * sizeof(S));
  }

  void run(const Member& member, Barrier* everybody) {
    const AmxSession session;
    const Range panels = share_of(weights_.panels(), member.unit_group, plan_.unit_groups);
    const Tiles tiles = tiles_of(shape_, kTileRows, member, plan_);
    pack_share(weights_, panels, member, plan_);
    if constexpr (kSplit) pack_share(plain_, panels, member, plan_);
    if (plan_.row_groups > 1) everybody->wait(plan_.threads());

    const int64_t size = blocks() * weights_.block_size();
    const int most = static_cast<int>(smallest(1 + kMostBytes / 2 / size, kMostTiles));
    const Buffer<BFloat16> parts(most * size);
    const Buffer<float> sums((panels.last - panels.first) * most * kTileRows * kUnits);
    Tile block[kMostTiles];
    for (int i = 0; i < most; ++i) block[i].parts = parts.get() + i * size;

    for (int64_t s = shape_.T - 1; s >= 0; --s) {
      int count = 0;
      const auto finish_block = [&] {
        finish_tiles<true>(panels, s, block, count, sums.get());
        count = 0;
      };
      tiles.each(scan_.rows(s), [&](int64_t b0, int rows) {
        Tile& tile = block[count++];
        const auto later = static_cast<int>(scan_.continuing(s) - b0);
        tile.b0 = b0, tile.rows = rows, tile.summed = later < 0 ? 0 : later < rows ? later : rows;
        for (int r = 0; r < tile.summed; ++r)
          tile.a[r] = units_.flowing_back(scan_.offset(s + 1) + b0 + r, zeros_.get());
        lay_rows(tile);
        if (count == most) finish_block();
      });
      if (count > 0) finish_block();
      member.barrier->wait(plan_.unit_groups);  // step s - 1 reads the dgates of every unit
    }
    if (d_.dh0)
      tiles.each(shape_.B, [&](int64_t b0, int rows) {
        Tile& tile = block[0];
        tile.b0 = b0, tile.rows = tile.summed = rows;
        for (int r = 0; r < rows; ++r) tile.a[r] = units_.flowing_back(scan_.first_row(b0 + r), zeros_.get());
        lay_rows(tile);
        finish_tiles<false>(panels, -1, block, 1, sums.get());
      });
  }

 private:
  static const float* plain_weights([[maybe_unused]] const BackwardDirection<S>& d) {
    if constexpr (kSplit)
      return d.w_hh;
    else
      return nullptr;
  }
  int64_t blocks() const { return kGates * weights_.blocks_of_gate(); }

  // Each member lays out all of its rows: with few members that is less than another barrier.
  void lay_rows(Tile& tile) const {
    tile.splits = true;
    for (int r = 0; r < tile.summed; ++r) {
      float scale = 1;
      if constexpr (kSplit) {
        // Gradients fade from step to step, and tiles take denormal parts as zero.
        const Magnitude magnitude = magnitude_of(tile.a[r], kGates * H_);
        tile.splits &= magnitude.finite();
        scale = power_of_two(-magnitude.exponent()), tile.inverse[r] = power_of_two(magnitude.exponent());
      }
      for (int g = 0; g < kGates; ++g)
        lay_row<kParts>(tile.a[r] + g * H_, H_, scale,
                        tile.parts + g * weights_.blocks_of_gate() * weights_.block_size() + r * kAmxDepth);
    }
  }

  // All these panels of step s, or, unless kStep, of the state before the first. sums: [panel][tile][row][unit].
  template <bool kStep>
  void finish_tiles(Range panels, int64_t s, const Tile* tiles, int count, float* sums) const {
    const Range groups{0, divide_up(panels.last - panels.first, kPanels)};
    const auto sums_of = [&](int64_t panel, int i) {
      return sums + ((panel - panels.first) * count + i) * kTileRows * kUnits;
    };
    each_panel(groups, s, [&](int64_t group) {
      const int64_t first = panels.first + group * kPanels, last = smallest(first + kPanels, panels.last);
      for (int64_t k = 0; k < blocks(); k += kDepthBlocks)
        for (int64_t panel = first; panel < last; ++panel)
          for (int i = 0; i < count; ++i)
            if (has_tile_product(tiles[i], panel)) multiply(tiles[i], panel, k, sums_of(panel, i));
    });
    // Row after row, not panel after panel: as it lies in memory, which the hardware sees coming.
    for (int i = 0; i < count; ++i) {
      if constexpr (kSplit)
        multiply_plain(panels, tiles[i], [&](int64_t panel) { return sums_of(panel, i); });
      for (int r = 0; r < tiles[i].rows; ++r)
        for (int64_t panel = panels.first; panel < panels.last; ++panel) {
          if (kStep && r + kAhead < tiles[i].rows) {
            const int64_t ahead = tiles[i].b0 + r + kAhead;
            units_.fetch_units(s, panel * kUnits, ahead, ahead + 1);
          }
          finish_row<kStep>(tiles[i], s, panel, r, sums_of(panel, i) + r * kUnits);
        }
    }
  }

  bool has_tile_product(const Tile& tile, int64_t panel) const {
    return tile.summed > 0 && tile.splits && weights_.splits(panel);
  }

  void multiply(const Tile& tile, int64_t panel, int64_t k, float* acc) const {
    const BFloat16 *a = tile.parts + k * weights_.block_size(),
                   *w = weights_.packed(panel) + k * weights_.block_size();
    const int64_t depth = smallest(blocks() - k, kDepthBlocks);
    AmxShapes::use(tile.summed);
    if (tile.summed > kAmxRows)
      tile_product<kParts, true>(a, w, depth, acc, k > 0);
    else
      tile_product<kParts, false>(a, w, depth, acc, k > 0);
  }

  template <class SumsOf>
  void multiply_plain(Range panels, const Tile& tile, SumsOf&& sums_of) const {
    constexpr int kRows = tile_rows(kVectors);
    for (int64_t panel = panels.first; panel < panels.last; ++panel)
      if (!has_tile_product(tile, panel))
        for (int r = 0; r < tile.summed; r += kRows)
          plain_.multiply(tile.a + r, static_cast<int>(smallest(tile.summed - r, kRows)), panel,
                          sums_of(panel) + r * kUnits);
  }

  template <bool kStep>
  FRNN_HD void finish_row(const Tile& tile, int64_t s, int64_t panel, int r, float* acc) const {
    const bool summed = r < tile.summed;
    if (!summed) memset(acc, 0, kUnits * sizeof *acc);
    const V inverse(kSplit && summed && has_tile_product(tile, panel) ? tile.inverse[r] : 1.0f);
    units_.each_vector(panel, H_, 1, acc, [&](int, int64_t u, auto n, V dh) {
      if constexpr (kSplit) dh = dh * inverse;
      if constexpr (kStep)
        units_.finish_state(s, tile.b0 + r, u, n, dh);
      else
        units_.finish_initial_state(tile.b0 + r, u, n, dh);
    });
  }

  const Shape& shape_;
  const BackwardDirection<S>& d_;
  const CpuPlan& plan_;
  const Units units_;
  const Scan scan_;
  const int64_t H_;
  const TileColumns<S, kGates, kParts> weights_;
  const ColumnWeights<float, kVectors> plain_;  // for numbers that have no parts
  // [kGates * H], stands for the dgates of a step that starts anew; empty without a mask
  const Buffer<S> zeros_;
};

// Of the scan above.
template <int kParts>
CpuProblem tile_backward_problem(CellKind kind, const Shape& shape, int threads) {
  CpuProblem p = with_cell(
      kind, [&](auto cell) { return problem_of<float>(shape, decltype(cell)::kGates, 2, threads); });
  p.I = 0;
  p.tile_rows = 2 * kAmxRows;
  p.itemsize = kParts * sizeof(BFloat16);
  return p;
}

}  // namespace FRNN_ISA
}  // namespace frnn
