// The CPU kernels with 512-bit vectors. Standard headers come before the target is set: see kernels.inc.
#if defined(__x86_64__)
#include "isa_prelude.h"
#define FRNN_ISA avx512
#define FRNN_VECTOR_BYTES 64
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma,prefer-vector-width=512")
#include "kernels.inc"
#pragma GCC pop_options
#endif
