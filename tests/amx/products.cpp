// Float matrix products on tiles, emulated or the machine's own, for tests/test_amx_matrix.py.
#include "cpu/kernels.h"
#include "guarded.h"
#ifdef FRNN_AMX_EMULATION
#include "emulated_tiles.h"
#endif

namespace frnn::amx_matrix {
extern const MatrixKernels kKernels;
}

namespace {

int users() {
#ifdef FRNN_AMX_EMULATION
  return frnn::EmulatedTiles::users();
#else
  return 0;
#endif
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

// Both return how many threads still hold tiles: none should. sizes: rows, M, N, and the row strides of a and b.
EXPORTED int frnn_sum_over_rows(const int64_t* sizes, float* a, float* b, float* c, int add, int threads,
                                int parts) {
  const int64_t rows = sizes[0], M = sizes[1], N = sizes[2];
  frnn::Operands memory;
  frnn::amx_matrix::kKernels.sum_over_rows(
      {rows, M, N, memory.guarded(a, (rows - 1) * sizes[3] + M), sizes[3],
       memory.guarded(b, (rows - 1) * sizes[4] + N), sizes[4], memory.guarded(c, M * N), add != 0, threads},
      parts);
  return users();
}

// sizes: rows, K, N, and the row stride of a.
EXPORTED int frnn_multiply(const int64_t* sizes, float* a, float* w, float* c, int add, int threads,
                           int parts) {
  const int64_t rows = sizes[0], K = sizes[1], N = sizes[2];
  frnn::Operands memory;
  frnn::amx_matrix::kKernels.multiply(
      {rows, K, N, memory.guarded(a, (rows - 1) * sizes[3] + K), sizes[3], memory.guarded(w, K * N),
       memory.guarded(c, rows * N), add != 0, threads},
      parts);
  return users();
}
