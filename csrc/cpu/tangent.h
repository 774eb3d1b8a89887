// The tangent scan of one layer on the CPU: how the states change when the arguments change in a given direction. It
// needs no gates anew, only those that the forward scan saved. Of its four products only the one with the changes of h
// has to wait for the steps; the others are made in blocks of rows, as the forward scan's of the input.
#pragma once

#include "../cells/cells.h"
#include "../cells/dual.h"
#include "forward.h"

namespace frnn {
inline namespace FRNN_ISA {

// What one unit's saved values are at one step, with how they change. A cell without any has its output there.
template <class Cell, class T, class Count>
FRNN_HD void load_gates(const TangentDirection<T>& d, int64_t H, int64_t row, int64_t u, Count n,
                        Vec<T>* saved) {
  for (int k = 0; k < Cell::kSaved; ++k) saved[k] = load(d.saved + (row * Cell::kSaved + k) * H + u, n);
  if constexpr (Cell::kSaved == 0) saved[0] = load(d.output + row * d.output_stride + u, n);
}

// A state that a unit meets at step s, with its tangent: h_{t-1} or c_{t-1} of row b.
template <class T, class Count>
FRNN_HD Dual<Vec<T>> load_dual(const T* value, const T* tangent, Count n) {
  const Vec<T> zero(T(0));
  return {value ? load(value, n) : zero, tangent ? load(tangent, n) : zero};
}
template <class T>
FRNN_HD const T* offset_or_null(const T* p, int64_t offset) {
  return p ? p + offset : nullptr;
}

template <class Cell, class T, class Count>
FRNN_HD Dual<Vec<T>> previous_hidden(const TangentDirection<T>& d, const Scan& scan, int64_t Hr, int64_t s,
                                     int64_t b, int64_t u, Count n) {
  if (b < scan.continued(s)) {
    const int64_t at = (scan.offset(s - 1) + b) * d.output_stride + u;
    return load_dual(d.output + at, d.output_tangent + at, n);
  }
  return load_dual(offset_or_null(d.h0, b * Hr + u), offset_or_null(d.h0_tangent, b * Hr + u), n);
}

template <class Cell, class T, class Count>
FRNN_HD Dual<Vec<T>> previous_cell(const TangentDirection<T>& d, const Scan& scan, int64_t H, int64_t s,
                                   int64_t b, int64_t u, Count n) {
  if (b < scan.continued(s)) {
    const int64_t at = ((scan.offset(s - 1) + b) * Cell::kSaved + Cell::kSavedCell) * H + u;
    return load_dual(d.saved + at, d.saved_tangent + at, n);
  }
  return load_dual(offset_or_null(d.c0, b * H + u), offset_or_null(d.c0_tangent, b * H + u), n);
}

// Ahead, Recurrent: how rows are multiplied (PlainProducts in weights.h) in blocks and step by step.
template <class Cell, class T, class Ahead = PlainProducts<T>, class Recurrent = PlainProducts<T>>
class TangentDirectionScan {
  static constexpr int kGates = Cell::kGates, kVectors = panel_vectors<Cell>();
  static constexpr int kSize = Vec<T>::kSize, kUnits = kVectors * kSize, kRow = kGates * kUnits;
  static constexpr int kTileRows = Recurrent::tile_rows(kGates * kVectors);
  static constexpr int kProjVectors = 2;
  // Where the two sides of a gate are simply added, so are their changes.
  static constexpr bool kOneSum = Cell::kGateGrads == Cell::kGates;
  using V = Vec<T>;

  using Block = frnn::Block<kTileRows, typename Recurrent::Operand>;
  using Tile = typename Block::Tile;
  using Sums = BlockSums<T, kRow>;
  using Product = BlockProduct<Ahead, kGates * kVectors, Block::kMostRows>;
  using Part = typename Ahead::Part;
  using Weights = typename Ahead::template Weights<kGates, kVectors>;

 public:
  TangentDirectionScan(const Shape& shape, const TangentDirection<T>& d, const CpuPlan& plan,
                       Ahead ahead = Ahead(), Recurrent recurrent = Recurrent())
      : shape_(shape), d_(d), plan_(plan), H_(shape.H), Hr_(shape.Hr()), scan_{shape, d.reverse},
        ahead_(ahead), recurrent_products_(recurrent), packing_(packing_of(plan, false)),
        recurrent_(recurrent.template weights<kGates, kVectors>(d.w_hh, H_, Hr_, packing_)),
        recurrent_tangent_(ahead.template weights<kGates, kVectors>(d.w_hh_tangent, H_, Hr_, packing_)),
        input_(
            ahead.template weights<kGates, kVectors>(d.x_tangent ? d.w_ih : nullptr, H_, shape.I, packing_)),
        input_tangent_(ahead.template weights<kGates, kVectors>(d.w_ih_tangent, H_, shape.I, packing_)),
        projection_(d.w_hr, shape.P, H_, shape.P <= kSize ? Packing::none : packing_),
        hidden_(shape.P ? shape.B * H_ : 0), zeros_(Hr_) {
    memset(zeros_.get(), 0, Hr_ * sizeof(T));
  }

  void run(const Member& member, Barrier* everybody) {
    [[maybe_unused]] const typename Ahead::Session session;
    const Range panels = share_of(recurrent_.panels(), member.unit_group, plan_.unit_groups);
    const Range proj_panels = share_of(projection_.panels(), member.unit_group, plan_.unit_groups);
    const Tiles tiles = tiles_of(shape_, kTileRows, member, plan_);
    pack_share(recurrent_, panels, member, plan_);
    if (d_.w_hh_tangent) pack_share(recurrent_tangent_, panels, member, plan_);
    if (d_.x_tangent) pack_share(input_, panels, member, plan_);
    if (d_.w_ih_tangent) pack_share(input_tangent_, panels, member, plan_);
    pack_share(projection_, proj_panels, member, plan_);
    if (plan_.row_groups > 1) everybody->wait(plan_.threads());

    const int64_t capacity = smallest(Block::kMostRows, shape_.N);
    const int64_t size = (panels.last - panels.first) * capacity * kRow;
    const Buffer<T> memory(kOneSum ? size : 2 * size);
    const Sums from_x{memory.get(), panels.first, capacity};
    const Sums from_h{kOneSum ? memory.get() : memory.get() + size, panels.first, capacity};
    const Buffer<Part> parts(Product::parts_size(ahead_, shape_.I > Hr_ ? shape_.I : Hr_));
    const Buffer<typename Recurrent::Part> h_parts(Block::kMostTiles * recurrent_products_.operand_size(Hr_));
    Block block;
    const T* rows[Block::kMostRows];
    Blocks<Block> blocks(scan_, tiles);
    for (int64_t sweep = 0; blocks.next(block);) {
      multiply_input(block, panels, rows, parts.get(), from_x);
      multiply_states(block, panels, rows, parts.get(), from_h);
      for (int first = 0, last; first < block.tiles; first = last) {
        const int64_t s = block.tile[first].s;
        for (last = first; last < block.tiles && block.tile[last].s == s; ++last)
          meet_state(block.tile[last], rows + block.tile[last].first,
                     h_parts.get() + (last - first) * recurrent_products_.operand_size(Hr_));
        each_panel(panels, sweep++, [&](int64_t panel) {
          for (int i = first; i < last; ++i) gates_tile(panel, block.tile[i], from_x, from_h);
        });
        if (block.tile[last - 1].ends_step) end_step(s, proj_panels, tiles, member);
      }
    }
  }

 private:
  // The sums that the changes of x and of w_ih make, or zero.
  void multiply_input(const Block& block, Range panels, const T** rows, Part* parts, const Sums& sums) const {
    const auto multiply = [&](const T* x, const Weights& weights, bool add) {
      for (int i = 0; i < block.rows; ++i) rows[i] = x + block.row[i] * shape_.I;
      Product::multiply(ahead_, weights, rows, block.rows, shape_.I, panels, parts, sums, add);
    };
    if (d_.x_tangent) multiply(d_.x_tangent, input_, false);
    if (d_.w_ih_tangent) multiply(d_.x, input_tangent_, d_.x_tangent);
    if (!d_.x_tangent && !d_.w_ih_tangent) clear(block, panels, sums);
  }

  // Those that h_{t-1} makes with the changes of w_hh.
  void multiply_states(const Block& block, Range panels, const T** rows, Part* parts,
                       const Sums& sums) const {
    if (d_.w_hh_tangent) {
      for (const Tile* tile = block.tile; tile < block.tile + block.tiles; ++tile)
        for (int r = 0; r < tile->rows; ++r) rows[tile->first + r] = previous(tile->s, tile->b0 + r);
      Product::multiply(ahead_, recurrent_tangent_, rows, block.rows, Hr_, panels, parts, sums, kOneSum);
    } else if (!kOneSum) {
      clear(block, panels, sums);
    }
  }

  static void clear(const Block& block, Range panels, const Sums& sums) {
    for (int64_t panel = panels.first; panel < panels.last; ++panel)
      memset(sums.at(panel, 0), 0, block.rows * kRow * sizeof(T));
  }

  const T* previous(int64_t s, int64_t b) const {
    if (b < scan_.continued(s)) return d_.output + (scan_.offset(s - 1) + b) * d_.output_stride;
    return d_.h0 ? d_.h0 + b * Hr_ : zeros_.get();
  }
  const T* previous_tangent(int64_t s, int64_t b) const {
    if (b < scan_.continued(s)) return d_.output_tangent + (scan_.offset(s - 1) + b) * d_.output_stride;
    return d_.h0_tangent ? d_.h0_tangent + b * Hr_ : zeros_.get();
  }
  bool meets_change(const Tile& tile) const { return d_.h0_tangent || tile.b0 < scan_.continued(tile.s); }

  void meet_state(Tile& tile, const T** h, typename Recurrent::Part* parts) const {
    for (int r = 0; r < tile.rows; ++r) h[r] = previous_tangent(tile.s, tile.b0 + r);
    if (meets_change(tile)) tile.h = recurrent_products_.operand(parts, h, tile.rows, Hr_);
  }

  void gates_tile(int64_t panel, const Tile& tile, const Sums& all_from_x, const Sums& all_from_h) {
    const int64_t row0 = scan_.offset(tile.s) + tile.b0;
    T *from_x = all_from_x.at(panel, tile.first), *from_h = all_from_h.at(panel, tile.first);
    fetch_units(row0, panel * kUnits, tile.rows);
    if (meets_change(tile)) recurrent_.multiply(tile.h, tile.rows, panel, from_h, true);
    for (int v = 0; v < kVectors; ++v) {
      const int64_t u = panel * kUnits + v * kSize;
      with_count<kSize>(H_ - u, [&](auto n) {
        V b_ih[kGates], b_hh[kGates];
        for (int g = 0; g < kGates; ++g) {
          b_ih[g] = d_.b_ih_tangent ? load(d_.b_ih_tangent + g * H_ + u, n) : V(T(0));
          b_hh[g] = d_.b_hh_tangent ? load(d_.b_hh_tangent + g * H_ + u, n) : V(T(0));
        }
        for (int r = 0; r < tile.rows; ++r) {
          V gx[kGates], gh[kGates];
          for (int g = 0; g < kGates; ++g) {
            const int64_t at = r * kRow + g * kUnits + v * kSize;
            gx[g] = kOneSum ? b_ih[g] : load(from_x + at) + b_ih[g];
            gh[g] = load(from_h + at) + b_hh[g];
          }
          finish_unit(tile.s, tile.b0 + r, row0 + r, u, n, gx, gh);
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
    member.barrier->wait(plan_.unit_groups);  // the next step reads every unit
  }

  // Asks for what finish_unit reads and writes of a tile, as BackwardDirectionScan does.
  FRNN_HD void fetch_units(int64_t row0, int64_t u, int rows) const {
    for (int64_t row = row0; row < row0 + rows; ++row) {
      for (int k = 0; k < Cell::kSaved; ++k) {
        fetch<kVectors>(d_.saved + (row * Cell::kSaved + k) * H_ + u);
        fetch<kVectors>(d_.saved_tangent + (row * Cell::kSaved + k) * H_ + u);
      }
      if constexpr (Cell::kSaved == 0) fetch<kVectors>(d_.output + row * d_.output_stride + u);
      if (!shape_.P) fetch<kVectors>(d_.output_tangent + row * d_.output_stride + u);
    }
  }

  template <class Count>
  FRNN_HD void finish_unit(int64_t s, int64_t b, int64_t row, int64_t u, Count n, const V* gx, const V* gh) {
    V saved[Cell::kSaved + 1], changes[Cell::kSaved + 1];
    load_gates<Cell>(d_, H_, row, u, n, saved);
    Cell::gates_tangent(saved, gx, gh, changes);
    Dual<V> gates[Cell::kSaved + 1], h_prev(0), state(0);
    for (int k = 0; k <= Cell::kSaved; ++k) gates[k] = {saved[k], changes[k]};
    if constexpr (Cell::kReadsPreviousHidden) h_prev = previous_hidden<Cell>(d_, scan_, Hr_, s, b, u, n);
    if constexpr (Cell::kHasCellState) state = previous_cell<Cell>(d_, scan_, H_, s, b, u, n);
    const V h = Cell::finish(gates, h_prev, state).tangent;
    if constexpr (Cell::kHasCellState) store(d_.c_tangent + b * H_ + u, state.tangent, n);
    for (int k = 0; k < Cell::kSaved; ++k)
      store(d_.saved_tangent + (row * Cell::kSaved + k) * H_ + u, gates[k].tangent, n);
    if (shape_.P)
      store(hidden_.get() + b * H_ + u, h, n);
    else
      store_state(s, b, row, u, h, n);
  }

  void projection_tile(int64_t s, int64_t panel, int64_t b0, int rows) {
    const T* hidden[kTileRows];
    for (int r = 0; r < rows; ++r) hidden[r] = hidden_.get() + (b0 + r) * H_;
    alignas(64) T acc[kTileRows * kProjVectors * kSize];
    projection_.multiply(hidden, rows, panel, acc);
    for (int v = 0; v < kProjVectors; ++v) {
      const int64_t u = (panel * kProjVectors + v) * kSize;
      const int n = static_cast<int>(smallest(shape_.P - u, kSize));
      for (int r = 0; r < rows && n > 0; ++r) {
        const int64_t row = scan_.offset(s) + b0 + r;
        V h = load(acc + (r * kProjVectors + v) * kSize);
        if (d_.hr_tangent) h = h + load(d_.hr_tangent + row * shape_.P + u, n);
        store_state(s, b0 + r, row, u, h, n);
      }
    }
  }

  template <class Count>
  FRNN_HD void store_state(int64_t s, int64_t b, int64_t row, int64_t u, V h, Count n) {
    store(d_.output_tangent + row * d_.output_stride + u, h, n);
    if (b >= scan_.continuing(s)) store(d_.hn_tangent + b * Hr_ + u, h, n);
  }

  const Shape& shape_;
  const TangentDirection<T>& d_;
  const CpuPlan& plan_;
  const int64_t H_, Hr_;
  const Scan scan_;
  const Ahead ahead_;
  const Recurrent recurrent_products_;
  const Packing packing_;
  const typename Recurrent::template Weights<kGates, kVectors> recurrent_;
  const Weights recurrent_tangent_, input_, input_tangent_;
  GateWeights<T, 1, kProjVectors> projection_;
  Buffer<T> hidden_;  // [B, H], tangent of h before the projection
  Buffer<T> zeros_;   // [Hr]
};

}  // namespace FRNN_ISA
}  // namespace frnn
