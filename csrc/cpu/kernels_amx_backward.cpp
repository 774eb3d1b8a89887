// The CPU kernels of backward scans in float on AMX, for those that gain by it. Standard headers come before the target is
// set: see kernels.inc.
#if defined(__x86_64__) && defined(__linux__)
#include <immintrin.h>

#include "isa_prelude.h"
#define FRNN_ISA amx_backward
#define FRNN_VECTOR_BYTES 64
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512dq,avx512bw,avx512bf16,avx2,fma,prefer-vector-width=512")
#include "amx_backward.h"
//
#include "layer.h"

namespace frnn {
inline namespace FRNN_ISA {

// Measured on a core of a Sapphire Rapids, against float products in AVX-512: with 12 rows and 128 to 256 units 1.2 times
// as fast, with 64 rows 1.3 to 1.4; with 32 units 0.85, with 64 1.1. Weights take half as much again in parts: where they
// no longer stay in L2, 8 rows are 0.7 times as fast, 16 about even, 32 1.6.
constexpr int64_t kFewestSplitUnits = 64, kFewestSplitRows = 12, kFewestSplitRowsBeyondL2 = 20;
constexpr int64_t kL2Bytes = 2 << 20;

bool split_backward_pays(CellKind kind, const Shape& s) {
  const int64_t gates = with_cell(kind, [](auto cell) { return decltype(cell)::kGates; });
  const bool in_l2 = gates * s.H * s.H * kMostParts * 2 <= kL2Bytes;
  return s.P == 0 && s.T > 1 && s.H >= kFewestSplitUnits &&
         s.N >= s.T * (in_l2 ? kFewestSplitRows : kFewestSplitRowsBeyondL2);
}

void split_backward(CellKind kind, const BackwardArgs<float>& args, int parts) {
  const CpuProblem problem = tile_backward_problem<kMostParts>(kind, args.shape, args.threads);
  with_cell(kind, [&](auto cell) {
    using Cell = decltype(cell);
    if (parts == kMostParts)
      run_layer<TileBackwardScan<Cell, float, kMostParts>>(args, problem);
    else
      run_layer<TileBackwardScan<Cell, float, 2>>(args, problem);
  });
}

extern const SplitBackwardKernels kKernels;
const SplitBackwardKernels kKernels = {&split_backward_pays, &split_backward,
                                       &tile_backward_problem<kMostParts>};

}  // namespace FRNN_ISA
}  // namespace frnn
#pragma GCC pop_options
#endif
