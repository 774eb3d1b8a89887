// Problem -> Plan: which kernels run a layer on a GPU. A pure function, the same on machines without one; shown to
// users by `fused-rnn-bench explain`.
#pragma once

#include <stdint.h>

namespace frnn {

struct CudaProblem {
  int64_t T, B, I, H, P, D;
  int gates;            // of the cell
  int accumulate_size;  // bytes of a number that sums are kept in
};

enum class Strategy {
  step_fused,  // one launch a time step, which multiplies as well
  step,        // a matrix product and a pointwise launch a time step
};

struct StrategyName {
  const char* name;
  Strategy strategy;
};

// The names under which Python knows the strategies.
constexpr StrategyName kStrategyNames[] = {
    {"step_fused", Strategy::step_fused},
    {"step", Strategy::step},
};
const char* strategy_name(Strategy strategy);

struct CudaPlan {
  Strategy strategy;
  bool
      fuse_input;  // the kernel multiplies the input too; otherwise products over `chunk_steps` steps at a time
  int64_t chunk_steps;  // 0 with fuse_input
  const char* why;
};

// The forward pass of one layer. The backward pass is always "step".
CudaPlan plan_cuda(const CudaProblem& problem);

// Makes plan_cuda choose this strategy wherever it can run, in the whole process, until it is given null. For tests and
// benchmarks.
void force_strategy(const Strategy* strategy);
const Strategy* forced_strategy();

}  // namespace frnn
