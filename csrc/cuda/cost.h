// What a pass of a layer is modelled to cost on a GPU. Nanoseconds; all constants and their sources are in cost.cpp.
#pragma once

#include "plan.h"

namespace frnn {

int gates_of(const CudaProblem& p);
int bytes_of(CudaDtype dtype);             // of a stored number
int accumulate_bytes_of(CudaDtype dtype);  // of a number that sums are kept in

CudaCost cost_of_steps(const CudaProblem& p, Strategy strategy);
// In so many launches.
CudaCost cost_of_tile(const CudaProblem& p, const Tile& tile, int64_t launches);

// The least that a step can cost by the latencies and bandwidths alone, however the multiprocessors share the weights
// and the rows: what a tile is measured by. Slow, for explanations.
double floor_of_step(const CudaProblem& p);

}  // namespace frnn
