// The backward operators: scan from the last step to the first, then the weights' gradients as matrix products over
// all steps.
#include <ATen/ops/mul.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/zeros.h>

#include "gradients.h"

namespace frnn {
namespace {

// [N, columns] for each direction, in one allocation; undefined without columns.
std::vector<Tensor> by_direction(const Problem& p, int64_t columns) {
  if (columns == 0) return std::vector<Tensor>(p.D());
  if (p.D() == 1) return {p.allocate({p.shape.N, columns})};
  return p.allocate({p.D(), p.shape.N, columns}).unbind(0);
}

// The allocation that by_direction made: [D, N, columns].
Tensor all_directions(const Problem& p, const std::vector<Tensor>& parts) {
  const int64_t N = p.shape.N, columns = parts[0].size(1);
  return parts[0].as_strided({p.D(), N, columns}, {N * columns, columns, 1});
}

// The operands of the products around the scan, in the dtype of the call. With few rows the products are small beside the
// passes that round; where exactly has not been measured.
constexpr int64_t kRoundedRows = 5;
void round_operands(const Problem& p, BackwardTensors& t) {
  if (p.compute == p.dtype || p.shape.N < kRoundedRows || !p.backend.multiplies(p.dtype)) return;
  for (auto* tensors : {&t.dgates, &t.dh, &t.previous})
    for (Tensor& tensor : *tensors) p.to_dtype(tensor);
  p.to_dtype(t.x);
}

BackwardTensors tensors_of(const Problem& p, const OptTensor& grad_output, const OptTensor& grad_hn,
                           const OptTensor& h0, const OptTensor& c0, const Tensor& output,
                           const Tensor& saved) {
  const Shape& s = p.shape;
  BackwardTensors t{};
  t.h0 = p.state(h0, s.Hr(), "h0");
  t.c0 = p.state(c0, s.H, "c0");
  t.output = p.operand(as_rows(p, output), {s.N, s.D * s.Hr()}, "output");
  t.saved = p.operand(saved, {s.D, s.N, p.cell.saved * s.H}, "saved", p.kept);
  t.grad_output = p.operand(as_rows(p, grad_output), {s.N, s.D * s.Hr()}, "grad_output");
  t.grad_hn = p.state(grad_hn, s.Hr(), "grad_hn");
  return t;
}

void scan(const Problem& p, BackwardTensors& t, const OptTensor& grad_cn, bool wants_dh) {
  const Shape& s = p.shape;
  const Tensor grad_cell = p.state(grad_cn, s.H, "grad_cn");
  if (p.empty()) return;
  if (t.dgates.empty()) t.dgates = by_direction(p, p.cell.gate_grads * s.H);
  t.dh = by_direction(p, s.P > 0 || wants_dh ? s.Hr() : 0);
  if (p.cell.carry) {
    t.carry = p.allocate_state(s.H, p.accumulate);
    if (p.cell.cell_state && grad_cell.defined())
      t.carry.copy_(grad_cell);
    else
      t.carry.zero_();
  }
  p.backend.backward(p, t);
}

struct Backward {
  Gradients gradients;
  Tensor dh;  // [D, N, Hr], of every h_t; undefined where not wanted
};

Backward backward(const Problem& p, const OptTensor& grad_output, const OptTensor& grad_hn,
                  const OptTensor& grad_cn, const OptTensor& input, const OptTensor& h0, const OptTensor& c0,
                  const Tensor& output, const Tensor& saved, int64_t needs, const OptTensor& adds = {},
                  const OptTensor& reset = {}) {
  const Shape& s = p.shape;
  const Wanted wanted{needs};
  BackwardTensors t = tensors_of(p, grad_output, grad_hn, h0, c0, output, saved);
  t.x = p.operand(as_rows(p, input), {s.N, s.I}, "input");
  t.reset = p.mask(reset, "reset");
  const int64_t columns = adds_columns(p.cell, s.H, s.Hr());
  if (const Tensor all = p.operand(adds, {s.D, s.N * columns}, "adds"); all.defined())
    t.adds = adds_in(p, all);
  t.wants_dh0 = wanted(kH0);
  for (int64_t d = 0; d < s.D; ++d) {
    t.wants_previous |= wanted.weight(d, kWhh);
    TORCH_CHECK(!wanted.weight(d, kWih) || t.x.defined(), "fused_rnn: the gradient of w_ih needs input");
  }
  // The gradients of the gates take the place of the gates: half of what this pass would hold otherwise.
  // A projection's gradient reads the gates after the scan.
  if (wanted(kSavedIsSpent) && p.backend.spends_saved && s.P == 0 && p.cell.saved >= p.cell.gate_grads &&
      p.kept == p.compute)
    t.dgates = part(t.saved, 2, 0, p.cell.gate_grads * s.H).unbind(0);
  const bool wants_dh = wanted(kStateGradients);
  scan(p, t, grad_cn, wants_dh);

  Backward found;
  Gradients& result = found.gradients;
  if (p.empty()) {
    result = gradients_of_nothing(p, wanted);
    if (wants_dh) found.dh = p.allocate({s.D, s.N, s.Hr()}).zero_();
  } else {
    if (wants_dh) found.dh = all_directions(p, t.dh);
    round_operands(p, t);
    result[kH0] = t.dh0;
    if (wanted(kC0)) result[kC0] = t.carry;
    for (int64_t d = 0; d < s.D; ++d) add_weight_gradients(p, t, d, wanted, result.data());
    t.previous.clear();  // as large as the input's gradient may be: never both at once
    if (wanted(kInput)) result[kInput] = input_gradient(p, t);
  }
  for (Tensor& gradient : result) p.to_dtype(gradient);
  return found;
}

template <size_t... k>
auto as_tuple(const Gradients& g, std::index_sequence<k...>) {
  return std::make_tuple(g[k]...);
}

}  // namespace

Tensor hidden_of(const Problem& p, const Tensor& saved, int64_t d) {
  const Tensor gates = saved.select(0, d).view({p.shape.N, p.cell.saved, p.shape.H});
  return gates.select(1, Lstm::kSavedCell).tanh().mul_(gates.select(1, Lstm::kSavedOutput));
}

Adds adds_in(const Problem& p, const Tensor& all) {
  const Shape& s = p.shape;
  Adds adds;
  for (int64_t d = 0; d < s.D; ++d) {
    int64_t from = 0;
    const auto next = [&](int64_t columns) {
      const Tensor rows = all.select(0, d).narrow(0, from, s.N * columns).view({s.N, columns});
      from += s.N * columns;
      return rows;
    };
    adds.gates.push_back(next(p.cell.gate_grads * s.H));
    if (p.cell.carry) adds.carry.push_back(next(s.H));
    adds.previous.push_back(next(s.Hr()));
  }
  return adds;
}

void add_weight_gradients(const Problem& p, const BackwardTensors& t, int64_t d, const Wanted& wanted,
                          Tensor* gradients) {
  const Shape& s = p.shape;
  const Tensor& dgates = t.dgates[d];
  const auto sides = input_side(p.cell, s.H);
  const Tensor recurrent = part(dgates, 1, 0, p.cell.gates * s.H);
  Tensor* result = gradients + kFirstWeight + d * kWeightCount;

  if (wanted.weight(d, kWih)) {
    result[kWih] = p.allocate({p.cell.gates * s.H, s.I});
    for (const InputSide& side : sides) {
      p.backend.product_over_rows(part(result[kWih], 0, side.row, side.count),
                                  part(dgates, 1, side.column, side.count), t.x, s.B);
    }
  }
  if (wanted.weight(d, kWhh)) {
    result[kWhh] = p.allocate({p.cell.gates * s.H, s.Hr()});
    p.backend.product_over_rows(result[kWhh], rows_after(t.previous[d], recurrent, d), t.previous[d], s.B);
  }
  if (wanted.weight(d, kBhh)) result[kBhh] = s.N == 1 ? recurrent.select(0, 0) : recurrent.sum(0);
  if (wanted.weight(d, kBih)) {
    result[kBih] = result[kBhh].defined() ? result[kBhh].clone() : recurrent.sum(0);
    for (const InputSide& side : sides)
      if (side.column != side.row) {
        Tensor rows = part(result[kBih], 0, side.row, side.count);
        at::sum_out(rows, part(dgates, 1, side.column, side.count), 0);
      }
  }
  if (wanted.weight(d, kWhr)) {
    result[kWhr] = p.allocate({s.P, s.H});
    p.backend.product_over_rows(result[kWhr], t.dh[d], hidden_of(p, t.saved, d).to(t.dh[d].scalar_type()),
                                s.B);
  }
}

Tensor input_gradient(const Problem& p, const BackwardTensors& t) {
  Tensor result;
  for (int64_t d = 0; d < p.D(); ++d)
    for (const InputSide& side : input_side(p.cell, p.shape.H))
      p.backend.add_product(result, part(t.dgates[d], 1, side.column, side.count),
                            part(p.weights[d].w_ih.to(t.dgates[d].scalar_type()), 0, side.row, side.count));
  return result;
}

Gradients gradients_of_nothing(const Problem& p, const Wanted& wanted) {
  const Shape& s = p.shape;
  Gradients result;
  const auto zero = [&](int which, at::IntArrayRef sizes) {
    if (wanted(which)) result[which] = at::zeros(sizes, at::dtype(p.compute).device(p.device));
  };
  zero(kInput, {s.N, s.I});
  for (int state : {kH0, kC0})
    if (wanted(state)) result[state] = p.allocate_state(state == kH0 ? s.Hr() : s.H).zero_();
  for (int d = 0; d < s.D; ++d) {
    const int first = kFirstWeight + d * kWeightCount;
    zero(first + kWih, {p.cell.gates * s.H, s.I});
    zero(first + kWhh, {p.cell.gates * s.H, s.Hr()});
    zero(first + kBih, {p.cell.gates * s.H});
    zero(first + kBhh, {p.cell.gates * s.H});
    zero(first + kWhr, {s.P, s.H});
  }
  return result;
}

Tensors14 layer_backward(std::string_view cell, const OptTensor& grad_output, const OptTensor& grad_hn,
                         const OptTensor& grad_cn, const OptTensor& input, const OptTensor& batch_sizes,
                         const OptTensor& h0, const OptTensor& c0, const Tensor& w_ih, const Tensor& w_hh,
                         const OptTensor& b_ih, const OptTensor& b_hh, const OptTensor& w_hr,
                         const OptTensor& w_ih_reverse, const OptTensor& w_hh_reverse,
                         const OptTensor& b_ih_reverse, const OptTensor& b_hh_reverse,
                         const OptTensor& w_hr_reverse, const Tensor& output, const Tensor& saved,
                         int64_t needs, const OptTensor& adds, const OptTensor& reset) {
  const PlainDispatch guard;
  std::vector<DirectionWeights> weights{direction_weights(w_ih, w_hh, b_ih, b_hh, w_hr)};
  if (w_ih_reverse.has_value())
    weights.push_back(
        direction_weights(w_ih_reverse, w_hh_reverse, b_ih_reverse, b_hh_reverse, w_hr_reverse));
  const Problem p(cell_traits(cell), steps_of(output, batch_sizes), std::move(weights), output, false,
                  Wanted{needs}(kStateGradients) || adds.has_value() ? Stage::derivable : Stage::backward);
  auto [g, dh] = backward(p, grad_output, grad_hn, grad_cn, input, h0, c0, output, saved, needs, adds, reset);
  if (g[kInput].defined() && output.dim() == 3) g[kInput] = g[kInput].view({p.shape.T, p.shape.B, p.shape.I});
  return std::tuple_cat(as_tuple(g, std::make_index_sequence<kGradients>()), std::make_tuple(dh));
}

Tensors4 layer_gate_gradients(std::string_view cell, const OptTensor& grad_output, const OptTensor& grad_hn,
                              const OptTensor& grad_cn, const OptTensor& batch_sizes, const OptTensor& h0,
                              const OptTensor& c0, const Tensor& w_ih, const Tensor& w_hh,
                              const OptTensor& b_ih, const OptTensor& b_hh, const OptTensor& w_hr,
                              const OptTensor& w_ih_reverse, const OptTensor& w_hh_reverse,
                              const OptTensor& b_ih_reverse, const OptTensor& b_hh_reverse,
                              const OptTensor& w_hr_reverse, const Tensor& output, const Tensor& saved,
                              const OptTensor& reset) {
  const PlainDispatch guard;
  std::vector<DirectionWeights> weights{direction_weights(w_ih, w_hh, b_ih, b_hh, w_hr)};
  if (w_ih_reverse.has_value())
    weights.push_back(
        direction_weights(w_ih_reverse, w_hh_reverse, b_ih_reverse, b_hh_reverse, w_hr_reverse));
  const Problem p(cell_traits(cell), steps_of(output, batch_sizes), std::move(weights), output, false,
                  Stage::derivable);
  const Shape& s = p.shape;
  BackwardTensors t = tensors_of(p, grad_output, grad_hn, h0, c0, output, saved);
  t.reset = p.mask(reset, "reset");
  t.wants_dh0 = t.wants_previous = true;
  scan(p, t, grad_cn, false);
  if (p.empty())
    return {p.allocate({s.D, s.N, p.cell.gate_grads * s.H}), p.allocate({s.D, s.N, s.Hr()}),
            p.allocate_state(s.Hr()).zero_(), p.allocate_state(s.H).zero_()};
  Tensor previous = at::zeros({s.D, s.N, s.Hr()}, t.previous[0].options());
  for (int64_t d = 0; d < s.D; ++d) rows_after(t.previous[d], previous.select(0, d), d).copy_(t.previous[d]);
  return {all_directions(p, t.dgates), previous, t.dh0, p.cell.cell_state ? t.carry : p.allocate({0})};
}

Tensors7 cell_backward(std::string_view cell, const OptTensor& grad_h, const OptTensor& grad_c,
                       const OptTensor& input, const OptTensor& h0, const OptTensor& c0, const Tensor& w_ih,
                       const Tensor& w_hh, const OptTensor& b_ih, const OptTensor& b_hh, const Tensor& h,
                       const Tensor& saved, int64_t needs) {
  const PlainDispatch guard;
  const Problem p(cell_traits(cell), one_step(h), {direction_weights(w_ih, w_hh, b_ih, b_hh, {})}, h, true,
                  Stage::backward);
  const Gradients g = backward(p, grad_h, {}, grad_c, input, h0, c0, h, saved, needs).gradients;
  return as_tuple(g, std::make_index_sequence<std::tuple_size_v<Tensors7>>());
}

}  // namespace frnn
