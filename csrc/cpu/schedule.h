// Who does what, when: the order of the steps in each direction, and each thread's share of units and rows.
#pragma once

#include "../args.h"
#include "plan.h"
#include "product.h"
#include "team.h"

namespace frnn {
inline namespace FRNN_ISA {

FRNN_HD int64_t smallest(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr FRNN_HD int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The steps of one direction in the order of its scan.
struct Scan {
  const Shape& shape;
  bool reverse;

  int64_t step(int64_t s) const { return reverse ? shape.T - 1 - s : s; }
  int64_t rows(int64_t s) const { return shape.batch_sizes[step(s)]; }
  int64_t offset(int64_t s) const { return shape.offsets[step(s)]; }
  // Rows of the s-th step that were there a step earlier in the scan; the others start from h0.
  int64_t continued(int64_t s) const { return s == 0 ? 0 : smallest(rows(s), rows(s - 1)); }
  // Rows of the s-th step that go on in the next; the others end and leave h_n.
  int64_t continuing(int64_t s) const { return s == shape.T - 1 ? 0 : smallest(rows(s), rows(s + 1)); }
  // Row of the packed buffers where row b of the batch starts.
  int64_t first_row(int64_t b) const { return shape.offsets[reverse ? shape.lengths[b] - 1 : 0] + b; }
};

struct Range {
  int64_t first, last;  // last is excluded
};

FRNN_HD Range share_of(int64_t count, int group, int groups) {
  return {count * group / groups, count * (group + 1) / groups};
}

// The part of one thread of the team.
struct Member {
  int direction_group, row_group, unit_group;
  Barrier* barrier;  // where the unit groups of this direction and row group meet
};

FRNN_HD Member member_of(const CpuPlan& plan, int rank, Barrier* barriers) {
  const int unit_group = rank % plan.unit_groups;
  const int other = rank / plan.unit_groups;
  return {other / plan.row_groups, other % plan.row_groups, unit_group, barriers + other};
}

// Rows of a batch cut into tiles of nearly equal height, at most kRows each, dealt out to the row groups there and back
// again: packed rows are sorted by length, and whoever gets the longer of two neighbours gets the shorter of the next.
struct Tiles {
  int64_t B, count;
  int group, groups;

  Tiles(int64_t B_, int most_rows, int group_, int groups_) : B(B_), group(group_), groups(groups_) {
    count = smallest(divide_up(divide_up(B, most_rows), groups) * groups, B);
  }
  int64_t first(int64_t i) const { return B * i / count; }
  // The tile that this group gets in the given turn, none if that is `count` or more.
  int64_t tile(int64_t turn) const { return turn * groups + (turn % 2 ? groups - 1 - group : group); }
  // Of tile i, cut off after `rows_now` rows: perhaps none.
  Range rows(int64_t i, int64_t rows_now) const { return {first(i), smallest(first(i + 1), rows_now)}; }

  // f(first row, rows) for this group's tiles, cut off after `rows_now` rows.
  template <class F>
  FRNN_HD void each(int64_t rows_now, F&& f) const {
    for (int64_t turn = 0; tile(turn) < count; ++turn) {
      const Range r = rows(tile(turn), rows_now);
      if (r.first >= r.last) return;
      f(r.first, static_cast<int>(r.last - r.first));
    }
  }
};

// Those of a batch. Where sequences end at different steps each group gets two, one of longer and one of shorter ones, if
// that leaves them rows enough to hide the latency of a multiply-add.
inline Tiles tiles_of(const Shape& s, int most_rows, const Member& member, const CpuPlan& plan) {
  Tiles tiles(s.B, most_rows, member.row_group, plan.row_groups);
  const bool ragged = s.N < s.T * s.B;
  if (ragged && tiles.count == tiles.groups && s.B >= 8 * tiles.groups) tiles.count = 2 * tiles.groups;
  return tiles;
}

}  // namespace FRNN_ISA
}  // namespace frnn
