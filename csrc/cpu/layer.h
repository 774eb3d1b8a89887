// One call of a scan: its plan, its directions and the team of threads that runs them.
#pragma once

#include "forward.h"
#include "kernels.h"
#include "lanes.h"

namespace frnn {
inline namespace FRNN_ISA {

// The two directions of a layer and the team that runs them.
template <class DirectionScan, class Args>
struct LayerScan {
  DirectionScan* directions[2];
  const Args& args;
  const CpuPlan& plan;
  Barrier barriers[kMaxThreads + 1];

  static void work(void* context, int rank) {
    auto& self = *static_cast<LayerScan*>(context);
    const FlushDenormals flush;
    const Member member = member_of(self.plan, rank, self.barriers + 1);
    for (int d = member.direction_group; d < self.args.shape.D; d += self.plan.direction_groups)
      self.directions[d]->run(member, self.barriers);
  }
};

template <class DirectionScan, class Args>
void run_layer(const Args& args, CpuProblem problem) {
  for (problem.threads = available_threads(smallest(args.threads, kMaxThreads));; problem.threads = 1) {
    const CpuPlan plan = plan_cpu(problem);
    DirectionScan first(args.shape, args.direction[0], plan);
    // What std::optional would do; its functions may not be instantiated here.
    alignas(DirectionScan) char second_memory[sizeof(DirectionScan)];
    DirectionScan* second = nullptr;
    if (args.shape.D == 2) second = new (second_memory) DirectionScan(args.shape, args.direction[1], plan);
    LayerScan<DirectionScan, Args> layer{{&first, second}, args, plan, {}};
    const bool done = run_team(plan.threads(), &LayerScan<DirectionScan, Args>::work, &layer);
    if (second) second->~DirectionScan();
    if (done) return;
  }
}

template <class Cell, class S>
CpuProblem forward_problem(const Shape& shape, int threads) {
  CpuProblem p = problem_of<S>(shape, Cell::kGates, panel_vectors<Cell>(), threads);
  p.in_lanes = takes_lanes<S>(shape);
  if (p.in_lanes) p.tile_rows = LaneProducts<Accumulate<S>>::kRowLanes;
  return p;
}

template <class S>
void forward(CellKind kind, const ForwardArgs<S>& args) {
  with_cell(kind, [&](auto cell) {
    using Cell = decltype(cell);
    const CpuProblem problem = forward_problem<Cell, S>(args.shape, args.threads);
    if constexpr (kDepth<S> == 1)
      if (problem.in_lanes)
        return run_layer<ForwardDirectionScan<Cell, S, LaneProducts<S>, LaneProducts<S>>>(args, problem);
    run_layer<ForwardDirectionScan<Cell, S>>(args, problem);
  });
}

template <class S>
CpuProblem problem(CellKind kind, const Shape& shape, int threads, bool training) {
  return with_cell(kind, [&](auto cell) {
    using Cell = decltype(cell);
    return training ? problem_of<S>(shape, Cell::kGates, 2, threads)
                    : forward_problem<Cell, S>(shape, threads);
  });
}

}  // namespace FRNN_ISA
}  // namespace frnn
