// What a second derivative adds to a backward scan. The gradients of the gates are linear in what arrives from the step
// after: how they change in a given direction is a backward scan once more, with what each step adds by itself, through
// the changes of what the forward scan saved. That is found here, with the cells on csrc/cells/dual.h and without a
// product; backward.h carries it on.
#pragma once

#include "tangent.h"

namespace frnn {
inline namespace FRNN_ISA {

template <class Cell, class T>
class DualBackwardDirectionScan {
  static constexpr int kVectors = 2, kSize = Vec<T>::kSize, kUnits = kVectors * kSize;
  using V = Vec<T>;
  using D = Dual<V>;

 public:
  DualBackwardDirectionScan(const Shape& shape, const DualBackwardDirection<T>& d, const CpuPlan& plan)
      : d_(d), f_(d.forward), plan_(plan), B_(shape.B), H_(shape.H), Hr_(shape.Hr()),
        grads_(Cell::kGateGrads * H_), scan_{shape, f_.reverse} {}

  // Units meet only themselves, in the steps after: nobody waits.
  void run(const Member& member, Barrier*) const {
    const Range panels = share_of(divide_up(H_, kUnits), member.unit_group, plan_.unit_groups);
    const Tiles tiles = tiles_of(scan_.shape, kMaxTileRows, member, plan_);
    const int64_t first = panels.first * kUnits, last = smallest(panels.last * kUnits, H_);
    for (int64_t s = scan_.shape.T - 1; s >= 0; --s)
      tiles.each(scan_.rows(s), [&](int64_t b0, int rows) {
        for (int64_t b = b0; b < b0 + rows; ++b)
          for (int64_t u = first; u < last; u += kSize) {
            if (b + 1 < b0 + rows) fetch_unit(scan_.offset(s) + b + 1, u);
            with_count<kSize>(last - u, [&](auto n) { finish_unit(s, b, scan_.offset(s) + b, u, n); });
          }
      });
  }

 private:
  // Asks for what finish_unit reads and writes of a row, as BackwardUnits does.
  FRNN_HD void fetch_unit(int64_t row, int64_t u) const {
    for (int k = 0; k < Cell::kSaved; ++k) {
      fetch<1>(f_.saved + (row * Cell::kSaved + k) * H_ + u);
      fetch<1>(static_cast<const T*>(f_.saved_tangent) + (row * Cell::kSaved + k) * H_ + u);
    }
    for (int g = 0; g < Cell::kGateGrads; ++g) {
      fetch<1>(d_.dgates + row * grads_ + g * H_ + u);
      fetch<1>(d_.dgates_change + row * grads_ + g * H_ + u);
    }
    fetch<1>(d_.dh + row * H_ + u);
    if constexpr (Cell::kHasCarry) fetch<1>(d_.carry_change + row * H_ + u);
  }

  template <class Count>
  FRNN_HD void finish_unit(int64_t s, int64_t b, int64_t row, int64_t u, Count n) const {
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
    if constexpr (Cell::kHasCarry) carry.value = load(d_.carry + b * H_ + u, n);
    const D dh = load_dual(d_.dh + row * H_ + u, offset_or_null(d_.dh_change, row * H_ + u), n);
    Cell::step_grad(saved, output, h_prev, c_prev, dh, carry, grads);
    if constexpr (Cell::kHasCarry) {
      store(d_.carry + b * H_ + u, carry.value, n);
      store(d_.carry_change + row * H_ + u, carry.tangent, n);
    }
    for (int g = 0; g < Cell::kGateGrads; ++g) {
      store(d_.dgates + row * grads_ + g * H_ + u, grads[g].value, n);
      store(d_.dgates_change + row * grads_ + g * H_ + u, grads[g].tangent, n);
    }
  }

  const DualBackwardDirection<T>& d_;
  const TangentDirection<T>& f_;
  const CpuPlan& plan_;
  const int64_t B_, H_, Hr_, grads_;
  const Scan scan_;
};

}  // namespace FRNN_ISA
}  // namespace frnn
