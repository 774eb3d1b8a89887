// The choice of a plan, with its constants and where they come from.
#include "plan.h"

#include <algorithm>
#include <atomic>

namespace frnn {
namespace {

// Up to this many rows a matrix product is a handful of dot products a weight, bound by reading the weights, and the
// fused kernel reads them once (step_fused.cuh takes as many rows at a time). Not yet measured on a GPU.
constexpr int64_t kFusedRows = 8;

// The input's product over all steps would need [N, G*H] numbers of memory at once. In chunks of this size they stay in
// the L2 of a data-centre GPU (40 MB and more) until the steps read them; a chunk still holds thousands of rows.
constexpr int64_t kChunkBytes = 24 << 20;

std::atomic<const Strategy*> forced{nullptr};

}  // namespace

const char* strategy_name(Strategy strategy) {
  for (const StrategyName& known : kStrategyNames)
    if (known.strategy == strategy) return known.name;
  return "?";
}

void force_strategy(const Strategy* strategy) { forced.store(strategy); }
const Strategy* forced_strategy() { return forced.load(); }

CudaPlan plan_cuda(const CudaProblem& p) {
  CudaPlan plan{};
  const bool can_fuse = p.P == 0;
  const Strategy* wish = forced.load();
  if (!can_fuse) {
    plan.strategy = Strategy::step;
    plan.why = "the projection needs a product of its own each step";
  } else if (wish) {
    plan.strategy = *wish;
    plan.why = "asked for";
  } else if (p.B <= kFusedRows) {
    plan.strategy = Strategy::step_fused;
    plan.why = "few rows: bound by reading the weights once a step, in one launch";
  } else {
    plan.strategy = Strategy::step;
    plan.why = "enough rows for a matrix product";
  }
  plan.fuse_input = plan.strategy == Strategy::step_fused && p.T == 1;
  if (!plan.fuse_input) {
    const int64_t step_bytes = std::max<int64_t>(1, p.D * p.B * p.gates * p.H * p.accumulate_size);
    plan.chunk_steps = std::clamp<int64_t>(kChunkBytes / step_bytes, 1, p.T);
  }
  return plan;
}

}  // namespace frnn
