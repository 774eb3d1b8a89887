// The CPU kernels with 128-bit vectors, which every 64-bit machine has (SSE2, NEON).
#include "isa_prelude.h"
#define FRNN_ISA portable
#define FRNN_VECTOR_BYTES 16
#include "kernels.inc"
