// The CPU kernels of float layers on AMX, for those that gain by it. Not in the namespace of kernels_amx.cpp, whose cells
// are as accurate as bfloat16 is. Standard headers come before the target is set: see kernels.inc.
#if defined(__x86_64__) && defined(__linux__)
#include <immintrin.h>

#include "isa_prelude.h"
#define FRNN_ISA amx_float
#define FRNN_VECTOR_BYTES 64
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512dq,avx512bw,avx512bf16,avx2,fma,prefer-vector-width=512")
#include "amx_scaled.h"
//
#include "layer.h"
#include "tangent.h"

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

template <class Direction>
struct InParts : Direction {
  int parts;
};

template <class Products>
Products products_of([[maybe_unused]] int parts) {
  if constexpr (std::is_same_v<Products, PlainProducts<float>>)
    return {};
  else
    return {parts};
}

// A scan that multiplies its input, or what it knows ahead, as Input does and the state as Recurrent does.
template <class Scan, class Direction, class Input, class Recurrent>
struct ScanInParts : Scan {
  ScanInParts(const Shape& shape, const InParts<Direction>& d, const CpuPlan& plan)
      : Scan(shape, d, plan, products_of<Input>(d.parts), products_of<Recurrent>(d.parts)) {}
};

CpuProblem split_problem(CellKind kind, const Shape& shape, int threads) {
  CpuProblem p = problem<float>(kind, shape, threads, false);
  if (splits_state(shape)) p.tile_rows = SplitProducts::tile_rows(0);
  p.itemsize = kMostParts * sizeof(BFloat16);
  return p;
}

template <template <class, class, class, class> class Scan, class Input, class Direction>
void run_in_parts(CellKind kind, const LayerArgs<Direction>& args, int parts) {
  const LayerArgs<InParts<Direction>> split{
      args.shape, {{args.direction[0], parts}, {args.direction[1], parts}}, args.threads};
  const CpuProblem problem = split_problem(kind, args.shape, args.threads);
  with_cell(kind, [&](auto cell) {
    const auto run = [&](auto recurrent) {
      using Recurrent = decltype(recurrent);
      run_layer<ScanInParts<Scan<decltype(cell), float, Input, Recurrent>, Direction, Input, Recurrent>>(
          split, problem);
    };
    if (splits_state(args.shape))
      run(products_of<Input>(parts));
    else
      run(PlainProducts<float>());
  });
}

void split_forward(CellKind kind, const ForwardArgs<float>& args, int parts) {
  run_in_parts<ForwardDirectionScan, SplitProducts>(kind, args, parts);
}

void split_tangent(CellKind kind, const TangentArgs<float>& args, int parts) {
  run_in_parts<TangentDirectionScan, ScaledSplitProducts>(kind, args, parts);
}

extern const SplitKernels kKernels;
const SplitKernels kKernels = {&split_pays, &split_forward, &split_tangent, &split_problem};

}  // namespace FRNN_ISA
}  // namespace frnn
#pragma GCC pop_options
#endif
