// The CPU kernels of layers in bfloat16 on AMX: those of kernels_avx512_bf16.cpp but for the products. Standard headers
// come before the target is set: see kernels.inc.
#if defined(__x86_64__) && defined(__linux__)
#include <immintrin.h>

#include "isa_prelude.h"
#define FRNN_ISA amx
#define FRNN_AMX  // a macro, for panels of weights are packed otherwise
#define FRNN_VECTOR_BYTES 64
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512dq,avx512bw,avx512bf16,avx2,fma,prefer-vector-width=512")
#include "amx_product.h"
//
#include "forward.h"
#include "layer.h"

namespace frnn {
inline namespace FRNN_ISA {

extern const Bfloat16Kernels kKernels;
const Bfloat16Kernels kKernels = {forward<BFloat16>, problem<BFloat16>};

}  // namespace FRNN_ISA
}  // namespace frnn
#pragma GCC pop_options
#endif
