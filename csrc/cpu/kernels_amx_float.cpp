// The CPU kernels of float layers on AMX, for those that gain by it. Not in the namespace of kernels_amx.cpp, whose cells
// are as accurate as bfloat16 is. Standard headers come before the target is set: see kernels.inc.
#if defined(__x86_64__) && defined(__linux__)
#include <immintrin.h>

#include "isa_prelude.h"
#define FRNN_ISA amx_float
#define FRNN_VECTOR_BYTES 64
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512dq,avx512bw,avx512bf16,avx2,fma,prefer-vector-width=512")
#include "amx_split.h"
//
#include "layer.h"

namespace frnn {
inline namespace FRNN_ISA {

// Measured on two cores of a Sapphire Rapids, inference, against float products in AVX-512. With parts everywhere: from 16
// rows a step on, an LSTM of 256 units gains 12 to 30 %, with 12 rows 5 %, with 8 it loses 10 %; of 128 units 5 %, of 64
// it loses 8 %. A gate more or less changes little, but an RNN of 128 units, whose step is short, loses 20 %.
constexpr int64_t kFewestSplitStateRows = 16;
constexpr int64_t kFewestSplitUnits = 128, kFewestSplitUnitsOfRnn = 256;
// Splitting the weights costs several times what packing them does, some three steps of a row (plan.cpp): with 128 rows in
// all nothing is gained yet. One step alone need not pack them at all.
constexpr int64_t kFewestSplitRowsInAll = 128;
// With fewer rows a step than that the input alone is multiplied by parts: with 400 rows in all there is no difference,
// with 800 rows it gains 8 % at 256 units and nothing at 128.
constexpr int64_t kFewestSplitInputRows = 512, kFewestSplitInputUnits = 256;

bool splits_state(const Shape& s) { return s.N >= kFewestSplitStateRows * s.T; }

bool split_pays(CellKind kind, const Shape& s) {
  if (s.P > 0 || s.T == 1) return false;
  if (!splits_state(s)) return s.N >= kFewestSplitInputRows && s.H >= kFewestSplitInputUnits;
  const int gates = with_cell(kind, [](auto cell) { return decltype(cell)::kGates; });
  return s.N >= kFewestSplitRowsInAll && s.H >= (gates > 1 ? kFewestSplitUnits : kFewestSplitUnitsOfRnn);
}

struct SplitDirection : ForwardDirection<float> {
  int parts;
};

template <class Cell, class Recurrent>
class SplitForwardScan : public ForwardDirectionScan<Cell, float, SplitProducts, Recurrent> {
 public:
  SplitForwardScan(const Shape& shape, const SplitDirection& d, const CpuPlan& plan)
      : ForwardDirectionScan<Cell, float, SplitProducts, Recurrent>(shape, d, plan, {d.parts}, recurrent(d)) {
  }

 private:
  static Recurrent recurrent([[maybe_unused]] const SplitDirection& d) {
    if constexpr (std::is_same_v<Recurrent, SplitProducts>)
      return {d.parts};
    else
      return {};
  }
};

CpuProblem split_problem(CellKind kind, const Shape& shape, int threads) {
  CpuProblem p = problem<float>(kind, shape, threads, false);
  if (splits_state(shape)) p.tile_rows = SplitProducts::tile_rows(0);
  p.itemsize = kMostParts * sizeof(BFloat16);
  return p;
}

void split_forward(CellKind kind, const ForwardArgs<float>& args, int parts) {
  const LayerArgs<SplitDirection> split{
      args.shape, {{args.direction[0], parts}, {args.direction[1], parts}}, args.threads};
  const CpuProblem problem = split_problem(kind, args.shape, args.threads);
  with_cell(kind, [&](auto cell) {
    if (splits_state(args.shape))
      run_layer<SplitForwardScan<decltype(cell), SplitProducts>>(split, problem);
    else
      run_layer<SplitForwardScan<decltype(cell), PlainProducts<float>>>(split, problem);
  });
}

extern const SplitKernels kKernels;
const SplitKernels kKernels = {&split_pays, &split_forward, &split_problem};

}  // namespace FRNN_ISA
}  // namespace frnn
#pragma GCC pop_options
#endif
