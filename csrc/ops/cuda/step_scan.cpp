// Strategy "step" (csrc/cuda/step.h): the loop over time, one or two launches a step.
#include <ATen/ops/add.h>
#include <ATen/ops/masked_fill.h>
#include <ATen/ops/stack.h>

#include <algorithm>

#include "../../cuda/step.h"
#include "scans.h"

namespace frnn {
namespace {

// Where direction d of a scan stands. Scans go forward in `order` 0 .. T-1; d = 1 meets the steps from last to first.
struct Place {
  int64_t t, rows, first;  // step, its rows, and where they begin among the N
};
Place place(const Shape& s, int64_t d, int64_t order) {
  const int64_t t = d == 0 ? order : s.T - 1 - order;
  return {t, s.batch_sizes[t], s.offsets[t]};
}

// The state of direction d as its scan found it at place `now`, `before` being the place one earlier in its order.
template <class T>
Previous<T> previous_state(const T* rows, int64_t stride, const Place* before, const T* initial) {
  return before ? Previous<T>{rows + before->first * stride, stride, before->rows, initial}
                : Previous<T>{nullptr, 0, 0, initial};
}

// result[d] = a[d] b[d] for the first rows(d) rows of every direction: one call where all have as many.
void products(const Tensor& result, const Tensor* a, const Tensor& b, int64_t D) {
  if (D == 1 || a[0].size(0) != a[1].size(0)) {
    for (int64_t d = 0; d < D; ++d)
      if (a[d].size(0) > 0) product(result.select(0, d).narrow(0, 0, a[d].size(0)), a[d], b.select(0, d));
    return;
  }
  // Both lie in one allocation or are equally spaced in one: a batch of two, apart by the distance of their first rows.
  const int64_t apart = a[1].storage_offset() - a[0].storage_offset();
  const Tensor both = a[0].as_strided({D, a[0].size(0), a[0].size(1)}, {apart, a[0].stride(0), 1});
  product(result.narrow(1, 0, a[0].size(0)), both, b);
}

// The weights of all directions, [D, rows, columns].
Tensor stacked(const Problem& p, Tensor DirectionWeights::* which) {
  if (p.D() == 1) return (p.weights[0].*which).unsqueeze(0);
  return at::stack({p.weights[0].*which, p.weights[1].*which});
}

// ----------------------------------------------------------------------------------------------------- forward

}  // namespace

template <class T>
void step_forward_scan(const Problem& p, const CudaPlan& plan, bool save, ForwardTensors& t, void* stream) {
  using A = Accumulate<T>;
  const Shape& s = p.shape;
  const int64_t GH = p.cell.gates * s.H, Hr = s.Hr(), stride = s.D * Hr;
  const bool fused = plan.strategy == Strategy::step_fused;

  InputGates gates_x(p, t.x, plan.chunk_steps);
  // The cell state between steps is as wide as sums are, and cn may not be.
  const bool wide = p.cell.cell_state && p.compute != p.accumulate;
  const Tensor c = !p.cell.cell_state ? Tensor()
                   : !wide            ? t.cn
                   : s.T > 1          ? p.allocate_state(s.H, p.accumulate)
                                      : Tensor();
  // The state that the product of a step reads: h0, then hn, which every step updates. A single step has no hn to keep.
  const bool zero_start = !t.h0.defined();
  Tensor state = t.hn, gates_h, hidden, w_hh, w_hr;
  if (!state.defined()) {
    if (!zero_start) state = t.h0.view({s.D, s.B, Hr});
  } else if (!fused) {
    zero_start ? state.zero_() : state.copy_(t.h0);
  }
  if (!fused && !(zero_start && s.T == 1)) {
    gates_h = p.allocate({s.D, s.B, GH}, p.accumulate);
    w_hh = stacked(p, &DirectionWeights::w_hh).transpose(1, 2);
  }
  if (s.P > 0) {
    hidden = p.allocate({s.D, s.B, s.H});
    w_hr = stacked(p, &DirectionWeights::w_hr).transpose(1, 2);
  }

  StepForward<T> args{};
  args.I = s.I, args.H = s.H, args.D = s.D;
  Place before[2];
  for (int64_t order = 0; order < s.T; ++order) {
    gates_x.advance(order);
    Tensor operands[2];
    const bool multiply = !fused && !(zero_start && order == 0);
    for (int64_t d = 0; d < s.D; ++d) {
      const Place now = place(s, d, order);
      const DirectionWeights& w = p.weights[d];
      StepForwardDirection<T>& to = args.direction[d];
      to.rows = now.rows;
      if (plan.fuse_input) {
        to.x = input_at<T>(t.x, now.first * s.I);
        to.w_ih = input_at<T>(w.w_ih);
      } else {
        to.gates_x = gates_x.at<A>(d, now.first);
      }
      if (multiply) {
        operands[d] = state.select(0, d).narrow(0, 0, now.rows);
        to.gates_h = input_at<A>(gates_h, d * s.B * GH);
      }
      to.w_hh = input_at<T>(w.w_hh);
      to.b_ih = input_at<T>(w.b_ih);
      to.b_hh = input_at<T>(w.b_hh);
      to.reset = input_at<bool>(t.reset, now.first);
      to.c0 = input_at<T>(t.c0, d * s.B * s.H);
      to.c = output_at<A>(c, d * s.B * s.H);
      if (wide) to.cn = output_at<T>(t.cn, d * s.B * s.H);
      T* output = output_at<T>(t.output, d * Hr);
      to.h = previous_state<T>(output, stride, order > 0 ? &before[d] : nullptr,
                               input_at<T>(t.h0, d * s.B * Hr));
      if (save) to.saved = output_at<T>(t.saved, (d * s.N + now.first) * p.cell.saved * s.H);
      if (s.P > 0) {
        to.output = output_at<T>(hidden, d * s.B * s.H);
        to.output_stride = s.H;
      } else {
        to.output = output + now.first * stride;
        to.output_stride = stride;
        to.hn = output_at<T>(t.hn, d * s.B * Hr);
      }
      before[d] = now;
    }
    if (multiply) products(gates_h, operands, w_hh, s.D);
    check(fused ? step_fused(p.cell.kind, args, stream) : step_forward(p.cell.kind, args, stream),
          fused ? "step_fused" : "step_forward", p);
    if (s.P > 0) {
      for (int64_t d = 0; d < s.D; ++d) operands[d] = hidden.select(0, d).narrow(0, 0, before[d].rows);
      products(t.hn, operands, w_hr, s.D);
      for (int64_t d = 0; d < s.D; ++d)
        t.output.narrow(0, before[d].first, before[d].rows)
            .narrow(1, d * Hr, Hr)
            .copy_(t.hn.select(0, d).narrow(0, 0, before[d].rows));
    }
  }
}

// ---------------------------------------------------------------------------------------------------- backward

namespace {

Tensor reset_rows(const BackwardTensors& t, const Place& now) {
  return t.reset.narrow(0, now.first, now.rows).unsqueeze(1);
}

// h_{t-1} of the rows of one step where the state is projected; otherwise the kernel writes them.
void copy_previous(const Problem& p, const BackwardTensors& t, int64_t d, const Place& now,
                   const Place* before) {
  const int64_t Hr = p.shape.Hr(), kept = before ? std::min(now.rows, before->rows) : 0;
  Tensor to = t.previous[d].narrow(0, now.first, now.rows);
  if (kept > 0) to.narrow(0, 0, kept).copy_(t.output.narrow(0, before->first, kept).narrow(1, d * Hr, Hr));
  Tensor rest = to.narrow(0, kept, now.rows - kept);
  t.h0.defined() ? rest.copy_(t.h0.select(0, d).narrow(0, kept, now.rows - kept)) : rest.zero_();
  if (t.reset.defined()) to.masked_fill_(reset_rows(t, now), 0);
}

}  // namespace

template <class T>
void step_backward_scan(const Problem& p, BackwardTensors& t, void* stream) {
  using A = Accumulate<T>;
  const Shape& s = p.shape;
  const int64_t Hr = s.Hr(), stride = s.D * Hr, saved_row = p.cell.saved * s.H,
                grads_row = p.cell.gate_grads * s.H;
  // The gradient that reaches a step from the one after it: that of h_n at first, of h_0 at last.
  Tensor dh = p.allocate({s.D, s.B, Hr}, p.accumulate), dhidden;
  t.grad_hn.defined() ? dh.copy_(t.grad_hn) : dh.zero_();
  if (s.P > 0) dhidden = p.allocate({s.D, s.B, s.H}, p.accumulate);
  const Tensor w_hh = stacked(p, &DirectionWeights::w_hh);
  const Tensor w_hr = s.P > 0 ? stacked(p, &DirectionWeights::w_hr) : Tensor();
  for (int64_t d = 0; d < s.D && t.wants_previous; ++d) t.previous.push_back(p.allocate({s.N, Hr}));

  StepBackward<T> args{};
  args.I = s.I, args.H = s.H, args.D = s.D;
  for (int64_t order = s.T - 1; order >= 0; --order) {
    Tensor operands[2];
    for (int64_t d = 0; d < s.D; ++d) {
      const Place now = place(s, d, order);
      const Place earlier = order > 0 ? place(s, d, order - 1) : Place{};
      const Place* before = order > 0 ? &earlier : nullptr;
      StepBackwardDirection<T>& to = args.direction[d];
      to.rows = now.rows;
      to.saved = input_at<T>(t.saved, (d * s.N + now.first) * saved_row);
      to.reset = input_at<bool>(t.reset, now.first);
      if (p.cell.cell_state)
        to.c = previous_state<T>(input_at<T>(t.saved, d * s.N * saved_row + Lstm::kSavedCell * s.H),
                                 saved_row, before, input_at<T>(t.c0, d * s.B * s.H));
      to.carry = output_at<A>(t.carry, d * s.B * s.H);
      to.dgates = output_at<T>(t.dgates[d], now.first * grads_row);
      if (s.P == 0) {
        const T* output = input_at<T>(t.output, d * Hr);
        to.output = output + now.first * stride;
        to.output_stride = stride;
        to.h = previous_state<T>(output, stride, before, input_at<T>(t.h0, d * s.B * Hr));
        to.grad_output = input_at<T>(t.grad_output, d * Hr + now.first * stride);
        to.grad_output_stride = stride;
        to.dh = input_at<A>(dh, d * s.B * Hr);
        if (t.wants_previous) to.previous = output_at<T>(t.previous[d], now.first * Hr);
      } else {
        operands[d] = t.dh[d].narrow(0, now.first, now.rows);
        const Tensor from_after = dh.select(0, d).narrow(0, 0, now.rows);
        if (t.grad_output.defined())
          at::add_out(operands[d], from_after,
                      t.grad_output.narrow(0, now.first, now.rows).narrow(1, d * Hr, Hr));
        else
          operands[d].copy_(from_after);
        to.dh = input_at<A>(dhidden, d * s.B * s.H);
        if (t.wants_previous) copy_previous(p, t, d, now, before);
      }
    }
    if (s.P > 0) products(dhidden, operands, w_hr, s.D);
    check(step_backward(p.cell.kind, args, stream), "step_backward", p);
    if (order == 0 && !t.wants_dh0) break;
    for (int64_t d = 0; d < s.D; ++d) {
      const Place now = place(s, d, order);
      operands[d] = t.dgates[d].narrow(0, now.first, now.rows).narrow(1, 0, p.cell.gates * s.H);
    }
    products(dh, operands, w_hh, s.D);
    for (int64_t d = 0; d < s.D && t.reset.defined(); ++d)  // nothing flows back through a reset
      dh.select(0, d).narrow(0, 0, operands[d].size(0)).masked_fill_(reset_rows(t, place(s, d, order)), 0);
  }
  if (!t.wants_dh0) return;
  if (p.cell.carry && !p.cell.cell_state) dh.add_(t.carry);  // what reached h_0 past the product
  t.dh0 = p.is_cell ? dh.select(0, 0) : dh;
}

#define INSTANTIATE(T)                                                                               \
  template void step_forward_scan<T>(const Problem&, const CudaPlan&, bool, ForwardTensors&, void*); \
  template void step_backward_scan<T>(const Problem&, BackwardTensors&, void*);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(Half)
INSTANTIATE(BFloat16)
#undef INSTANTIATE

}  // namespace frnn
