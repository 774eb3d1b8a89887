// The CPU kernels with 256-bit vectors. Standard headers come before the target is set: see kernels.inc.
#if defined(__x86_64__)
#include "isa_prelude.h"
#define FRNN_ISA avx2
#define FRNN_VECTOR_BYTES 32
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#include "kernels.inc"
#pragma GCC pop_options
#endif
