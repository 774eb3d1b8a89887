// The choice of a plan, with its constants and where they come from. What each strategy costs is in cost.cpp.
#include "plan.h"

#include <algorithm>
#include <atomic>

#include "cost.h"

namespace frnn {
namespace {

// How many times faster than steps a persistent kernel must be by the model. The model's constants are published latencies
// of one architecture and estimates (cost.cpp): none has been measured with these kernels, and a factor of 1.5 is as far as
// they may well be off. Measurements lower it, to 1 in the end.
constexpr double kMargin = 1.5;

// Up to this many rows a matrix product is a handful of dot products a weight, bound by reading the weights, and the
// fused kernel reads them once (step_fused.cuh takes as many rows at a time). Not yet measured on a GPU.
constexpr int64_t kFusedRows = 8;

// The input's product over all steps would need [N, G*H] numbers of memory at once. In chunks of this size they stay in
// the L2 of a data-centre GPU (40 MB and more) until the steps read them; a chunk still holds thousands of rows.
constexpr int64_t kChunkBytes = 24 << 20;
// A persistent kernel loads its weights anew for each chunk, which takes as long as some ten steps, and it reads gates_x a
// step ahead: its chunks are longer, of a hundred steps and more. They may take this share of the GPU's memory.
constexpr int64_t kPersistentChunkShare = 1024;

std::atomic<const Strategy*> forced{nullptr};

int64_t chunk_steps(const CudaProblem& p, int64_t bytes) {
  const int64_t step = std::max<int64_t>(1, p.D * p.B * gates_of(p) * p.H * accumulate_bytes_of(p.dtype));
  return std::clamp<int64_t>(bytes / step, 1, p.T);
}

// -------------------------------------------------------------------------------------------------- persistent

// Why no persistent kernel can run this, whatever the tile; null if one may.
const char* obstacle(const CudaProblem& p) {
  if (p.P > 0) return "a projection is not built into the persistent kernels";
  if (p.dtype == CudaDtype::fp64) return "the persistent kernels know no float64";
  if (p.gpu.arch < 80) return "the persistent kernels are for sm_80 and newer";
  return nullptr;
}

// Blocks of a cluster. Eight are what CUDA promises; the data-centre GPUs run sixteen for a kernel that asks.
int64_t largest_cluster(int arch) { return arch < 90 ? 0 : arch < 120 ? 16 : 8; }

bool fits(const CudaProblem& p, const Tile& tile) {
  const int size = bytes_of(p.dtype);
  if (p.H > tile_reach(tile.k_groups, tile.exchange, size)) return false;
  if (tile.exchange == Exchange::cluster && tile_blocks(tile, p.H) > largest_cluster(p.gpu.arch))
    return false;
  if (tile_shared_bytes(p.pass, gates_of(p), size, tile, p.H) > p.gpu.shared_bytes) return false;
  // A multiprocessor has room for one block: 256 threads and nearly all of its registers.
  return tile.exchange != Exchange::grid ||
         tile_replicas(tile, p.B) * p.D * tile_blocks(tile, p.H) <= p.gpu.multiprocessors;
}

Strategy strategy_of(Exchange exchange) {
  return exchange == Exchange::block     ? Strategy::block
         : exchange == Exchange::cluster ? Strategy::cluster
                                         : Strategy::grid;
}

struct Best {
  bool found;
  Strategy strategy;
  Tile tile;
  CudaCost cost;
  int64_t chunk_steps;
};

// The persistent kernel that costs the least, of one strategy or, for Strategy::persistent, of all.
Best best_persistent(const CudaProblem& p, Strategy wish) {
  Best best{};
  const int64_t chunk =
      p.pass == Pass::forward ? chunk_steps(p, p.gpu.memory_bytes / kPersistentChunkShare) : p.T;
  for (const Exchange exchange : {Exchange::block, Exchange::cluster, Exchange::grid}) {
    const Strategy strategy = strategy_of(exchange);
    if (wish != Strategy::persistent && wish != strategy) continue;
    for (int k_groups = 1; k_groups <= kTileWarps; k_groups *= 2)
      for (int columns = 1; columns <= most_columns(k_groups); ++columns) {
        const Tile tile{k_groups, columns, exchange};
        const bool exact = p.dtype == CudaDtype::fp32;
        if (!tile_exists(tile, p.gpu.arch, exact) || !fits(p, tile)) continue;
        const CudaCost cost = cost_of_tile(p, tile, (p.T + chunk - 1) / chunk);
        if (best.found && best.cost.total(p.T) <= cost.total(p.T)) continue;
        best = {true, strategy, tile, cost, chunk};
      }
  }
  return best;
}

void use(CudaPlan& plan, const Best& best, const char* why) {
  plan.strategy = best.strategy;
  plan.tile = best.tile;
  plan.cost = best.cost;
  plan.fuse_input = false;
  plan.chunk_steps = best.chunk_steps;
  plan.why = why;
}

}  // namespace

const char* strategy_name(Strategy strategy) {
  for (const StrategyName& known : kStrategyNames)
    if (known.strategy == strategy) return known.name;
  return "?";
}

void force_strategy(const Strategy* strategy) { forced.store(strategy); }
const Strategy* forced_strategy() { return forced.load(); }

CudaPlan plan_steps(const CudaProblem& p) {
  CudaPlan plan{};
  const Strategy* wish = forced.load();
  plan.strategy = Strategy::step;
  if (p.pass == Pass::backward) {
    plan.why = "a backward step is a pointwise kernel and a matrix product";
  } else if (p.P > 0) {
    plan.why = "the projection needs a product of its own each step";
  } else if (wish && !is_persistent(*wish)) {
    plan.strategy = *wish;
    plan.why = "asked for";
  } else if (p.B <= kFusedRows) {
    plan.strategy = Strategy::step_fused;
    plan.why = "few rows: bound by reading the weights once a step, in one launch";
  } else {
    plan.why = "enough rows for a matrix product";
  }
  plan.fuse_input = plan.strategy == Strategy::step_fused && p.T == 1;
  if (p.pass == Pass::forward && !plan.fuse_input) plan.chunk_steps = chunk_steps(p, kChunkBytes);
  plan.cost = cost_of_steps(p, plan.strategy);
  return plan;
}

CudaPlan plan_cuda(const CudaProblem& p) {
  CudaPlan plan = plan_steps(p);
  const Strategy* asked = forced.load();
  if (asked && !is_persistent(*asked)) return plan;
  plan.obstacle = obstacle(p);
  if (plan.obstacle) return plan;
  const Best best = best_persistent(p, asked ? *asked : Strategy::persistent);
  if (!best.found) {
    plan.obstacle = "the blocks of this GPU cannot hold the weights and the rows";
  } else if (asked) {
    use(plan, best, "asked for");
  } else if (kMargin * best.cost.total(p.T) > plan.cost.total(p.T)) {
    plan.obstacle = kMargin * best.cost.step < plan.cost.step
                        ? "too few steps to pay for loading the weights"
                        : "a step of a persistent kernel is not expected to be 1.5 times as fast";
  } else {
    use(plan, best, "the weights stay on the chip for all steps; its first use is checked against steps");
  }
  return plan;
}

}  // namespace frnn
