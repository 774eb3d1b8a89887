// The forward scan of one layer on the CPU: all steps, both directions, one call.
#pragma once

#include "../cells/cells.h"
#include "weights.h"

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
  return p;
}

// S: what weights, inputs and the hidden state are stored as. Sums, the cell state and the cell itself are of T.
template <class Cell, class S>
class ForwardDirectionScan {
  using T = Accumulate<S>;
  static constexpr int kGates = Cell::kGates, kVectors = panel_vectors<Cell>();
  static constexpr int kSize = Vec<T>::kSize, kUnits = kVectors * kSize;
  static constexpr int kMaxTileRows = PackedProduct<S>::kMaxTileRows;
  static constexpr int kTileRows = PackedProduct<S>::tile_rows(kGates * kVectors);
  static constexpr int kProjVectors = 2;
  // Whether a gate adds up its two sides: then their products need not be told apart.
  static constexpr bool kOneSum = Cell::kGateGrads == kGates;
  using V = Vec<T>;

 public:
  ForwardDirectionScan(const Shape& shape, const ForwardDirection<S>& d, const CpuPlan& plan)
      : shape_(shape), d_(d), plan_(plan), H_(shape.H), Hr_(shape.Hr()), scan_{shape, d.reverse},
        recurrent_(d.w_hh, H_, Hr_, plan.direct), input_(d.w_ih, H_, shape.I, plan.direct),
        // Fewer outputs than a vector has places would leave most of a packed panel empty.
        projection_(d.w_hr, shape.P, H_, plan.direct || shape.P <= kSize),
        hidden_(shape.P ? shape.B * H_ : 0), zeros_(Hr_) {
    memset(zeros_.get(), 0, Hr_ * sizeof(S));
  }

  void run(const Member& member, Barrier* everybody) {
    [[maybe_unused]] const typename PackedProduct<S>::Session session;
    const Range panels = share_of(recurrent_.panels(), member.unit_group, plan_.unit_groups);
    const Range proj_panels = share_of(projection_.panels(), member.unit_group, plan_.unit_groups);
    const Tiles tiles(shape_.B, kTileRows, member.row_group, plan_.row_groups);
    pack_share(recurrent_, panels, member, plan_);
    if (d_.x) pack_share(input_, panels, member, plan_);
    pack_share(projection_, proj_panels, member, plan_);
    if (plan_.row_groups > 1) everybody->wait(plan_.threads());
    if (d_.x && d_.gates_x) {
      multiply_input(panels, member);
      if (plan_.row_groups > 1) everybody->wait(plan_.threads());
    }

    for (int64_t s = 0; s < shape_.T; ++s) {
      each_panel(panels, s, [&](int64_t panel) {
        tiles.each(scan_.rows(s), [&](int64_t b, int rows) { gates_tile(s, panel, b, rows); });
      });
      if (shape_.P) {
        member.barrier->wait(plan_.unit_groups);  // the projection reads every unit
        each_panel(proj_panels, s, [&](int64_t panel) {
          tiles.each(scan_.rows(s), [&](int64_t b, int rows) { projection_tile(s, panel, b, rows); });
        });
      }
      member.barrier->wait(plan_.unit_groups);  // the next step reads every unit of h_t
    }
  }

 private:
  // The input's product for all steps, of this member's units and its share of the rows.
  void multiply_input(Range panels, const Member& member) {
    const Range rows = share_of(shape_.N, member.row_group, plan_.row_groups);
    for (int64_t panel = panels.first; panel < panels.last; ++panel)
      for (int64_t row0 = rows.first; row0 < rows.last; row0 += kTileRows) {
        const int count = static_cast<int>(smallest(rows.last - row0, kTileRows));
        const S* x[kMaxTileRows];
        for (int r = 0; r < count; ++r) x[r] = d_.x + (row0 + r) * shape_.I;
        for (int r = 0; r < count; ++r)
          for (int g = 0; g < kGates; ++g)
            fetch<kVectors>(d_.gates_x + ((row0 + r) * kGates + g) * H_ + panel * kUnits);
        alignas(64) T acc[kTileRows * kGates * kUnits];
        input_.multiply(x, count, panel, acc);
        for (int r = 0; r < count; ++r)
          for (int g = 0; g < kGates; ++g)
            for (int v = 0; v < kVectors; ++v) {
              const int64_t u = panel * kUnits + v * kSize;
              const int n = static_cast<int>(smallest(H_ - u, kSize));
              if (n > 0)
                store(d_.gates_x + (row0 + r) * kGates * H_ + g * H_ + u,
                      load(acc + (r * kGates + g) * kUnits + v * kSize), n);
            }
      }
  }

