// Float matrix products on AMX, for those that gain by it. Standard headers come before the target is set: see
// kernels.inc.
#if defined(__x86_64__) && defined(__linux__)
#include <immintrin.h>

#include "isa_prelude.h"
#define FRNN_ISA amx_matrix
#define FRNN_VECTOR_BYTES 64
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512dq,avx512bw,avx512bf16,avx2,fma,prefer-vector-width=512")
#include "amx_matrix.h"

namespace frnn {
inline namespace FRNN_ISA {

// Measured on two cores of a Sapphire Rapids, against float products in AVX-512: from 32 rows, 64 columns and sums of 32 on
// a product takes 0.5 to 0.9 of the time; with 32 columns, or 16 rows, more than 1.
bool product_pays(int64_t M, int64_t N, int64_t K) { return M >= 32 && N >= 64 && K >= 32; }

void split_sum_over_rows(const SumOverRows<float>& p, int parts) {
  run_split_product<LeftColumns>({{p.a, p.a_stride}, p.b, p.b_stride, p.M, p.N, p.rows, p.c, p.add, parts},
                                 p.threads);
}

void split_multiply(const RowsTimesMatrix<float>& p, int parts) {
  run_split_product<LeftRows>({{p.a, p.a_stride}, p.w, p.N, p.rows, p.N, p.K, p.c, p.add, parts}, p.threads);
}

extern const MatrixKernels kKernels;
const MatrixKernels kKernels = {&product_pays, &split_sum_over_rows, &split_multiply};

}  // namespace FRNN_ISA
}  // namespace frnn
#pragma GCC pop_options
#endif
