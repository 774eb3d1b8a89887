// The forward scan of forward.h for float on AMX: rows and weights in parts (amx_split.h). Without a projection, and
// with the input multiplied step by step.
#pragma once

#include "../cells/cells.h"
#include "amx_split.h"
#include "forward.h"

namespace frnn {
inline namespace FRNN_ISA {

struct SplitDirection : ForwardDirection<float> {
  int parts;  // of a number: 3, or 2 for less accuracy
};

template <class Cell>
class SplitForwardScan {
  static constexpr int kGates = Cell::kGates, kVectors = panel_vectors<Cell>(), kUnits = kVectors * 16;
  static constexpr int kTileRows = 2 * kAmxRows;
  // As in ForwardDirectionScan: a gate adds up its two sides.
  static constexpr bool kOneSum = Cell::kGateGrads == kGates;
  using V = Vec<float>;

  // Rows that pass all panels together: what they hold in parts stays in L2 beside a panel.
  static constexpr int kBlockTiles = 4;
  struct Tile {
    int64_t b0;
    int rows;
    bool zero;  // the state before is zero
    const float *h[kTileRows], *x[kTileRows];
    SplitRows h_split, x_split;
  };

 public:
  SplitForwardScan(const Shape& shape, const SplitDirection& d, const CpuPlan& plan)
      : shape_(shape), d_(d), plan_(plan), H_(shape.H), scan_{shape, d.reverse},
        recurrent_(d.w_hh, H_, H_, d.parts), input_(d.w_ih, H_, shape.I, d.parts), zeros_(H_) {
    memset(zeros_.get(), 0, H_ * sizeof(float));
  }

  void run(const Member& member, Barrier* everybody) {
    const AmxSession session;
    const Range panels = share_of(recurrent_.panels(), member.unit_group, plan_.unit_groups);
    const Tiles tiles(shape_.B, kTileRows, member.row_group, plan_.row_groups);
    pack_share(recurrent_, panels, member, plan_);
    pack_share(input_, panels, member, plan_);
    if (plan_.row_groups > 1) everybody->wait(plan_.threads());

    const int64_t h_size = SplitRows::size(H_, d_.parts), x_size = SplitRows::size(shape_.I, d_.parts);
    const Buffer<BFloat16> parts(kBlockTiles * (h_size + x_size));
    for (int64_t s = 0; s < shape_.T; ++s) {
      Tile block[kBlockTiles];
      int count = 0;
      const auto finish_block = [&] {
        each_panel(panels, s, [&](int64_t panel) {
          for (int i = 0; i < count; ++i) gates_tile(s, panel, block[i]);
        });
        count = 0;
      };
      tiles.each(scan_.rows(s), [&](int64_t b0, int rows) {
        split_tile(s, b0, rows, parts.get() + count * (h_size + x_size), h_size, block[count]);
        if (++count == kBlockTiles) finish_block();
      });
      finish_block();
      member.barrier->wait(plan_.unit_groups);  // the next step reads every unit of h_t
    }
  }

 private:
  // Each member splits all of its rows: with few members that is less than another barrier.
  void split_tile(int64_t s, int64_t b0, int rows, BFloat16* memory, int64_t h_size, Tile& tile) {
    const int64_t continued = scan_.continued(s), row0 = scan_.offset(s) + b0;
    tile.b0 = b0, tile.rows = rows;
    tile.zero = !d_.h0 && b0 >= continued;
    for (int r = 0; r < rows; ++r) {
      const int64_t b = b0 + r;
      tile.h[r] = b < continued ? d_.output + (scan_.offset(s - 1) + b) * d_.output_stride
                  : d_.h0       ? d_.h0 + b * H_
                                : zeros_.get();
      tile.x[r] = d_.x + (row0 + r) * shape_.I;
    }
    if (!tile.zero) tile.h_split.split_into(memory, tile.h, rows, H_, d_.parts);
    tile.x_split.split_into(memory + h_size, tile.x, rows, shape_.I, d_.parts);
  }

  void gates_tile(int64_t s, int64_t panel, const Tile& tile) {
    alignas(64) float from_h[kTileRows * kGates * kUnits];
    alignas(64) float from_x[kOneSum ? 1 : kTileRows * kGates * kUnits];
    if (tile.zero)
      memset(from_h, 0, sizeof from_h);
    else
      recurrent_.multiply(tile.h, tile.h_split, tile.rows, panel, from_h, false);
    input_.multiply(tile.x, tile.x_split, tile.rows, panel, kOneSum ? from_h : from_x, kOneSum);
    for (int v = 0; v < kVectors; ++v) {
      const int64_t u = panel * kUnits + v * 16;
      const int n = static_cast<int>(smallest(H_ - u, 16));
      if (n <= 0) break;
      V b_hh[kGates], b_ih[kGates];
      for (int g = 0; g < kGates; ++g) {
        b_hh[g] = d_.b_hh ? load(d_.b_hh + g * H_ + u, n) : V(0.0f);
        b_ih[g] = d_.b_ih ? load(d_.b_ih + g * H_ + u, n) : V(0.0f);
      }
      for (int r = 0; r < tile.rows; ++r) {
        V gx[kGates], gh[kGates];
        for (int g = 0; g < kGates; ++g) {
          const int64_t at = (r * kGates + g) * kUnits + v * 16;
          gh[g] = load(from_h + at) + b_hh[g];
          gx[g] = kOneSum ? b_ih[g] : load(from_x + at) + b_ih[g];
        }
        finish_unit(s, tile.b0 + r, u, n, gx, gh, tile.h[r]);
      }
    }
  }

  // The cell itself, for the n units from u on of row b.
  FRNN_HD void finish_unit(int64_t s, int64_t b, int64_t u, int n, const V* gx, const V* gh,
                           const float* h_prev) {
    const int64_t row = scan_.offset(s) + b;
    V own(0.0f), state(0.0f), saved[Cell::kSaved + 1];
    if constexpr (Cell::kReadsPreviousHidden) own = load(h_prev + u, n);
    if constexpr (Cell::kHasCellState) state = load(d_.c + b * H_ + u, n);
    const V h = Cell::step(gx, gh, own, state, saved);
    if constexpr (Cell::kHasCellState) store(d_.c + b * H_ + u, state, n);
    if (d_.saved)
      for (int k = 0; k < Cell::kSaved; ++k) store(d_.saved + (row * Cell::kSaved + k) * H_ + u, saved[k], n);
    store(d_.output + row * d_.output_stride + u, h, n);
    if (d_.hn && b >= scan_.continuing(s)) store(d_.hn + b * H_ + u, h, n);
  }

  const Shape& shape_;
  const SplitDirection& d_;
  const CpuPlan& plan_;
  const int64_t H_;
  const Scan scan_;
  SplitWeights<kGates, kVectors> recurrent_, input_;
  Buffer<float> zeros_;  // [H], the row that stands for an absent h0
};

}  // namespace FRNN_ISA
}  // namespace frnn
