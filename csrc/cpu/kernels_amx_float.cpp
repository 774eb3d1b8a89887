// The CPU kernels of float layers on AMX, for those that gain by it. Not in the namespace of kernels_amx.cpp, whose cells
// are as accurate as bfloat16 is. Standard headers come before the target is set: see kernels.inc.
#if defined(__x86_64__) && defined(__linux__)
#include <immintrin.h>

#include "isa_prelude.h"
#define FRNN_ISA amx_float
#define FRNN_VECTOR_BYTES 64
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512dq,avx512bw,avx512bf16,avx2,fma,prefer-vector-width=512")
#include "amx_forward.h"
//
#include "layer.h"

namespace frnn {
inline namespace FRNN_ISA {

// Measured on two cores of a Sapphire Rapids, against float products in AVX-512: from 32 rows and 128 units on layers
// gain 7 to 40 %, with 20 rows nothing. An RNN, whose step is short, has been seen to gain from 256 units on.
constexpr int64_t kFewestSplitRows = 24, kFewestSplitUnits = 128, kFewestSplitUnitsOfRnn = 256;
// Splitting the weights costs several times what packing them does, some three steps of a row (plan.cpp). One step alone
// need not pack them at all.
constexpr int64_t kFewestSplitRowsInAll = 128;

bool split_pays(CellKind kind, const Shape& s) {
  const int gates = with_cell(kind, [](auto cell) { return decltype(cell)::kGates; });
  return s.P == 0 && s.T > 1 && s.H >= (gates > 1 ? kFewestSplitUnits : kFewestSplitUnitsOfRnn) &&
         s.N >= kFewestSplitRows * s.T && s.N >= kFewestSplitRowsInAll;
}

CpuProblem split_problem(CellKind kind, const Shape& shape, int threads) {
  CpuProblem p = problem<float>(kind, shape, threads, false);
  p.tile_rows = 2 * kAmxRows;
  p.itemsize = kMostParts * sizeof(BFloat16);
  return p;
}

void split_forward(CellKind kind, const ForwardArgs<float>& args, int parts) {
  const LayerArgs<SplitDirection> split{
      args.shape, {{args.direction[0], parts}, {args.direction[1], parts}}, args.threads};
  with_cell(kind, [&](auto cell) {
    run_layer<SplitForwardScan<decltype(cell)>>(split, split_problem(kind, args.shape, args.threads));
  });
}

extern const SplitKernels kKernels;
const SplitKernels kKernels = {&split_pays, &split_forward, &split_problem};

}  // namespace FRNN_ISA
}  // namespace frnn
#pragma GCC pop_options
#endif
