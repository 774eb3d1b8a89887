// The choice of a plan, with its constants and where they come from.
#include "plan.h"

namespace frnn {
namespace {

// Packing reads and writes the weights once. Where they are read as they lie, each sum of a row runs across a vector at its
// end, as much for a short row of weights as for a long one; and the few rows of a step wait for one another as two more
// would. Measured on Zen 5 (float32, LSTM and GRU, inference): with AVX-512 both ways take the same time at T (B + 2) of 20,
// 35, 52, 85 and 150 for rows of 64, 128, 256, 512 and 1024 numbers, give or take a third; with AVX2 a little below.
constexpr int64_t kDirectSteps = 8, kDirectBytesOfRow = 32;

// Waking a team costs 1 us on an idle machine and much more on a busy one; 262,144 multiply-adds take a core 10 us.
constexpr int64_t kTeamWork = 1 << 18;

// A barrier costs about 0.15 us; below this many multiply-adds a step and thread (about 0.2 us) it is not repaid.
constexpr int64_t kBarrierWork = 1 << 13;

// Weights up to this size stay in a core's own L2 (1 to 2 MB) next to the rest; then every thread can hold all of
// them and take rows of its own without a barrier.
constexpr int64_t kSharedWeightBytes = 512 << 10;

int64_t at_least_1(int64_t x) { return x > 1 ? x : 1; }
int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace

CpuPlan plan_cpu(const CpuProblem& p) {
  const int64_t Hr = p.P > 0 ? p.P : p.H;
  const bool direct =
      p.in_lanes || p.T * (p.B + 2) < kDirectSteps + (p.I + Hr) / 2 * p.itemsize / kDirectBytesOfRow;
  const int64_t of_input = p.gates * p.H * p.I, of_state = p.gates * p.H * Hr + p.P * p.H;
  const int64_t weights = of_input + of_state, step = p.B * of_state;
  if (p.threads <= 1 || p.T * p.B * weights * p.D < kTeamWork)
    return {direct, 1, 1, 1, p.threads <= 1 ? "one thread available" : "less work than waking a team costs"};

  const int64_t sides = smaller(p.D, p.threads);
  const int64_t members = p.threads / sides;
  const int64_t panels = (p.H + p.units_per_panel - 1) / p.units_per_panel;
  const int64_t tiles = (p.B + p.tile_rows - 1) / p.tile_rows;
  if (members == 1) return {direct, static_cast<int>(sides), 1, 1, "one direction a thread"};

  if (weights * p.itemsize <= kSharedWeightBytes && tiles >= members)
    return {direct, static_cast<int>(sides), 1, static_cast<int>(members),
            "weights fit every core's L2: rows are split, no barrier"};

  const int64_t unit_groups = smaller(smaller(members, panels), at_least_1(step / kBarrierWork));
  const int64_t row_groups = smaller(members / unit_groups, tiles);
  return {direct, static_cast<int>(sides), static_cast<int>(unit_groups), static_cast<int>(row_groups),
          unit_groups > 1 ? "units are split: each thread's weights stay in its own L2, one barrier a step"
                          : "a step is too small to split its units"};
}

}  // namespace frnn
