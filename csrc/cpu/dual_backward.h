// The backward scan of one layer on the CPU with the tangents of everything it computes: the second derivative. The
// structure is that of backward.h; the cells run on csrc/cells/dual.h.
#pragma once

#include "tangent.h"

namespace frnn {
inline namespace FRNN_ISA {

template <class Cell, class T>
class DualBackwardDirectionScan {
  static constexpr int kVectors = 2, kSize = Vec<T>::kSize, kUnits = kVectors * kSize;
  static constexpr int kTileRows = tile_rows(kVectors);
  using V = Vec<T>;
  using D = Dual<V>;

 public:
  DualBackwardDirectionScan(const Shape& shape, const DualBackwardDirection<T>& d, const CpuPlan& plan)
      : shape_(shape), d_(d), f_(d.forward), plan_(plan), H_(shape.H), Hr_(shape.Hr()),
        grads_(Cell::kGateGrads * H_), scan_{shape, f_.reverse},
        recurrent_(f_.w_hh, Cell::kGates * H_, Hr_, plan.direct || shape.T == 1),
        recurrent_tangent_(d.w_hh_tangent, Cell::kGates * H_, Hr_, plan.direct || shape.T == 1),
        projection_(f_.w_hr, shape.P, H_, plan.direct),
        projection_tangent_(d.w_hr_tangent, shape.P, H_, plan.direct), zeros_(grads_) {
    memset(zeros_.get(), 0, grads_ * sizeof(T));
  }

  void run(const Member& member, Barrier* everybody) {
    const Range state_panels = share_of(recurrent_.panels(), member.unit_group, plan_.unit_groups);
    const Range unit_panels =
        shape_.P ? share_of(projection_.panels(), member.unit_group, plan_.unit_groups) : state_panels;
    const Tiles tiles(shape_.B, kTileRows, member.row_group, plan_.row_groups);
    pack_share(recurrent_, state_panels, member, plan_);
    if (d_.w_hh_tangent) pack_share(recurrent_tangent_, state_panels, member, plan_);
    if (shape_.P) pack_share(projection_, unit_panels, member, plan_);
    if (d_.w_hr_tangent) pack_share(projection_tangent_, unit_panels, member, plan_);
    if (plan_.row_groups > 1) everybody->wait(plan_.threads());

    for (int64_t s = shape_.T - 1; s >= 0; --s) {
      each_panel(state_panels, s, [&](int64_t panel) {
        tiles.each(scan_.rows(s), [&](int64_t b, int rows) { state_tile(s, panel, b, rows); });
      });
      if (shape_.P) {
        member.barrier->wait(plan_.unit_groups);  // the units read the whole gradient of the
                                                  // projected state
        each_panel(unit_panels, s, [&](int64_t panel) {
          tiles.each(scan_.rows(s), [&](int64_t b, int rows) { projection_tile(s, panel, b, rows); });
        });
      }
      member.barrier->wait(plan_.unit_groups);  // step s - 1 reads the dgates of every unit
    }
    if (d_.dh0_tangent)
      each_panel(state_panels, 1, [&](int64_t panel) {
        tiles.each(shape_.B, [&](int64_t b, int rows) { initial_state_tile(panel, b, rows); });
      });
  }

 private:
  using Weights = ColumnWeights<T, kVectors>;

  // The products of some rows with a panel change by those of the rows' changes and by those with the weights' changes:
  // change[row][unit of the panel].
  static void change_of_product(const T* const* rows, const T* const* rows_tangent, int count, int64_t panel,
                                const Weights& weights, const Weights* weights_tangent, T* change) {
    weights.multiply(rows_tangent, count, panel, change);
    if (!weights_tangent) return;
    alignas(64) T more[kTileRows * kUnits];
    weights_tangent->multiply(rows, count, panel, more);
    for (int i = 0; i < count * kVectors; ++i)
      store(change + i * kSize, load(change + i * kSize) + load(more + i * kSize));
  }

  // f(row, unit, units, place in `change`)
  template <class F>
  FRNN_HD void each_vector(int64_t panel, int64_t units, int rows, F&& f) const {
    for (int v = 0; v < kVectors; ++v) {
      const int64_t u = panel * kUnits + v * kSize;
      with_count<kSize>(units - u, [&](auto n) {
        for (int r = 0; r < rows; ++r) f(r, u, n, (r * kVectors + v) * kSize);
      });
    }
  }

  // Asks for what finish_unit reads and writes of a tile, as BackwardDirectionScan does.
  FRNN_HD void fetch_units(int64_t s, int64_t b0, int64_t u, int rows) const {
    for (int64_t b = b0; b < b0 + rows; ++b) {
      const int64_t row = scan_.offset(s) + b;
      for (int k = 0; k < Cell::kSaved; ++k) {
        fetch<kVectors>(f_.saved + (row * Cell::kSaved + k) * H_ + u);
        fetch<kVectors>(static_cast<const T*>(f_.saved_tangent) + (row * Cell::kSaved + k) * H_ + u);
      }
      fetch<kVectors>(d_.dh + row * Hr_ + u);
      for (int g = 0; g < Cell::kGateGrads; ++g) {
        fetch<kVectors>(d_.dgates + row * grads_ + g * H_ + u);
        fetch<kVectors>(d_.dgates_tangent + row * grads_ + g * H_ + u);
      }
      if constexpr (Cell::kGradReadsOutput) {
        fetch<kVectors>(f_.output + row * f_.output_stride + u);
        fetch<kVectors>(static_cast<const T*>(f_.output_tangent) + row * f_.output_stride + u);
      }
    }
  }

  void recurrent_change(const int64_t* rows, int count, int64_t panel, T* change) const {
    const T *values[kMaxTileRows], *tangents[kMaxTileRows];
    for (int r = 0; r < count; ++r) {
      values[r] = rows[r] < 0 ? zeros_.get() : d_.dgates + rows[r] * grads_;
      tangents[r] = rows[r] < 0 ? zeros_.get() : d_.dgates_tangent + rows[r] * grads_;
    }
    change_of_product(values, tangents, count, panel, recurrent_,
                      d_.w_hh_tangent ? &recurrent_tangent_ : nullptr, change);
  }

  // The gradient of h_t: what arrives from the outputs is the same for every direction, so only step t + 1 changes it.
  void state_tile(int64_t s, int64_t panel, int64_t b0, int rows) {
    const int64_t continuing = scan_.continuing(s);
    int64_t later[kMaxTileRows];
    for (int r = 0; r < rows; ++r) later[r] = b0 + r < continuing ? scan_.offset(s + 1) + b0 + r : -1;
    alignas(64) T change[kTileRows * kUnits];
    if (!shape_.P) fetch_units(s, b0, panel * kUnits, rows);
    if (b0 < continuing)
      recurrent_change(later, rows, panel, change);
    else
      memset(change, 0, sizeof change);
    each_vector(panel, Hr_, rows, [&](int r, int64_t u, auto n, int64_t at) {
      const int64_t row = scan_.offset(s) + b0 + r;
      const V tangent = load(change + at);
      if (shape_.P)
        store(d_.dh_tangent + row * shape_.P + u, tangent, n);
      else
        finish_unit(s, b0 + r, row, u, n, {load(d_.dh + row * Hr_ + u, n), tangent});
    });
  }

  void projection_tile(int64_t s, int64_t panel, int64_t b0, int rows) {
    const int64_t row0 = scan_.offset(s) + b0;
    const T *values[kMaxTileRows], *tangents[kMaxTileRows];
    for (int r = 0; r < rows; ++r) {
      values[r] = d_.dh + (row0 + r) * shape_.P;
      tangents[r] = d_.dh_tangent + (row0 + r) * shape_.P;
    }
    alignas(64) T value[kTileRows * kUnits], change[kTileRows * kUnits];
    projection_.multiply(values, rows, panel, value);
    change_of_product(values, tangents, rows, panel, projection_,
                      d_.w_hr_tangent ? &projection_tangent_ : nullptr, change);
    each_vector(panel, H_, rows, [&](int r, int64_t u, auto n, int64_t at) {
      finish_unit(s, b0 + r, row0 + r, u, n, {load(value + at), load(change + at)});
    });
  }

  void initial_state_tile(int64_t panel, int64_t b0, int rows) {
    int64_t first[kMaxTileRows];
    for (int r = 0; r < rows; ++r) first[r] = scan_.first_row(b0 + r);
    alignas(64) T change[kTileRows * kUnits];
    recurrent_change(first, rows, panel, change);
    each_vector(panel, Hr_, rows, [&](int r, int64_t u, auto n, int64_t at) {
      V tangent = load(change + at);
      if constexpr (Cell::kHasCarry && !Cell::kHasCellState)
        tangent = tangent + load(d_.carry_tangent + (b0 + r) * H_ + u, n);
      store(d_.dh0_tangent + (b0 + r) * Hr_ + u, tangent, n);
    });
  }

  template <class Count>
  FRNN_HD void finish_unit(int64_t s, int64_t b, int64_t row, int64_t u, Count n, D dh) {
    D saved[Cell::kSaved + 1], output(0), h_prev(0), c_prev(0), carry(0), grads[Cell::kGateGrads];
    for (int k = 0; k < Cell::kSaved; ++k) {
      const int64_t at = (row * Cell::kSaved + k) * H_ + u;
      saved[k] = {load(f_.saved + at, n), load(f_.saved_tangent + at, n)};
    }
    if constexpr (Cell::kGradReadsOutput) {
      const int64_t at = row * f_.output_stride + u;
      output = {load(f_.output + at, n), load(f_.output_tangent + at, n)};
    }
    if constexpr (Cell::kReadsPreviousHidden) h_prev = previous_hidden<Cell>(f_, scan_, Hr_, s, b, u, n);
    if constexpr (Cell::kHasCellState) c_prev = previous_cell<Cell>(f_, scan_, H_, s, b, u, n);
    if constexpr (Cell::kHasCarry)
      carry = {load(d_.carry + b * H_ + u, n), load(d_.carry_tangent + b * H_ + u, n)};
    Cell::step_grad(saved, output, h_prev, c_prev, dh, carry, grads);
    if constexpr (Cell::kHasCarry) {
      store(d_.carry + b * H_ + u, carry.value, n);
      store(d_.carry_tangent + b * H_ + u, carry.tangent, n);
    }
    for (int g = 0; g < Cell::kGateGrads; ++g) {
      store(d_.dgates + row * grads_ + g * H_ + u, grads[g].value, n);
      store(d_.dgates_tangent + row * grads_ + g * H_ + u, grads[g].tangent, n);
    }
  }

  const Shape& shape_;
  const DualBackwardDirection<T>& d_;
  const TangentDirection<T>& f_;
  const CpuPlan& plan_;
  const int64_t H_, Hr_, grads_;
  const Scan scan_;
  Weights recurrent_, recurrent_tangent_, projection_, projection_tangent_;
  Buffer<T> zeros_;  // [kGateGrads * H], stands for the dgates of a step that is
                     // not there
};

}  // namespace FRNN_ISA
}  // namespace frnn
