// Problem -> Plan: which kernels run one pass of a layer on a GPU. A pure function, the same on machines without one;
// shown to users by `fused-rnn-bench explain`.
#pragma once

#include <stdint.h>

#include "../cells/cells.h"
#include "device.h"
#include "persistent.h"

namespace frnn {

enum class CudaDtype { fp32, tf32, fp64, fp16, bf16 };  // fp32: IEEE products

struct CudaDtypeName {
  const char* name;
  CudaDtype dtype;
};
constexpr CudaDtypeName kCudaDtypeNames[] = {{"fp32", CudaDtype::fp32},
                                             {"tf32", CudaDtype::tf32},
                                             {"fp64", CudaDtype::fp64},
                                             {"fp16", CudaDtype::fp16},
                                             {"bf16", CudaDtype::bf16}};

// A GPU, as far as a plan depends on it.
struct CudaGpu {
  int arch;  // 90: sm_90
  int multiprocessors;
  int64_t shared_bytes;  // the most that a block may ask for
  int64_t l2_bytes;
  int64_t memory_bytes;
};
inline CudaGpu gpu_of(const CudaDevice& device) {
  return {10 * device.major + device.minor, device.multiprocessors, device.shared_memory_per_block,
          device.l2_bytes, device.memory_bytes};
}
// One that has this architecture, for plans without a GPU.
CudaGpu typical_gpu(int arch);

struct CudaProblem {
  CellKind cell;
  CudaDtype dtype;
  Pass pass;
  bool training;  // the forward pass saves for the backward pass
  bool packed;    // rows of different lengths
  int64_t T, B, I, H, P, D;
  CudaGpu gpu;
};

enum class Strategy {
  step_fused,  // one launch a time step, which multiplies as well
  step,        // a matrix product and a pointwise launch a time step
  // One launch for all steps, by the way in which blocks exchange h_t (persistent.h).
  block,
  cluster,
  grid,
  persistent,  // asked for only: whichever of these three costs the least
};

struct StrategyName {
  const char* name;
  Strategy strategy;
};

// The names under which Python knows the strategies.
constexpr StrategyName kStrategyNames[] = {
    {"step_fused", Strategy::step_fused}, {"step", Strategy::step}, {"block", Strategy::block},
    {"cluster", Strategy::cluster},       {"grid", Strategy::grid}, {"persistent", Strategy::persistent},
};
const char* strategy_name(Strategy strategy);
inline bool is_persistent(Strategy strategy) {
  return strategy != Strategy::step && strategy != Strategy::step_fused;
}

// Modelled time in ns: of every step, and of the pass besides its steps.
struct CudaCost {
  double step, once;
  double total(int64_t T) const { return once + step * static_cast<double>(T); }
};

struct CudaPlan {
  Strategy strategy;
  Tile tile;  // of the persistent strategies
  CudaCost cost;
  bool fuse_input;      // the kernel multiplies the input too
  int64_t chunk_steps;  // forward, otherwise: products over so many steps at a time, and a launch for each
  const char* why;
  const char*
      obstacle;  // why none of the persistent strategies; null: one was chosen, or others were asked for
};

// Forward and backward passes are planned apart: each can follow any other.
CudaPlan plan_cuda(const CudaProblem& problem);
// The same without the persistent strategies.
CudaPlan plan_steps(const CudaProblem& problem);

// Makes plan_cuda choose this strategy wherever it can run, in the whole process, until it is given null. For tests and
// benchmarks.
void force_strategy(const Strategy* strategy);
const Strategy* forced_strategy();

}  // namespace frnn
