// The tangent scan of one layer on the CPU: how the states change when the arguments change in a given direction. It
// needs no gates anew, only those that the forward scan saved.
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

template <class Cell, class T>
class TangentDirectionScan {
  static constexpr int kGates = Cell::kGates, kVectors = panel_vectors<Cell>();
  static constexpr int kSize = Vec<T>::kSize, kUnits = kVectors * kSize;
  static constexpr int kTileRows = tile_rows(kGates * kVectors);
  static constexpr int kProjVectors = 2;
  // Where the two sides of a gate are simply added, so are their changes.
  static constexpr bool kOneSum = Cell::kGateGrads == Cell::kGates;
  using V = Vec<T>;

 public:
  TangentDirectionScan(const Shape& shape, const TangentDirection<T>& d, const CpuPlan& plan)
      : shape_(shape), d_(d), plan_(plan), H_(shape.H), Hr_(shape.Hr()), scan_{shape, d.reverse},
        recurrent_(d.w_hh, H_, Hr_, plan.direct), recurrent_tangent_(d.w_hh_tangent, H_, Hr_, plan.direct),
        input_(d.w_ih, H_, shape.I, plan.direct), input_tangent_(d.w_ih_tangent, H_, shape.I, plan.direct),
        projection_(d.w_hr, shape.P, H_, plan.direct || shape.P <= kSize),
        hidden_(shape.P ? shape.B * H_ : 0), zeros_(Hr_) {
    memset(zeros_.get(), 0, Hr_ * sizeof(T));
  }

  void run(const Member& member, Barrier* everybody) {
    const Range panels = share_of(recurrent_.panels(), member.unit_group, plan_.unit_groups);
    const Range proj_panels = share_of(projection_.panels(), member.unit_group, plan_.unit_groups);
    const Tiles tiles(shape_.B, kTileRows, member.row_group, plan_.row_groups);
    pack_share(recurrent_, panels, member, plan_);
    if (d_.w_hh_tangent) pack_share(recurrent_tangent_, panels, member, plan_);
    if (d_.x_change) pack_share(input_, panels, member, plan_);
    if (d_.w_ih_tangent) pack_share(input_tangent_, panels, member, plan_);
    pack_share(projection_, proj_panels, member, plan_);
    if (plan_.row_groups > 1) everybody->wait(plan_.threads());

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
      member.barrier->wait(plan_.unit_groups);  // the next step reads every unit
    }
  }

 private:
  const T* previous_tangent(int64_t s, int64_t b) const {
    if (b < scan_.continued(s)) return d_.output_tangent + (scan_.offset(s - 1) + b) * d_.output_stride;
    return d_.h0_tangent ? d_.h0_tangent + b * Hr_ : zeros_.get();
  }
  const T* previous(int64_t s, int64_t b) const {
    if (b < scan_.continued(s)) return d_.output + (scan_.offset(s - 1) + b) * d_.output_stride;
    return d_.h0 ? d_.h0 + b * Hr_ : zeros_.get();
  }

  void gates_tile(int64_t s, int64_t panel, int64_t b0, int rows) {
    const int64_t row0 = scan_.offset(s) + b0;
    const bool continues = b0 < scan_.continued(s);
    const T* row[kMaxTileRows];
    alignas(64) T from_h[kTileRows * kGates * kUnits];
    alignas(64) T from_x[kOneSum ? 1 : kTileRows * kGates * kUnits];
    fetch_units(row0, panel * kUnits, rows);
    memset(from_h, 0, sizeof from_h);
    memset(from_x, 0, sizeof from_x);
    if (d_.h0_tangent || continues) {
      for (int r = 0; r < rows; ++r) row[r] = previous_tangent(s, b0 + r);
      recurrent_.multiply(row, rows, panel, from_h);
    }
    if (d_.w_hh_tangent && (d_.h0 || continues)) {
      for (int r = 0; r < rows; ++r) row[r] = previous(s, b0 + r);
      recurrent_tangent_.multiply(row, rows, panel, from_h, true);
    }
    if (d_.x_change) {
      for (int r = 0; r < rows; ++r) row[r] = d_.x_change + (row0 + r) * shape_.I;
      input_.multiply(row, rows, panel, kOneSum ? from_h : from_x, true);
    }
    if (d_.w_ih_tangent) {
      for (int r = 0; r < rows; ++r) row[r] = d_.x + (row0 + r) * shape_.I;
      input_tangent_.multiply(row, rows, panel, kOneSum ? from_h : from_x, true);
    }
    for (int v = 0; v < kVectors; ++v) {
      const int64_t u = panel * kUnits + v * kSize;
      with_count<kSize>(H_ - u, [&](auto n) {
        V b_ih[kGates], b_hh[kGates];
        for (int g = 0; g < kGates; ++g) {
          b_ih[g] = d_.b_ih_tangent ? load(d_.b_ih_tangent + g * H_ + u, n) : V(T(0));
          b_hh[g] = d_.b_hh_tangent ? load(d_.b_hh_tangent + g * H_ + u, n) : V(T(0));
        }
        for (int r = 0; r < rows; ++r) {
          V gx[kGates], gh[kGates];
          for (int g = 0; g < kGates; ++g) {
            const int64_t at = ((row0 + r) * kGates + g) * H_ + u;
            const int64_t place = (r * kGates + g) * kUnits + v * kSize;
            gx[g] = kOneSum ? b_ih[g] : load(from_x + place) + b_ih[g];
            gh[g] = load(from_h + place) + b_hh[g];
            if (d_.x_tangent) gx[g] = gx[g] + load(d_.x_tangent + at, n);
            if (d_.hh_tangent) gh[g] = gh[g] + load(d_.hh_tangent + at, n);
          }
          finish_unit(s, b0 + r, row0 + r, u, n, gx, gh);
        }
      });
    }
  }

  // Asks for what finish_unit reads and writes of a tile, as BackwardDirectionScan does.
  FRNN_HD void fetch_units(int64_t row0, int64_t u, int rows) const {
    for (int64_t row = row0; row < row0 + rows; ++row) {
      for (int g = 0; g < kGates; ++g) {
        if (d_.x_tangent) fetch<kVectors>(d_.x_tangent + (row * kGates + g) * H_ + u);
        if (d_.hh_tangent) fetch<kVectors>(d_.hh_tangent + (row * kGates + g) * H_ + u);
      }
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
    const T* hidden[kMaxTileRows];
    for (int r = 0; r < rows; ++r) hidden[r] = hidden_.get() + (b0 + r) * H_;
    alignas(64) T acc[kMaxTileRows * kProjVectors * kSize];
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
  GateWeights<T, kGates, kVectors> recurrent_, recurrent_tangent_, input_, input_tangent_;
  GateWeights<T, 1, kProjVectors> projection_;
  Buffer<T> hidden_;  // [B, H], tangent of h before the projection
  Buffer<T> zeros_;   // [Hr]
};

}  // namespace FRNN_ISA
}  // namespace frnn