  const S* previous_hidden(int64_t s, int64_t b, int64_t continued) const {
    if (b < continued) return d_.output + (scan_.offset(s - 1) + b) * d_.output_stride;
    return d_.h0 ? d_.h0 + b * Hr_ : zeros_.get();
  }

  void gates_tile(int64_t s, int64_t panel, int64_t b0, int rows) {
    const int64_t continued = scan_.continued(s), row0 = scan_.offset(s) + b0;
    const S* h_prev[kMaxTileRows];
    const S* x[kMaxTileRows];
    for (int r = 0; r < rows; ++r) h_prev[r] = previous_hidden(s, b0 + r, continued);
    alignas(64) T from_h[kTileRows * kGates * kUnits];
    alignas(64) T from_x[kOneSum ? 1 : kTileRows * kGates * kUnits];
    fetch_units(row0, panel * kUnits, rows);
    if (d_.h0 || b0 < continued)
      recurrent_.multiply(h_prev, rows, panel, from_h);
    else
      memset(from_h, 0, sizeof from_h);
    if (!d_.gates_x) {
      for (int r = 0; r < rows; ++r) x[r] = d_.x + (row0 + r) * shape_.I;
      input_.multiply(x, rows, panel, kOneSum ? from_h : from_x, kOneSum);
    }
    // The input's side of gate g of row r: at gx + r * gx_row + g * gx_gate.
    const bool in_sum = kOneSum && !d_.gates_x;
    const T* gx = d_.gates_x ? d_.gates_x + row0 * kGates * H_ + panel * kUnits : from_x;
    const int64_t gx_gate = d_.gates_x ? H_ : kUnits, gx_row = kGates * gx_gate;
    for (int v = 0; v < kVectors; ++v) {
      const int64_t u = panel * kUnits + v * kSize;
      with_count<kSize>(H_ - u, [&](auto n) {
        V b_hh[kGates], b_ih[kGates];
        for (int g = 0; g < kGates; ++g) {
          b_hh[g] = d_.b_hh ? load(d_.b_hh + g * H_ + u, n) : V(T(0));
          b_ih[g] = d_.b_ih ? load(d_.b_ih + g * H_ + u, n) : V(T(0));
        }
        for (int r = 0; r < rows; ++r) {
          V x_side[kGates], h_side[kGates];
#pragma GCC unroll 4
          for (int g = 0; g < kGates; ++g) {
            h_side[g] = load(from_h + (r * kGates + g) * kUnits + v * kSize) + b_hh[g];
            x_side[g] = in_sum ? b_ih[g] : load(gx + r * gx_row + g * gx_gate + v * kSize, n) + b_ih[g];
          }
          finish_unit(s, b0 + r, row0 + r, u, n, x_side, h_side, h_prev[r]);
        }
      });
    }
  }

  // Asks for what finish_unit reads and writes of a tile, as BackwardDirectionScan does.
  FRNN_HD void fetch_units(int64_t row0, int64_t u, int rows) const {
    for (int64_t row = row0; row < row0 + rows; ++row) {
      if (d_.gates_x)
        for (int g = 0; g < kGates; ++g) fetch<kVectors>(d_.gates_x + (row * kGates + g) * H_ + u);
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
    if constexpr (Cell::kHasCellState) state = load(d_.c + b * H_ + u, n);
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
    const S* hidden[kMaxTileRows];
    for (int r = 0; r < rows; ++r) hidden[r] = hidden_.get() + (b0 + r) * H_;
    alignas(64) T acc[kMaxTileRows * kProjVectors * kSize];
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

  const Shape& shape_;
  const ForwardDirection<S>& d_;
  const CpuPlan& plan_;
  const int64_t H_, Hr_;
  const Scan scan_;
  GateWeights<S, kGates, kVectors> recurrent_, input_;
  GateWeights<S, 1, kProjVectors> projection_;
  Buffer<S> hidden_;  // [B, H], h before the projection
  Buffer<S> zeros_;   // [Hr], the row that stands for an absent h0
};

}  // namespace FRNN_ISA
}  // namespace frnn
