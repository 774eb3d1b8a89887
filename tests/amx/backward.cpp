// Backward scans on emulated tiles, for tests/test_amx_backward.py: the arguments of csrc/args.h as C can take them.
#include <string.h>

#include "cells/cells.h"
#include "cpu/kernels.h"
#include "emulated_tiles.h"
#include "guarded.h"

namespace frnn::amx_backward {
extern const SplitBackwardKernels kKernels;
}
namespace frnn::amx_backward_bf16 {
extern const Bfloat16BackwardKernels kKernels;
}

using frnn::BFloat16;

namespace {

// What one layer reads and writes; all directions of each in one, null where absent.
template <class S>
struct Tensors {
  S *h0, *c0, *output;                // [D, B, H], [D, B, H], [N, D*H]
  float* saved;                       // [D, N, kSaved*H]
  S *grad_output, *grad_hn, *dgates;  // [N, D*H], [D, B, H], [D, N, kGateGrads*H]
  S* dh;                              // [D, N, H]
  float* carry;                       // [D, B, H]
  S *dh0, *w_hh[2];                   // [D, B, H], [G*H, H]
  // What is added on the way: [D, N, H]. With `adds_previous`, `dgates` holds the rest of it.
  float* adds_carry;
  S* adds_previous;
  bool* reset;  // [N]
};

// sizes: T, B, H, D, N.
template <class S, class F>
int backward(const char* cell, const int64_t* sizes, const int64_t* batch_sizes, const int64_t* offsets,
             const int64_t* lengths, const Tensors<S>& t, int threads, F&& run) {
  frnn::CellKind kind{};
  for (const frnn::CellName& entry : frnn::kCellNames)
    if (!strcmp(entry.name, cell)) kind = entry.kind;
  frnn::BackwardArgs<S> args{};
  args.threads = threads;
  const int64_t T = sizes[0], B = sizes[1], H = sizes[2], D = sizes[3], N = sizes[4];
  args.shape = {T, B, 1, H, 0, D, N, batch_sizes, offsets, lengths};
  frnn::Operands memory;
  frnn::with_cell(kind, [&](auto type) {
    using Cell = decltype(type);
    S *h0 = memory.guarded(t.h0, D * B * H), *c0 = memory.guarded(t.c0, D * B * H);
    S *output = memory.guarded(t.output, N * D * H), *dh = memory.guarded(t.dh, D * N * H);
    float* saved = memory.guarded(t.saved, D * N * Cell::kSaved * H);
    S *grad_output = memory.guarded(t.grad_output, N * D * H), *dh0 = memory.guarded(t.dh0, D * B * H);
    S *grad_hn = memory.guarded(t.grad_hn, D * B * H),
      *dgates = memory.guarded(t.dgates, D * N * Cell::kGateGrads * H);
    float *carry = memory.guarded(t.carry, D * B * H), *adds_carry = memory.guarded(t.adds_carry, D * N * H);
    S* adds_previous = memory.guarded(t.adds_previous, D * N * H);
    const bool* reset = memory.guarded(t.reset, N);
    for (int64_t d = 0; d < D; ++d) {
      frnn::BackwardDirection<S>& to = args.direction[d];
      const auto of_direction = [&](auto* all, int64_t count) { return all ? all + d * count : nullptr; };
      to.reverse = d == 1;
      to.w_hh = memory.guarded(t.w_hh[d], Cell::kGates * H * H);
      to.h0 = of_direction(h0, B * H);
      to.c0 = of_direction(c0, B * H);
      to.reset = reset;
      to.output = output + d * H;
      to.saved = of_direction(saved, N * Cell::kSaved * H);
      to.grad_output = of_direction(grad_output, H);
      to.output_stride = to.grad_output_stride = D * H;
      to.grad_hn = of_direction(grad_hn, B * H);
      to.dgates = dgates + d * N * Cell::kGateGrads * H;
      to.dgates_stride = Cell::kGateGrads * H;
      to.dh = of_direction(dh, N * H);
      to.carry = of_direction(carry, B * H);
      to.dh0 = of_direction(dh0, B * H);
      to.adds_gates = adds_previous ? to.dgates : nullptr;
      to.adds_carry = of_direction(adds_carry, N * H);
      to.adds_previous = of_direction(adds_previous, N * H);
    }
  });
  run(kind, args);
  return frnn::EmulatedTiles::users();
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

// Both return how many threads still hold tiles: none should.
EXPORTED int frnn_amx_backward_float(const char* cell, const int64_t* sizes, const int64_t* batch_sizes,
                                     const int64_t* offsets, const int64_t* lengths,
                                     const Tensors<float>* tensors, int threads, int parts) {
  return backward(
      cell, sizes, batch_sizes, offsets, lengths, *tensors, threads,
      [&](auto kind, const auto& args) { frnn::amx_backward::kKernels.backward(kind, args, parts); });
}

EXPORTED int frnn_amx_backward_bfloat16(const char* cell, const int64_t* sizes, const int64_t* batch_sizes,
                                        const int64_t* offsets, const int64_t* lengths,
                                        const Tensors<BFloat16>* tensors, int threads, int) {
  return backward(
      cell, sizes, batch_sizes, offsets, lengths, *tensors, threads,
      [&](auto kind, const auto& args) { frnn::amx_backward_bf16::kKernels.backward(kind, args); });
}
