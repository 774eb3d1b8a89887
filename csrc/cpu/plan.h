// Problem -> Plan: how a layer is spread over threads, and whether its weights are packed. A pure function, shown to
// users by `fused-rnn-bench explain`.
#pragma once

#include <stdint.h>

namespace frnn {

struct CpuProblem {
  int64_t T, B, I, H, P, D;
  int gates;            // of the cell
  int threads;          // available
  int units_per_panel;  // units that one packed panel covers
  int tile_rows;        // most rows that one product tile can hold
  int itemsize;         // bytes of a number
  bool in_lanes;        // rows stand side by side in vectors (lanes.h): the weights are never packed
};

struct CpuPlan {
  bool direct;           // multiply with the weights as they lie; otherwise pack them first
  int direction_groups;  // 2: the two directions run side by side
  int unit_groups;       // threads that share a direction's units and meet at a barrier each step
  int row_groups;        // groups of threads that share a direction's rows and never meet
  const char* why;
  int threads() const { return direction_groups * unit_groups * row_groups; }
};

CpuPlan plan_cpu(const CpuProblem& problem);

}  // namespace frnn
