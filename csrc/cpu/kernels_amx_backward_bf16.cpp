// The CPU kernels of backward scans in bfloat16 on AMX: apart from those in float, whose cells are more accurate. Standard
// headers come before the target is set: see kernels.inc.
#if defined(__x86_64__) && defined(__linux__)
#include <immintrin.h>

#include "isa_prelude.h"
#define FRNN_ISA amx_backward_bf16
#define FRNN_VECTOR_BYTES 64
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512dq,avx512bw,avx512bf16,avx2,fma,prefer-vector-width=512")
#include "bfloat16.h"
//
#include "amx_backward.h"
#include "layer.h"

namespace frnn {
inline namespace FRNN_ISA {

// Measured on a core of a Sapphire Rapids, against the scan in float with AVX-512: 1.5 times as fast with 16 rows of 32
// units, 3 times with 4 rows of 256, 4 to 8 times from 12 rows of 256 on. Below that nothing has been measured.
constexpr int64_t kFewestTileUnits = 32, kFewestTileRows = 4;

bool bfloat16_backward_pays(CellKind, const Shape& s) {
  return s.P == 0 && s.T > 1 && s.H >= kFewestTileUnits && s.N >= kFewestTileRows * s.T;
}

void bfloat16_backward(CellKind kind, const BackwardArgs<BFloat16>& args) {
  with_cell(kind, [&](auto cell) {
    run_layer<TileBackwardScan<decltype(cell), BFloat16, 1>>(
        args, tile_backward_problem<1>(kind, args.shape, args.threads));
  });
}

extern const Bfloat16BackwardKernels kKernels;
const Bfloat16BackwardKernels kKernels = {&bfloat16_backward_pays, &bfloat16_backward,
                                          &tile_backward_problem<1>};

}  // namespace FRNN_ISA
}  // namespace frnn
#pragma GCC pop_options
#endif
