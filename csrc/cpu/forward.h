// The forward scan of one layer on the CPU: all steps, both directions, one call. The input is multiplied in blocks of
// rows, ahead of their steps.
#pragma once

#include "../cells/cells.h"
#include "blocks.h"

namespace frnn {
inline namespace FRNN_ISA {

// Vectors of units in one panel: enough independent sums to hide the latency of a multiply-add.
template <class Cell>
constexpr int panel_vectors() {
  return Cell::kGates == 1 ? 2 : 1;
}

// Of a scan whose operands are stored as S.
template <class S>
CpuProblem problem_of(const Shape& s, int gates, int vectors, int threads) {
  CpuProblem p;
  p.T = s.T, p.B = s.B, p.I = s.I, p.H = s.H, p.P = s.P, p.D = s.D;
  p.gates = gates;
  p.threads = threads;
  p.units_per_panel = vectors * Vec<Accumulate<S>>::kSize;
  p.tile_rows = PackedProduct<S>::tile_rows(gates * vectors);
  p.itemsize = sizeof(S);
  p.in_lanes = false;
  return p;
}

// S: what weights, inputs and the hidden state are stored as. Sums, the cell state and the cell itself are of T.
// Input, Recurrent: how x and h are multiplied (PlainProducts in weights.h).
template <class Cell, class S, class Input = PlainProducts<S>, class Recurrent = PlainProducts<S>>
class ForwardDirectionScan {
  using T = Accumulate<S>;
  static constexpr int kGates = Cell::kGates, kVectors = panel_vectors<Cell>();
  static constexpr int kSize = Vec<T>::kSize, kUnits = kVectors * kSize, kRow = kGates * kUnits;
  static constexpr int kTileRows = Recurrent::tile_rows(kGates * kVectors);
  static constexpr int kProjVectors = 2;
  // Whether a gate adds up its two sides: then their products need not be told apart.
  static constexpr bool kOneSum = Cell::kGateGrads == kGates;
  using V = Vec<T>;

  using Block = frnn::Block<kTileRows, typename Recurrent::Operand>;
  using Tile = typename Block::Tile;
  using Sums = BlockSums<T, kRow>;
  using InputProduct = BlockProduct<Input, kGates * kVectors, Block::kMostRows>;
  // A tile whose products are made and whose cells are not: tiles of AMX multiply the next one's meanwhile.
  struct Pending {
    const Tile* tile;  // null: none
    int64_t panel;
    const S* const* h_prev;
    const T *sums, *from_h;  // [rows][gate][unit of the panel]
    int row;                 // the first that is left
  };

 public:
  ForwardDirectionScan(const Shape& shape, const ForwardDirection<S>& d, const CpuPlan& plan,
                       Input input = Input(), Recurrent recurrent = Recurrent())
      : shape_(shape), d_(d), plan_(plan), H_(shape.H), Hr_(shape.Hr()), scan_{shape, d.reverse},
        input_products_(input), recurrent_products_(recurrent),
        // Weights that are trained change before they come again.
        packing_(packing_of(plan, /*again=*/!d.saved)),
        input_(input.template weights<kGates, kVectors>(d.w_ih, H_, shape.I, packing_)),
        recurrent_(recurrent.template weights<kGates, kVectors>(d.w_hh, H_, Hr_, packing_)),
        // Fewer outputs than a vector has places would leave most of a packed panel empty.
        projection_(d.w_hr, shape.P, H_, shape.P <= kSize ? Packing::none : packing_),
        hidden_(shape.P ? shape.B * H_ : 0), zeros_(Hr_) {
    memset(zeros_.get(), 0, Hr_ * sizeof(S));
  }

  void run(const Member& member, Barrier* everybody) {
    [[maybe_unused]] const typename Input::Session session;
    const Range panels = share_of(recurrent_.panels(), member.unit_group, plan_.unit_groups);
    const Range proj_panels = share_of(projection_.panels(), member.unit_group, plan_.unit_groups);
    const Tiles tiles = tiles_of(shape_, kTileRows, member, plan_);
    pack_share(recurrent_, panels, member, plan_);
    pack_share(input_, panels, member, plan_);
    pack_share(projection_, proj_panels, member, plan_);
    if (plan_.row_groups > 1) everybody->wait(plan_.threads());

    const int64_t capacity = smallest(Block::kMostRows, shape_.N);
    const Buffer<T> memory((panels.last - panels.first) * capacity * kRow);
    const Sums sums{memory.get(), panels.first, capacity};
    const Buffer<typename Input::Part> x_parts(InputProduct::parts_size(input_products_, shape_.I));
    const Buffer<typename Recurrent::Part> h_parts(Block::kMostTiles * recurrent_products_.operand_size(Hr_));
    Block block;
    const S* h[Block::kMostRows];
    Blocks<Block> blocks(scan_, tiles);
    for (int64_t sweep = 0; blocks.next(block);) {
      multiply_input(block, panels, x_parts.get(), sums);
      for (int first = 0, last; first < block.tiles; first = last) {
        const int64_t s = block.tile[first].s;
        for (last = first; last < block.tiles && block.tile[last].s == s; ++last)
          meet_state(block.tile[last], h + block.tile[last].first,
                     h_parts.get() + (last - first) * recurrent_products_.operand_size(Hr_));
        Pending pending{};
        alignas(64) T apart[kOneSum ? 1 : 2][kOneSum ? 1 : kTileRows * kRow];
        int turn = 0;
        each_panel(panels, sweep++, [&](int64_t panel) {
          for (int i = first; i < last; ++i, ++turn)
            gates_tile(panel, block.tile[i], h + block.tile[i].first, sums, apart[turn % 2 * !kOneSum],
                       pending);
        });
        finish_rows(pending, kTileRows);
        if (block.tile[last - 1].ends_step) end_step(s, proj_panels, tiles, member);
      }
    }
  }

 private:
  void multiply_input(const Block& block, Range panels, typename Input::Part* parts, const Sums& sums) const {
    const S* x[Block::kMostRows];
    for (int i = 0; i < block.rows; ++i) x[i] = d_.x + block.row[i] * shape_.I;
    InputProduct::multiply(input_products_, input_, x, block.rows, shape_.I, panels, parts, sums, false);
  }

  // The state that a tile's rows meet: each member makes an operand of all of them, which is less than another barrier.
  void meet_state(Tile& tile, const S** h, typename Recurrent::Part* parts) const {
    const int64_t continued = scan_.continued(tile.s);
    for (int r = 0; r < tile.rows; ++r) {
      const int64_t b = tile.b0 + r;
      h[r] = starts_anew(scan_.offset(tile.s) + b) ? zeros_.get()
             : b < continued ? d_.output + (scan_.offset(tile.s - 1) + b) * d_.output_stride
             : d_.h0         ? d_.h0 + b * Hr_
                             : zeros_.get();
    }
    if (d_.h0 || tile.b0 < continued) tile.h = recurrent_products_.operand(parts, h, tile.rows, Hr_);
  }

  void gates_tile(int64_t panel, const Tile& tile, const S* const* h_prev, const Sums& all, T* apart,
                  Pending& pending) {
    T* const sums = all.at(panel, tile.first);
    T* const from_h = kOneSum ? sums : apart;
    fetch_units(scan_.offset(tile.s) + tile.b0, panel * kUnits, tile.rows);
    if (d_.h0 || tile.b0 < scan_.continued(tile.s)) {
      const int share =
          pending.tile ? static_cast<int>(divide_up(pending.tile->rows, recurrent_.pauses())) : 0;
      recurrent_.multiply(tile.h, tile.rows, panel, from_h, kOneSum, [&] { finish_rows(pending, share); });
    } else if (!kOneSum) {
      memset(from_h, 0, kTileRows * kRow * sizeof(T));
    }
    finish_rows(pending, kTileRows);
    pending = {&tile, panel, h_prev, sums, from_h, 0};
    if (!Recurrent::kPauses) finish_rows(pending, kTileRows);
  }

  // The cells of the next `count` rows that wait.
  __attribute__((noinline)) void finish_rows(Pending& p, int count) {
    if (!p.tile) return;
    const Tile& tile = *p.tile;
    const int first = p.row, last = static_cast<int>(smallest(first + count, tile.rows));
    p.row = last;
    if (last == tile.rows) p.tile = nullptr;
    const int64_t row0 = scan_.offset(tile.s) + tile.b0;
    for (int v = 0; v < kVectors; ++v) {
      const int64_t u = p.panel * kUnits + v * kSize;
      with_count<kSize>(H_ - u, [&](auto n) {
        V b_hh[kGates], b_ih[kGates];
        for (int g = 0; g < kGates; ++g) {
          b_hh[g] = d_.b_hh ? load(d_.b_hh + g * H_ + u, n) : V(T(0));
          b_ih[g] = d_.b_ih ? load(d_.b_ih + g * H_ + u, n) : V(T(0));
          // Small beside a sum: one rounding less, and one addition a row.
          if constexpr (kOneSum) b_ih[g] = b_ih[g] + b_hh[g];
        }
        for (int r = first; r < last; ++r) {
          V x_side[kGates], h_side[kGates];
#pragma GCC unroll 4
          for (int g = 0; g < kGates; ++g) {
            const int64_t at = r * kRow + g * kUnits + v * kSize;
            h_side[g] = kOneSum ? load(p.from_h + at) : load(p.from_h + at) + b_hh[g];
            x_side[g] = kOneSum ? b_ih[g] : load(p.sums + at) + b_ih[g];
          }
          finish_unit(tile.s, tile.b0 + r, row0 + r, u, n, x_side, h_side, p.h_prev[r]);
        }
      });
    }
  }

  void end_step(int64_t s, Range proj_panels, const Tiles& tiles, const Member& member) {
    if (shape_.P) {
      member.barrier->wait(plan_.unit_groups);  // the projection reads every unit
      each_panel(proj_panels, s, [&](int64_t panel) {
        tiles.each(scan_.rows(s), [&](int64_t b, int rows) { projection_tile(s, panel, b, rows); });
      });
    }
    member.barrier->wait(plan_.unit_groups);  // the next step reads every unit of h_t
  }

  // Asks for what finish_unit reads and writes of a tile, as BackwardDirectionScan does.
  FRNN_HD void fetch_units(int64_t row0, int64_t u, int rows) const {
    for (int64_t row = row0; row < row0 + rows; ++row) {
      if (!shape_.P) fetch<kVectors>(d_.output + row * d_.output_stride + u);
      if (d_.saved)
        for (int k = 0; k < Cell::kSaved; ++k) fetch<kVectors>(d_.saved + (row * Cell::kSaved + k) * H_ + u);
    }
  }

  // The cell itself, for the n units from u on of row b.
  template <class Count>
  FRNN_HD void finish_unit(int64_t s, int64_t b, int64_t row, int64_t u, Count n, const V* gx, const V* gh,
                           const S* h_prev) {
    V own(T(0)), state(T(0)), saved[Cell::kSaved + 1];
    if constexpr (Cell::kReadsPreviousHidden) own = load(h_prev + u, n);
    if constexpr (Cell::kHasCellState)
      if (!starts_anew(row)) state = load(d_.c + b * H_ + u, n);
    const V h = Cell::step(gx, gh, own, state, saved);
    if constexpr (Cell::kHasCellState) store(d_.c + b * H_ + u, state, n);
    if (d_.saved)
#pragma GCC unroll 8
      for (int k = 0; k < Cell::kSaved; ++k) store(d_.saved + (row * Cell::kSaved + k) * H_ + u, saved[k], n);
    if (shape_.P)
      store(hidden_.get() + b * H_ + u, h, n);
    else
      store_state(s, b, row, u, h, n);
  }

  void projection_tile(int64_t s, int64_t panel, int64_t b0, int rows) {
    const S* hidden[kTileRows];
    for (int r = 0; r < rows; ++r) hidden[r] = hidden_.get() + (b0 + r) * H_;
    alignas(64) T acc[kTileRows * kProjVectors * kSize];
    projection_.multiply(hidden, rows, panel, acc);
    for (int v = 0; v < kProjVectors; ++v) {
      const int64_t u = (panel * kProjVectors + v) * kSize;
      with_count<kSize>(shape_.P - u, [&](auto n) {
        for (int r = 0; r < rows; ++r)
          store_state(s, b0 + r, scan_.offset(s) + b0 + r, u, load(acc + (r * kProjVectors + v) * kSize), n);
      });
    }
  }

  template <class Count>
  FRNN_HD void store_state(int64_t s, int64_t b, int64_t row, int64_t u, V h, Count n) {
    store(d_.output + row * d_.output_stride + u, h, n);
    if (d_.hn && b >= scan_.continuing(s)) store(d_.hn + b * Hr_ + u, h, n);
  }

  FRNN_HD bool starts_anew(int64_t row) const { return d_.reset && d_.reset[row]; }

  const Shape& shape_;
  const ForwardDirection<S>& d_;
  const CpuPlan& plan_;
  const int64_t H_, Hr_;
  const Scan scan_;
  const Input input_products_;
  const Recurrent recurrent_products_;
  const Packing packing_;
  typename Input::template Weights<kGates, kVectors> input_;
  typename Recurrent::template Weights<kGates, kVectors> recurrent_;
  GateWeights<S, 1, kProjVectors> projection_;
  Buffer<S> hidden_;  // [B, H], h before the projection
  Buffer<S> zeros_;   // [Hr], the row that stands for an absent state
};

}  // namespace FRNN_ISA
}  // namespace frnn
