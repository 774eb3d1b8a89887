// Layers on emulated tiles, for tests/test_amx.py: the arguments of csrc/args.h as C can take them. Every
// operand ends where memory ends, so that a kernel that reads or writes past it stops there.
#include <string.h>

#include <vector>

#include "cells/cells.h"
#include "cpu/kernels.h"
#include "emulated_tiles.h"
#include "guarded.h"

namespace frnn::amx {
extern const Bfloat16Kernels kKernels;
bool tiles_multiply();
}  // namespace frnn::amx
namespace frnn::amx_float {
extern const SplitKernels kKernels;
}

using frnn::BFloat16;
using frnn::Operands;

namespace {

// One layer's arguments. sizes: T, B, I, H, P, D, N. weights: of each direction w_ih, w_hh, b_ih, b_hh, w_hr. c is c_0
// and becomes c_n.
template <class S>
struct Layer {
  frnn::CellKind kind{};
  frnn::ForwardArgs<S> args{};
  Operands memory;

  Layer(const char* cell, const int64_t* sizes, const int64_t* batch_sizes, const int64_t* offsets,
        const int64_t* lengths, S* x, S* h0, float* c, S* const* weights, S* output, S* hn, int threads) {
    for (const frnn::CellName& entry : frnn::kCellNames)
      if (!strcmp(entry.name, cell)) kind = entry.kind;
    const int64_t gates = frnn::with_cell(kind, [](auto type) -> int64_t { return decltype(type)::kGates; });
    frnn::Shape& s = args.shape;
    s = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], batch_sizes, offsets, lengths};
    args.threads = threads;
    const S* all_x = memory.guarded(x, s.N * s.I);
    const S* all_h0 = memory.guarded(h0, s.D * s.B * s.Hr());
    S* all_output = memory.guarded(output, s.N * s.D * s.Hr());
    S* all_hn = memory.guarded(hn, s.D * s.B * s.Hr());
    float* all_c = memory.guarded(c, s.D * s.B * s.H);
    for (int64_t d = 0; d < s.D; ++d) {
      frnn::ForwardDirection<S>& to = args.direction[d];
      S* const* w = weights + 5 * d;
      to.reverse = d == 1;
      to.x = all_x;
      to.w_ih = memory.guarded(w[0], gates * s.H * s.I);
      to.w_hh = memory.guarded(w[1], gates * s.H * s.Hr());
      to.b_ih = memory.guarded(w[2], gates * s.H);
      to.b_hh = memory.guarded(w[3], gates * s.H);
      to.w_hr = memory.guarded(w[4], s.P * s.H);
      to.h0 = all_h0 ? all_h0 + d * s.B * s.Hr() : nullptr;
      to.output = all_output + d * s.Hr();
      to.output_stride = s.D * s.Hr();
      to.hn = all_hn + d * s.B * s.Hr();
      to.c = all_c ? all_c + d * s.B * s.H : nullptr;
    }
  }
};

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

// Both return how many threads still hold tiles: none should.
EXPORTED int frnn_amx_bfloat16(const char* cell, const int64_t* sizes, const int64_t* batch_sizes,
                               const int64_t* offsets, const int64_t* lengths, BFloat16* x, BFloat16* h0,
                               float* c, BFloat16* const* weights, BFloat16* output, BFloat16* hn,
                               int threads) {
  const Layer<BFloat16> layer(cell, sizes, batch_sizes, offsets, lengths, x, h0, c, weights, output, hn,
                              threads);
  frnn::amx::kKernels.forward(layer.kind, layer.args);
  return frnn::EmulatedTiles::users();
}

EXPORTED int frnn_amx_float(const char* cell, const int64_t* sizes, const int64_t* batch_sizes,
                            const int64_t* offsets, const int64_t* lengths, float* x, float* h0, float* c,
                            float* const* weights, float* output, float* hn, int threads, int parts) {
  const Layer<float> layer(cell, sizes, batch_sizes, offsets, lengths, x, h0, c, weights, output, hn,
                           threads);
  frnn::amx_float::kKernels.forward(layer.kind, layer.args, parts);
  return frnn::EmulatedTiles::users();
}

EXPORTED bool frnn_amx_tiles_multiply() { return frnn::amx::tiles_multiply(); }
