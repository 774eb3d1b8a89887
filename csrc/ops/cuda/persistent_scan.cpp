// The persistent strategies (csrc/cuda/persistent.h): one launch for all steps, or forward for as many of them as the
// input's side of the gates may take memory for.
#include <ATen/ops/empty.h>

#include <algorithm>

#include "../../cuda/offsets.h"
#include "scans.h"

namespace frnn {
namespace {

// What every launch of a scan is told, forward and backward.
template <class T>
struct Common {
  Tensor offsets, exchange;

  Common(const Problem& p, Pass pass, const CudaPlan& plan, void* stream) {
    const Shape& s = p.shape;
    // Where the steps' rows begin, on the device. As arguments of a kernel the lengths reach it without a copy from the
    // host's memory, which a CUDA graph would read again at every replay, long after that memory is gone.
    if (s.N != s.T * s.B) {
      offsets = p.allocate({s.T + 1}, at::kLong);
      check(write_offsets(s.lengths, s.B, s.T, output_at<int64_t>(offsets), stream), "write_offsets", p);
    }
    const int64_t bytes = tile_exchange_bytes(pass, p.cell.gates, sizeof(T), plan.tile, s.B, s.H, s.D);
    if (bytes > 0) exchange = p.allocate({bytes}, at::kByte);
  }

  template <class Args>
  void fill(Args& args, const Shape& s, const Tensor& gave_up) const {
    args.steps = s.T, args.B = s.B, args.H = s.H, args.D = s.D;
    args.offsets = input_at<int64_t>(offsets);
    args.exchange = output_at<char>(exchange);
    args.gave_up = output_at<unsigned>(gave_up);
  }
};

}  // namespace

template <class T>
int64_t residents(const Problem& p, Pass pass, const CudaPlan& plan) {
  int64_t replicas = 0;
  const char* refused = pass == Pass::forward
                            ? persistent_forward_residents<T>(p.cell.kind, plan.tile, p.shape.H, &replicas)
                            : persistent_backward_residents<T>(p.cell.kind, plan.tile, p.shape.H, &replicas);
  return refused ? 0 : replicas;
}

template <class T>
void persistent_forward_scan(const Problem& p, const CudaPlan& plan, bool save, ForwardTensors& t,
                             void* stream, const Tensor& gave_up) {
  const Shape& s = p.shape;
  const Common<T> common(p, Pass::forward, plan, stream);
  InputGates gates_x(p, t.x, plan.chunk_steps);
  // The cell state between launches is as wide as sums are.
  Tensor c;
  if (p.cell.cell_state && plan.chunk_steps < s.T) c = p.allocate_state(s.H, at::kFloat);

  PersistentForward<T> args{};
  common.fill(args, s, gave_up);
  for (int64_t d = 0; d < s.D; ++d) {
    const DirectionWeights& w = p.weights[d];
    const int64_t states = d * s.B * s.H;
    PersistentForwardDirection<T>& to = args.direction[d];
    to.w_hh = input_at<T>(w.w_hh);
    to.b_ih = input_at<T>(w.b_ih);
    to.b_hh = input_at<T>(w.b_hh);
    to.reset = input_at<bool>(t.reset);
    to.h0 = input_at<T>(t.h0, states);
    to.c0 = input_at<T>(t.c0, states);
    to.hn = output_at<T>(t.hn, states);
    to.c = output_at<float>(c, states);
    if (p.cell.cell_state) to.cn = output_at<T>(t.cn, states);
    to.output = output_at<T>(t.output, d * s.H);
    to.output_stride = s.D * s.H;
    if (save) to.saved = output_at<T>(t.saved, d * s.N * p.cell.saved * s.H);
  }
  for (args.first = 0; args.first < s.T; args.first = args.last) {
    args.last = std::min(args.first + plan.chunk_steps, s.T);
    gates_x.advance(args.first);
    for (int64_t d = 0; d < s.D; ++d) {
      args.direction[d].gates_x_first = gates_x.first(d);
      args.direction[d].gates_x = gates_x.at<float>(d, gates_x.first(d));
    }
    check(persistent_forward(p.cell.kind, plan.tile, args, stream), "persistent_forward", p);
  }
}

template <class T>
void persistent_backward_scan(const Problem& p, const CudaPlan& plan, BackwardTensors& t, void* stream,
                              const Tensor& gave_up) {
  const Shape& s = p.shape;
  const Common<T> common(p, Pass::backward, plan, stream);
  Tensor dh = p.allocate({s.D, s.B, s.H}, at::kFloat);
  t.grad_hn.defined() ? dh.copy_(t.grad_hn) : dh.zero_();
  for (int64_t d = 0; d < s.D && t.wants_previous; ++d) t.previous.push_back(p.allocate({s.N, s.H}));

  PersistentBackward<T> args{};
  common.fill(args, s, gave_up);
  args.wants_dh0 = t.wants_dh0;
  for (int64_t d = 0; d < s.D; ++d) {
    const int64_t states = d * s.B * s.H;
    PersistentBackwardDirection<T>& to = args.direction[d];
    to.w_hh = input_at<T>(p.weights[d].w_hh);
    to.saved = input_at<T>(t.saved, d * s.N * p.cell.saved * s.H);
    to.output = input_at<T>(t.output, d * s.H);
    to.output_stride = s.D * s.H;
    to.h0 = input_at<T>(t.h0, states);
    to.c0 = input_at<T>(t.c0, states);
    to.reset = input_at<bool>(t.reset);
    to.grad_output = input_at<T>(t.grad_output, d * s.H);
    to.grad_output_stride = s.D * s.H;
    to.dh = output_at<float>(dh, states);
    to.carry = output_at<float>(t.carry, states);
    to.dgates = output_at<T>(t.dgates[d]);
    if (t.wants_previous) to.previous = output_at<T>(t.previous[d]);
  }
  check(persistent_backward(p.cell.kind, plan.tile, args, stream), "persistent_backward", p);
  if (!t.wants_dh0) return;
  if (p.cell.carry && !p.cell.cell_state) dh.add_(t.carry);  // what reached h_0 past the product
  t.dh0 = dh;
}

#define INSTANTIATE(T)                                                                                    \
  template int64_t residents<T>(const Problem&, Pass, const CudaPlan&);                                   \
  template void persistent_forward_scan<T>(const Problem&, const CudaPlan&, bool, ForwardTensors&, void*, \
                                           const Tensor&);                                                \
  template void persistent_backward_scan<T>(const Problem&, const CudaPlan&, BackwardTensors&, void*,     \
                                            const Tensor&);
INSTANTIATE(float)
INSTANTIATE(Exact)
INSTANTIATE(Half)
INSTANTIATE(BFloat16)
#undef INSTANTIATE

}  // namespace frnn
