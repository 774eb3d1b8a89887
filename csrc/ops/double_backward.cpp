// The second derivative of a layer. Let J be the derivative of the outputs by the arguments, g what arrives from the
// outputs, J^T g the backward pass. Its derivative in a direction v of the arguments is, for the gradients g, J v: one
// tangent scan forward; and for the arguments, the product of v with the Hessian of <g, outputs>, which is symmetric:
// how J^T g changes along v. That is the backward pass once more, with tangents (csrc/cells/dual.h).
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/tanh.h>

#include "../cpu/kernels.h"
#include "gradients.h"

namespace frnn {
namespace {

// A layer's arguments, or the direction v in which they change; undefined: absent, or no change.
struct Arguments {
  Tensor x, h0, c0;  // [N, I], [D, B, Hr], [D, B, H]
  std::vector<DirectionWeights> weights;
};

struct Tensors {
  Tensor output, saved;  // as in BackwardTensors
  Tensor dh;             // [D, N, Hr], of every h_t
  Tensor output_tangent, hn_tangent, c_tangent, saved_tangent;
  // By direction: h_{t-1} and, with a projection, h before it, of every row.
  std::vector<Tensor> previous, hidden;
  // By direction, [N, kGateGrads*H], and how they change.
  std::vector<Tensor> dgates, dgates_tangent;
  Tensor dh_tangent;  // [D, N, P]; undefined without a projection
  Tensor carry, carry_tangent, dh0_tangent;
};

// Operands of the scan forward that come from products over all steps: see TangentDirection.
struct Sources {
  Tensor x, hh, hr;
};

// `sum` [N, units] gains rows weights^T, or begins as it if undefined. Fewer than N rows: see rows_after.
void add_product(const Problem& p, Tensor& sum, const Tensor& rows, const Tensor& weights, int64_t d) {
  const bool add = sum.defined();
  if (!add) sum = p.allocate({p.shape.N, weights.size(0)});
  multiply(rows_after(rows, sum, d), rows, weights.t().contiguous(), add);
  const int64_t others = p.shape.N - rows.size(0);
  if (!add && others > 0) sum.narrow(0, d == 0 ? 0 : rows.size(0), others).zero_();
}

Sources sources_of(const Problem& p, const Tensors& t, const Arguments& a, const Arguments& v, int64_t d) {
  const DirectionWeights &w = a.weights[d], &wv = v.weights[d];
  Sources s;
  const bool now = !steps_input(p);  // otherwise step by step
  if (now && v.x.defined()) add_product(p, s.x, v.x, w.w_ih, d);
  if (now && wv.w_ih.defined()) add_product(p, s.x, a.x, wv.w_ih, d);
  // Where the two sides of a gate are simply added, so are their changes.
  if (now && wv.w_hh.defined())
    add_product(p, p.cell.gate_grads == p.cell.gates ? s.x : s.hh, t.previous[d], wv.w_hh, d);
  if (wv.w_hr.defined()) add_product(p, s.hr, t.hidden[d], wv.w_hr, d);
  return s;
}

template <class T>
const T* at_direction(const Problem& p, const Tensor& tensor, int64_t d) {
  return tensor.defined() ? input_of<T>(tensor) + d * tensor.numel() / p.D() : nullptr;
}
template <class T>
T* at_direction_of(const Problem& p, Tensor& tensor, int64_t d) {
  return tensor.defined() ? output_of<T>(tensor) + d * tensor.numel() / p.D() : nullptr;
}

template <class T>
TangentDirection<T> tangent_direction(const Problem& p, Tensors& t, const Arguments& a, const Arguments& v,
                                      const Sources& sources, int64_t d) {
  TangentDirection<T> to{};
  const int64_t Hr = p.shape.Hr();
  to.reverse = d == 1;
  to.w_hh = input_of<T>(a.weights[d].w_hh);
  to.w_hr = input_of<T>(a.weights[d].w_hr);
  to.h0 = at_direction<T>(p, a.h0, d);
  to.c0 = at_direction<T>(p, a.c0, d);
  to.output = input_of<T>(t.output) + d * Hr;
  to.saved = at_direction<T>(p, t.saved, d);
  to.x_tangent = input_of<T>(sources.x);
  to.hh_tangent = input_of<T>(sources.hh);
  if (steps_input(p)) {
    to.x = input_of<T>(a.x);
    to.x_change = input_of<T>(v.x);
    if (v.x.defined()) to.w_ih = input_of<T>(a.weights[d].w_ih);
    to.w_ih_tangent = input_of<T>(v.weights[d].w_ih);
    to.w_hh_tangent = input_of<T>(v.weights[d].w_hh);
  }
  to.b_ih_tangent = input_of<T>(v.weights[d].b_ih);
  to.b_hh_tangent = input_of<T>(v.weights[d].b_hh);
  to.hr_tangent = input_of<T>(sources.hr);
  to.h0_tangent = at_direction<T>(p, v.h0, d);
  to.c0_tangent = at_direction<T>(p, v.c0, d);
  to.output_tangent = output_of<T>(t.output_tangent) + d * Hr;
  to.output_stride = p.D() * Hr;
  to.hn_tangent = at_direction_of<T>(p, t.hn_tangent, d);
  to.c_tangent = at_direction_of<T>(p, t.c_tangent, d);
  to.saved_tangent = at_direction_of<T>(p, t.saved_tangent, d);
  return to;
}

template <class T>
void scan(const Problem& p, Tensors& t, const Arguments& a, const Arguments& v, bool backward) {
  const Shape& s = p.shape;
  const CpuKernels& kernels = *instruction_set().kernels;
  TangentArgs<T> forward{};
  forward.shape = s;
  forward.threads = at::get_num_threads();
  {
    Sources sources[2];
    for (int64_t d = 0; d < s.D; ++d) {
      sources[d] = sources_of(p, t, a, v, d);
      forward.direction[d] = tangent_direction<T>(p, t, a, v, sources[d], d);
    }
    kernels.tangent(p.cell.kind, forward);
  }
  if (!backward) return;
  DualBackwardArgs<T> args{};
  args.shape = s;
  args.threads = forward.threads;
  for (int64_t d = 0; d < s.D; ++d) {
    DualBackwardDirection<T>& to = args.direction[d];
    to.forward = forward.direction[d];
    to.w_hh_tangent = input_of<T>(v.weights[d].w_hh);
    to.w_hr_tangent = input_of<T>(v.weights[d].w_hr);
    to.dh = at_direction<T>(p, t.dh, d);
    to.dh_tangent = at_direction_of<T>(p, t.dh_tangent, d);
    for (auto* gradients : {&t.dgates, &t.dgates_tangent})
      gradients->push_back(p.allocate({s.N, p.cell.gate_grads * s.H}));
    to.dgates = output_of<T>(t.dgates[d]);
    to.dgates_tangent = output_of<T>(t.dgates_tangent[d]);
    to.carry = at_direction_of<T>(p, t.carry, d);
    to.carry_tangent = at_direction_of<T>(p, t.carry_tangent, d);
    to.dh0_tangent = at_direction_of<T>(p, t.dh0_tangent, d);
  }
  kernels.dual_backward(p.cell.kind, args);
}

// How a weight's gradient a^T b changes: `result` becomes a_change^T b + a^T b_change.
void product_change(const Tensor& result, const Tensor& a, const Tensor& a_change, const Tensor& b,
                    const Tensor& b_change) {
  sum_over_rows(result, a_change, b, false);
  if (b_change.defined()) sum_over_rows(result, a, b_change, true);
}

void add_weight_changes(const Problem& p, const Tensors& t, const Arguments& a, const Arguments& v, int64_t d,
                        const Wanted& wanted, Tensor* changes) {
  const Shape& s = p.shape;
  const Tensor &dgates = t.dgates[d], &dgates_change = t.dgates_tangent[d];
  const int64_t GH = p.cell.gates * s.H;
  const auto sides = input_side(p.cell, s.H);
  Tensor* result = changes + kFirstWeight + d * kWeightCount;
  if (wanted.weight(d, kWih)) {
    result[kWih] = p.allocate({GH, s.I});
    for (const InputSide& side : sides)
      product_change(part(result[kWih], 0, side.row, side.count), part(dgates, 1, side.column, side.count),
                     part(dgates_change, 1, side.column, side.count), a.x, v.x);
  }
  if (wanted.weight(d, kWhh)) {
    result[kWhh] = p.allocate({GH, s.Hr()});
    const Tensor &previous = t.previous[d], change = previous_hidden(p, t.output_tangent, v.h0, d);
    sum_over_rows(result[kWhh], rows_after(previous, part(dgates_change, 1, 0, GH), d), previous, false);
    sum_over_rows(result[kWhh], rows_after(change, part(dgates, 1, 0, GH), d), change, true);
  }
  if (wanted.weight(d, kBhh)) result[kBhh] = part(dgates_change, 1, 0, GH).sum(0);
  if (wanted.weight(d, kBih)) {
    result[kBih] = result[kBhh].defined() ? result[kBhh].clone() : part(dgates_change, 1, 0, GH).sum(0);
    for (const InputSide& side : sides)
      if (side.column != side.row) {
        Tensor rows = part(result[kBih], 0, side.row, side.count);
        at::sum_out(rows, part(dgates_change, 1, side.column, side.count), 0);
      }
  }
  if (s.P > 0 && wanted.weight(d, kWhr)) {
    const Tensor saved = t.saved.select(0, d).view({s.N, p.cell.saved, s.H});
    const Tensor saved_tangent = t.saved_tangent.select(0, d).view({s.N, p.cell.saved, s.H});
    const Tensor tanh_c = saved.select(1, Lstm::kSavedCell).tanh();
    const Tensor o = saved.select(1, Lstm::kSavedOutput);
    const Tensor hidden_tangent = saved_tangent.select(1, Lstm::kSavedOutput) * tanh_c +
                                  o * (1 - tanh_c * tanh_c) * saved_tangent.select(1, Lstm::kSavedCell);
    result[kWhr] = p.allocate({s.P, s.H});
    product_change(result[kWhr], t.dh.select(0, d), t.dh_tangent.select(0, d), t.hidden[d], hidden_tangent);
  }
}

Tensor input_change(const Problem& p, const Tensors& t, const Arguments& a, const Arguments& v) {
  Tensor result;
  const auto add = [&](const InputSide& side, const Tensor& dgates, const Tensor& w_ih) {
    if (w_ih.defined())
      p.backend.add_product(result, part(dgates, 1, side.column, side.count),
                            part(w_ih, 0, side.row, side.count));
  };
  for (int64_t d = 0; d < p.D(); ++d)
    for (const InputSide& side : input_side(p.cell, p.shape.H)) {
      add(side, t.dgates_tangent[d], a.weights[d].w_ih);
      add(side, t.dgates[d], v.weights[d].w_ih);
    }
  return result;
}

Tensor zeros_like_state(const Problem& p, int64_t size) { return p.allocate_state(size).zero_(); }

}  // namespace

Tensors16 layer_double_backward(std::string_view cell, const Tensor& dh, const OptTensor& grad_cn,
                                const OptTensor& input, const OptTensor& batch_sizes, const OptTensor& h0,
                                const OptTensor& c0, const Tensor& w_ih, const Tensor& w_hh,
                                const OptTensor& b_ih, const OptTensor& b_hh, const OptTensor& w_hr,
                                const OptTensor& w_ih_reverse, const OptTensor& w_hh_reverse,
                                const OptTensor& b_ih_reverse, const OptTensor& b_hh_reverse,
                                const OptTensor& w_hr_reverse, const OptTensor& v_input,
                                const OptTensor& v_h0, const OptTensor& v_c0, const OptTensor& v_w_ih,
                                const OptTensor& v_w_hh, const OptTensor& v_b_ih, const OptTensor& v_b_hh,
                                const OptTensor& v_w_hr, const OptTensor& v_w_ih_reverse,
                                const OptTensor& v_w_hh_reverse, const OptTensor& v_b_ih_reverse,
                                const OptTensor& v_b_hh_reverse, const OptTensor& v_w_hr_reverse,
                                const Tensor& output, const Tensor& saved, int64_t needs) {
  const PlainDispatch guard;
  std::vector<DirectionWeights> weights{direction_weights(w_ih, w_hh, b_ih, b_hh, w_hr)};
  if (w_ih_reverse.has_value())
    weights.push_back(
        direction_weights(w_ih_reverse, w_hh_reverse, b_ih_reverse, b_hh_reverse, w_hr_reverse));
  const Problem p(cell_traits(cell), steps_of(output, batch_sizes), std::move(weights), output, false,
                  Stage::derivable);
  const Shape& s = p.shape;
  const int64_t GH = p.cell.gates * s.H;
  const auto arguments = [&](const OptTensor& x, const OptTensor& h, const OptTensor& c) {
    return Arguments{
        p.operand(as_rows(p, x), {s.N, s.I}, "input"), p.state(h, s.Hr(), "h0"), p.state(c, s.H, "c0"), {}};
  };
  Arguments a = arguments(input, h0, c0), v = arguments(v_input, v_h0, v_c0);
  a.weights = p.weights;
  v.weights = {
      direction_weights(v_w_ih, v_w_hh, v_b_ih, v_b_hh, v_w_hr),
      direction_weights(v_w_ih_reverse, v_w_hh_reverse, v_b_ih_reverse, v_b_hh_reverse, v_w_hr_reverse)};
  for (DirectionWeights& w : v.weights)
    w = {p.operand(w.w_ih, {GH, s.I}, "v_w_ih"), p.operand(w.w_hh, {GH, s.Hr()}, "v_w_hh"),
         p.operand(w.b_ih, {GH}, "v_b_ih"), p.operand(w.b_hh, {GH}, "v_b_hh"),
         p.operand(w.w_hr, {s.P, s.H}, "v_w_hr")};

  Tensors t;
  t.output = p.operand(as_rows(p, output), {s.N, s.D * s.Hr()}, "output");
  t.saved = p.operand(saved, {s.D, s.N, p.cell.saved * s.H}, "saved");
  t.dh = p.operand(dh, {s.D, s.N, s.Hr()}, "dh");
  const Tensor grad_cell = p.state(grad_cn, s.H, "grad_cn");
  const Wanted wanted{needs >> 3};  // of the arguments; the lowest three bits are those of the gradients
  for (int64_t d = 0; d < s.D; ++d)
    TORCH_CHECK(!(v.weights[d].w_ih.defined() || wanted.weight(d, kWih)) || a.x.defined(),
                "fused_rnn: a second derivative by w_ih needs input");

  t.output_tangent = p.allocate({s.N, s.D * s.Hr()});
  t.hn_tangent = zeros_like_state(p, s.Hr());
  t.saved_tangent = p.allocate({s.D, s.N, p.cell.saved * s.H});
  if (p.cell.cell_state) t.c_tangent = v.c0.defined() ? v.c0.clone() : zeros_like_state(p, s.H);
  for (int64_t d = 0; d < s.D; ++d) {
    t.previous.push_back(previous_hidden(p, t.output, a.h0, d));
    if (s.P) {
      const Tensor gates = t.saved.select(0, d).view({s.N, p.cell.saved, s.H});
      t.hidden.push_back(gates.select(1, Lstm::kSavedCell).tanh().mul_(gates.select(1, Lstm::kSavedOutput)));
    }
  }
  if (s.P > 0) t.dh_tangent = p.allocate({s.D, s.N, s.P});
  if (p.cell.carry) {
    t.carry = p.cell.cell_state && grad_cell.defined() ? grad_cell.clone() : zeros_like_state(p, s.H);
    t.carry_tangent = zeros_like_state(p, s.H);
  }
  if (wanted(kH0)) t.dh0_tangent = zeros_like_state(p, s.Hr());
  Gradients changes;
  if (p.empty()) {
    t.output_tangent.zero_();
    changes = gradients_of_nothing(p, wanted);
  } else {
    p.compute == at::kFloat ? scan<float>(p, t, a, v, wanted.bits) : scan<double>(p, t, a, v, wanted.bits);
    if (wanted(kInput)) changes[kInput] = input_change(p, t, a, v);
    changes[kH0] = t.dh0_tangent;
    if (wanted(kC0)) changes[kC0] = t.carry_tangent;
    for (int64_t d = 0; d < s.D; ++d) add_weight_changes(p, t, a, v, d, wanted, changes.data());
  }
  if (changes[kInput].defined() && output.dim() == 3) changes[kInput] = changes[kInput].view({s.T, s.B, s.I});
  t.output_tangent = t.output_tangent.view(output.sizes());
  for (Tensor* tensor : {&t.output_tangent, &t.hn_tangent, &t.c_tangent}) p.to_dtype(*tensor);
  for (Tensor& change : changes) p.to_dtype(change);
  const auto if_needed = [&](int k, const Tensor& tensor) { return (needs >> k) & 1 ? tensor : Tensor(); };
  return std::tuple_cat(
      std::make_tuple(if_needed(0, t.output_tangent), if_needed(1, t.hn_tangent), if_needed(2, t.c_tangent)),
      changes);
}

}  // namespace frnn
