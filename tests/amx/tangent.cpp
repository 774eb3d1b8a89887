// Tangent scans on emulated tiles, for tests/test_amx_tangent.py: the arguments of csrc/args.h as C can take them.
#include <string.h>

#include "cells/cells.h"
#include "cpu/kernels.h"
#include "emulated_tiles.h"
#include "guarded.h"

namespace frnn::amx_float {
extern const SplitKernels kKernels;
}

namespace {

// What one layer reads and writes; all directions of each in one, null where absent.
struct Tensors {
  float *x, *h0, *c0, *output, *saved;  // [N, I], [D, B, H], [D, B, H], [N, D*H], [D, N, kSaved*H]
  float *x_tangent, *h0_tangent, *c0_tangent;
  float *output_tangent, *hn_tangent, *c_tangent, *saved_tangent;
  float *weights[2][2], *changes[2][4];  // by direction: w_ih, w_hh; those of w_ih, w_hh, b_ih, b_hh
};

}  // namespace

// sizes: T, B, I, H, D, N. Returns how many threads still hold tiles: none should.
extern "C" __attribute__((visibility("default"))) int frnn_amx_tangent(
    const char* cell, const int64_t* sizes, const int64_t* batch_sizes, const int64_t* offsets,
    const int64_t* lengths, const Tensors* tensors, int threads, int parts) {
  frnn::CellKind kind{};
  for (const frnn::CellName& entry : frnn::kCellNames)
    if (!strcmp(entry.name, cell)) kind = entry.kind;
  const int64_t T = sizes[0], B = sizes[1], I = sizes[2], H = sizes[3], D = sizes[4], N = sizes[5];
  frnn::TangentArgs<float> args{};
  args.threads = threads;
  args.shape = {T, B, I, H, 0, D, N, batch_sizes, offsets, lengths};
  frnn::Operands memory;
  frnn::with_cell(kind, [&](auto type) {
    using Cell = decltype(type);
    constexpr int64_t kGates = Cell::kGates;
    const Tensors& t = *tensors;
    const int64_t states = D * B * H, saved_size = D * N * Cell::kSaved * H;
    float *x = memory.guarded(t.x, N * I), *x_tangent = memory.guarded(t.x_tangent, N * I);
    float *h0 = memory.guarded(t.h0, states), *h0_tangent = memory.guarded(t.h0_tangent, states);
    float *c0 = memory.guarded(t.c0, states), *c0_tangent = memory.guarded(t.c0_tangent, states);
    float *output = memory.guarded(t.output, N * D * H), *hn_tangent = memory.guarded(t.hn_tangent, states);
    float* output_tangent = memory.guarded(t.output_tangent, N * D * H);
    float* c_tangent = memory.guarded(t.c_tangent, states);
    float *saved = memory.guarded(t.saved, saved_size),
          *saved_tangent = memory.guarded(t.saved_tangent, saved_size);
    for (int64_t d = 0; d < D; ++d) {
      frnn::TangentDirection<float>& to = args.direction[d];
      const auto of_direction = [&](float* all, int64_t count) { return all ? all + d * count : nullptr; };
      to.reverse = d == 1;
      to.x = x, to.x_tangent = x_tangent;
      to.w_ih = memory.guarded(t.weights[d][0], kGates * H * I);
      to.w_hh = memory.guarded(t.weights[d][1], kGates * H * H);
      to.w_ih_tangent = memory.guarded(t.changes[d][0], kGates * H * I);
      to.w_hh_tangent = memory.guarded(t.changes[d][1], kGates * H * H);
      to.b_ih_tangent = memory.guarded(t.changes[d][2], kGates * H);
      to.b_hh_tangent = memory.guarded(t.changes[d][3], kGates * H);
      to.h0 = of_direction(h0, B * H), to.h0_tangent = of_direction(h0_tangent, B * H);
      to.c0 = of_direction(c0, B * H), to.c0_tangent = of_direction(c0_tangent, B * H);
      to.output = output + d * H, to.output_tangent = output_tangent + d * H;
      to.output_stride = D * H;
      to.hn_tangent = of_direction(hn_tangent, B * H);
      to.c_tangent = of_direction(c_tangent, B * H);
      to.saved = of_direction(saved, N * Cell::kSaved * H);
      to.saved_tangent = of_direction(saved_tangent, N * Cell::kSaved * H);
    }
  });
  frnn::amx_float::kKernels.tangent(kind, args, parts);
  return frnn::EmulatedTiles::users();
}
