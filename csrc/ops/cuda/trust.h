// Which persistent kernels may run. They are proven by emulation, which cannot show that a wait ends on real hardware, nor
// that its memory is ordered as the model says. So the first time that one would run, a small problem goes through it and
// through the step kernels. If they differ, or a wait is given up (csrc/cuda/wait.cuh), or CUDA refuses something,
// a warning says so, and step kernels run in its place for as long as the process lives: the numbers are right either way.
#pragma once

#include "scans.h"

namespace frnn {

// Whether this persistent plan runs: all its blocks fit, and its kernel agrees with the step kernels. `asked_for`, by
// force_strategy: runs unchecked, since tests and benchmarks want that kernel. The check waits for the GPU; while a CUDA
// graph is captured nobody may, so an unchecked kernel is not used there, and what is captured are step kernels.
template <class T>
bool may_run(const Problem& p, Pass pass, const CudaPlan& plan, bool asked_for);

// As in a new process. For tests.
void forget_checks();

}  // namespace frnn
