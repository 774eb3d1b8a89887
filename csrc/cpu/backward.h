// The backward scan of one layer on the CPU: from the gradients of its outputs to those of its gates. The weights'
// gradients are matrix products over all steps, made by the caller from `dgates`.
#pragma once

#include "../cells/cells.h"
#include "weights.h"

namespace frnn {
inline namespace FRNN_ISA {

// What a backward scan does with the units of a row, once the sums of its products are there. S: what the layer's tensors
// are stored as; sums, what is saved, the carry and the cell itself are of T.
template <class Cell, class S>
class BackwardUnits {
 public:
  using T = Accumulate<S>;
  using V = Vec<T>;
  static constexpr int kVectors = 2, kSize = V::kSize, kUnits = kVectors * kSize;
  // Vectors' worth of memory that so many stored numbers take.
  static constexpr int kStored = kVectors * sizeof(S) / sizeof(T);

  BackwardUnits(const Shape& shape, const BackwardDirection<S>& d)
      : shape_(shape), d_(d), H_(shape.H), Hr_(shape.Hr()), dgates_stride_(d.dgates_stride),
        scan_{shape, d.reverse} {}

  const S* dgates(int64_t row) const { return d_.dgates + row * dgates_stride_; }
  // What of a row's dgates flows back to the step before: these zeros where the row met no state of that step.
  const S* flowing_back(int64_t row, const S* zeros) const { return starts_anew(row) ? zeros : dgates(row); }

  // f(row, first unit, how many, values) for the vectors of a tile's sums, acc[row][vector], of `units` units in all.
  template <class F>
  FRNN_HD void each_vector(int64_t panel, int64_t units, int rows, const T* acc, F&& f) const {
    for (int v = 0; v < kVectors; ++v) {
      const int64_t u = panel * kUnits + v * kSize;
      with_count<kSize>(units - u, [&](auto n) {
        for (int r = 0; r < rows; ++r) f(r, u, n, load(acc + (r * kVectors + v) * kSize));
      });
    }
  }

  // The gradient of h_t, from the product of step t + 1, from the output and from h_n.
  template <class Count>
  FRNN_HD void finish_state(int64_t s, int64_t b, int64_t u, Count n, V dh) const {
    const int64_t row = scan_.offset(s) + b;
    if (d_.grad_output) dh = dh + load(d_.grad_output + row * d_.grad_output_stride + u, n);
    if (d_.grad_hn && b >= scan_.continuing(s)) dh = dh + load(d_.grad_hn + b * Hr_ + u, n);
    if (d_.adds_previous && b < scan_.continuing(s))
      dh = dh + load(d_.adds_previous + (scan_.offset(s + 1) + b) * Hr_ + u, n);
    if (d_.dh) store(d_.dh + row * Hr_ + u, dh, n);
    if (!shape_.P) finish_unit(s, b, u, n, dh);
  }

  template <class Count>
  FRNN_HD void finish_initial_state(int64_t b, int64_t u, Count n, V dh) const {
    // A carry that is not the cell state's belongs to h0: what reached it past the product.
    if constexpr (Cell::kHasCarry && !Cell::kHasCellState) dh = dh + load(d_.carry + b * H_ + u, n);
    if (d_.adds_previous) dh = dh + load(d_.adds_previous + scan_.first_row(b) * Hr_ + u, n);
    store(d_.dh0 + b * Hr_ + u, dh, n);
  }

  // Asks for what finish_unit reads and writes of a tile: rows of N-row buffers lie too far apart for the hardware to see
  // them coming, and the product before gives the time.
  FRNN_HD void fetch_units(int64_t s, int64_t u, int64_t b_first, int64_t b_last) const {
    for (int64_t b = b_first; b < b_last; ++b) {
      const int64_t row = scan_.offset(s) + b;
      for (int k = 0; k < Cell::kSaved; ++k) fetch<kVectors>(d_.saved + (row * Cell::kSaved + k) * H_ + u);
      if (d_.grad_output) fetch<kStored>(d_.grad_output + row * d_.grad_output_stride + u);
      for (int g = 0; g < Cell::kGateGrads; ++g)
        fetch<kStored>(d_.dgates + row * dgates_stride_ + g * H_ + u);
      for (int g = 0; g < Cell::kGateGrads && d_.adds_gates; ++g)
        fetch<kStored>(d_.adds_gates + (row * Cell::kGateGrads + g) * H_ + u);
      if constexpr (Cell::kGradReadsOutput) fetch<kStored>(d_.output + row * d_.output_stride + u);
      if (b >= scan_.continued(s)) continue;
      const int64_t row_prev = scan_.offset(s - 1) + b;
      if constexpr (Cell::kReadsPreviousHidden) fetch<kStored>(d_.output + row_prev * d_.output_stride + u);
      if constexpr (Cell::kHasCellState)
        fetch<kVectors>(d_.saved + (row_prev * Cell::kSaved + Cell::kSavedCell) * H_ + u);
    }
  }

  // The cell itself, for the n units from u on of row b.
  template <class Count>
  FRNN_HD void finish_unit(int64_t s, int64_t b, int64_t u, Count n, V dh) const {
    const int64_t row = scan_.offset(s) + b;
    V saved[Cell::kSaved + 1], output(T(0)), h_prev(T(0)), c_prev(T(0)), carry(T(0)), grads[Cell::kGateGrads];
    for (int k = 0; k < Cell::kSaved; ++k) saved[k] = load(d_.saved + (row * Cell::kSaved + k) * H_ + u, n);
    if constexpr (Cell::kGradReadsOutput) output = load(d_.output + row * d_.output_stride + u, n);
    const bool anew = starts_anew(row), continued = !anew && b < scan_.continued(s);
    const int64_t row_prev = continued ? scan_.offset(s - 1) + b : 0;
    if constexpr (Cell::kReadsPreviousHidden) {
      if (continued)
        h_prev = load(d_.output + row_prev * d_.output_stride + u, n);
      else if (d_.h0 && !anew)
        h_prev = load(d_.h0 + b * Hr_ + u, n);
    }
    if constexpr (Cell::kHasCellState) {
      if (continued)
        c_prev = load(d_.saved + (row_prev * Cell::kSaved + Cell::kSavedCell) * H_ + u, n);
      else if (d_.c0 && !anew)
        c_prev = load(d_.c0 + b * H_ + u, n);
    }
    if constexpr (Cell::kHasCarry) carry = load(d_.carry + b * H_ + u, n);
    Cell::step_grad(saved, output, h_prev, c_prev, dh, carry, grads);
    if constexpr (Cell::kHasCarry) {
      if (d_.adds_carry) carry = carry + load(d_.adds_carry + row * H_ + u, n);
      store(d_.carry + b * H_ + u, anew ? V(T(0)) : carry, n);
    }
    if (d_.adds_gates)
      for (int g = 0; g < Cell::kGateGrads; ++g)
        grads[g] = grads[g] + load(d_.adds_gates + (row * Cell::kGateGrads + g) * H_ + u, n);
    for (int g = 0; g < Cell::kGateGrads; ++g)
      store(d_.dgates + row * dgates_stride_ + g * H_ + u, grads[g], n);
  }

 private:
  FRNN_HD bool starts_anew(int64_t row) const { return d_.reset && d_.reset[row]; }

  const Shape& shape_;
  const BackwardDirection<S>& d_;
  const int64_t H_, Hr_, dgates_stride_;
  const Scan scan_;
};

template <class Cell, class T>
class BackwardDirectionScan {
  using Units = BackwardUnits<Cell, T>;
  using V = Vec<T>;
  static constexpr int kVectors = Units::kVectors, kUnits = Units::kUnits;
  static constexpr int kTileRows = tile_rows(kVectors);

 public:
  BackwardDirectionScan(const Shape& shape, const BackwardDirection<T>& d, const CpuPlan& plan)
      : shape_(shape), d_(d), plan_(plan), units_(shape, d), scan_{shape, d.reverse}, H_(shape.H),
        Hr_(shape.Hr()), recurrent_(d.w_hh, Cell::kGates * H_, Hr_, plan.direct || shape.T == 1),
        projection_(d.w_hr, shape.P, H_, plan.direct), zeros_(Cell::kGateGrads * H_) {
    memset(zeros_.get(), 0, Cell::kGateGrads * H_ * sizeof(T));
  }

  void run(const Member& member, Barrier* everybody) {
    const Range state_panels = share_of(recurrent_.panels(), member.unit_group, plan_.unit_groups);
    const Range unit_panels =
        shape_.P ? share_of(projection_.panels(), member.unit_group, plan_.unit_groups) : state_panels;
    const Tiles tiles = tiles_of(shape_, kTileRows, member, plan_);
    pack_share(recurrent_, state_panels, member, plan_);
    if (shape_.P) pack_share(projection_, unit_panels, member, plan_);
    if (plan_.row_groups > 1) everybody->wait(plan_.threads());

    for (int64_t s = shape_.T - 1; s >= 0; --s) {
      each_panel(state_panels, s, [&](int64_t panel) {
        tiles.each(scan_.rows(s), [&](int64_t b, int rows) { state_tile(s, panel, b, rows); });
      });
      if (shape_.P) {
        member.barrier->wait(plan_.unit_groups);  // the units read the whole gradient of the projected state
        each_panel(unit_panels, s, [&](int64_t panel) {
          tiles.each(scan_.rows(s), [&](int64_t b, int rows) { projection_tile(s, panel, b, rows); });
        });
      }
      member.barrier->wait(plan_.unit_groups);  // step s - 1 reads the dgates of every unit
    }
    if (d_.dh0)
      each_panel(state_panels, 1, [&](int64_t panel) {
        tiles.each(shape_.B, [&](int64_t b, int rows) { initial_state_tile(panel, b, rows); });
      });
  }

 private:
  void state_tile(int64_t s, int64_t panel, int64_t b0, int rows) {
    const int64_t continuing = scan_.continuing(s);
    const T* later[kMaxTileRows];
    for (int r = 0; r < rows; ++r)
      later[r] = b0 + r < continuing ? units_.flowing_back(scan_.offset(s + 1) + b0 + r, zeros_.get())
                                     : zeros_.get();
    alignas(64) T acc[kTileRows * kUnits];
    if (b0 < continuing)
      // By gates, with a part of the requests before each: all at once would be more than a core keeps under way.
      for (int g = 0; g < Cell::kGates; ++g) {
        if (!shape_.P)
          units_.fetch_units(s, panel * kUnits, b0 + rows * g / Cell::kGates,
                             b0 + rows * (g + 1) / Cell::kGates);
        recurrent_.multiply(later, rows, g * H_, H_, panel, acc);
        for (int r = 0; r < rows; ++r) later[r] += H_;
      }
    else
      memset(acc, 0, sizeof acc);
    units_.each_vector(panel, Hr_, rows, acc,
                       [&](int r, int64_t u, auto n, V dh) { units_.finish_state(s, b0 + r, u, n, dh); });
  }

  void projection_tile(int64_t s, int64_t panel, int64_t b0, int rows) {
    const T* dproj[kMaxTileRows];
    for (int r = 0; r < rows; ++r) dproj[r] = d_.dh + (scan_.offset(s) + b0 + r) * shape_.P;
    alignas(64) T acc[kTileRows * kUnits];
    projection_.multiply(dproj, rows, panel, acc);
    units_.each_vector(panel, H_, rows, acc,
                       [&](int r, int64_t u, auto n, V dh) { units_.finish_unit(s, b0 + r, u, n, dh); });
  }

  void initial_state_tile(int64_t panel, int64_t b0, int rows) {
    const T* first[kMaxTileRows];
    for (int r = 0; r < rows; ++r) first[r] = units_.flowing_back(scan_.first_row(b0 + r), zeros_.get());
    alignas(64) T acc[kTileRows * kUnits];
    recurrent_.multiply(first, rows, panel, acc);
    units_.each_vector(panel, Hr_, rows, acc, [&](int r, int64_t u, auto n, V dh) {
      units_.finish_initial_state(b0 + r, u, n, dh);
    });
  }

  const Shape& shape_;
  const BackwardDirection<T>& d_;
  const CpuPlan& plan_;
  const Units units_;
  const Scan scan_;
  const int64_t H_, Hr_;
  ColumnWeights<T, kVectors> recurrent_, projection_;
  Buffer<T> zeros_;  // [kGateGrads * H], stands for the dgates of a step that is not there or starts anew
};

}  // namespace FRNN_ISA
}  // namespace frnn
