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

// Whether this machine's tiles multiply as these kernels take it. Whole numbers, so that every sum is exact: rows that
// fill no tile and rows that fill more than one, a k that fills none, every lane.
bool tiles_multiply();
bool tiles_multiply() {
  constexpr int kLanes = 4, kUnits = 16 * kLanes, kMostRows = 20, kK = 70, kDeep = 96;
  const auto number = [](int line, int k) { return (line * 7 + k * 3) % 5 - 2; };
  const auto fill = [&](BFloat16* to, int lines, int first_line) {
    for (int i = 0; i < lines * kK; ++i) {
      const auto x = static_cast<float>(number(first_line + i / kK, i % kK));
      uint32_t bits;
      memcpy(&bits, &x, sizeof bits);
      to[i].bits = static_cast<uint16_t>(bits >> 16);
    }
  };
  BFloat16 rows[kMostRows * kK], weights[kUnits * kK];
  alignas(64) BFloat16 panel[kDeep * kUnits];
  fill(rows, kMostRows, 0);
  fill(weights, kUnits, kMostRows);
  pack_rows<kLanes, 1>(weights, 16, kK, 0, panel);
  const BFloat16* a[kMostRows];
  for (int r = 0; r < kMostRows; ++r) a[r] = rows + r * kK;

  const AmxSession session;
  for (const int count : {9, kMostRows}) {
    alignas(64) float acc[kMostRows * kUnits];
    amx_product<kLanes>(a, count, kK, panel, kUnits * 2, acc, false);
    for (int r = 0; r < count; ++r)
      for (int u = 0; u < kUnits; ++u) {
        int sum = 0;
        for (int k = 0; k < kK; ++k) sum += number(r, k) * number(kMostRows + u, k);
        if (acc[r * kUnits + u] != static_cast<float>(sum)) return false;
      }
  }
  return true;
}

}  // namespace FRNN_ISA
}  // namespace frnn
#pragma GCC pop_options
#endif
