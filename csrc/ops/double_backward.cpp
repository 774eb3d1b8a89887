// The second derivative of a layer. Let J be the derivative of the outputs by the arguments, g what arrives from the
// outputs, J^T g the backward pass. Its derivative in a direction v of the arguments is, for the gradients g, J v: one
// tangent scan forward; and for the arguments, the product of v with the Hessian of <g, outputs>, which is symmetric:
// how J^T g changes along v. That is the backward pass once more, of what each step adds to that change
// (csrc/cpu/dual_backward.h). Where another backward pass is to come, it can take those along.
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
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
  Tensor carry;                // [D, B, H], holding the gradient of c_n or zero
  std::vector<Tensor> dgates;  // by direction, [N, kGateGrads*H]
};

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
                                      const Tensor& hr_tangent, int64_t d) {
  TangentDirection<T> to{};
  const int64_t Hr = p.shape.Hr();
  to.reverse = d == 1;
  to.w_hh = input_of<T>(a.weights[d].w_hh);
  to.w_hr = input_of<T>(a.weights[d].w_hr);
  to.h0 = at_direction<T>(p, a.h0, d);
  to.c0 = at_direction<T>(p, a.c0, d);
  to.output = input_of<T>(t.output) + d * Hr;
  to.saved = at_direction<T>(p, t.saved, d);
  to.x = input_of<T>(a.x);
  if (v.x.defined()) to.w_ih = input_of<T>(a.weights[d].w_ih);
  to.x_tangent = input_of<T>(v.x);
  to.w_ih_tangent = input_of<T>(v.weights[d].w_ih);
  to.w_hh_tangent = input_of<T>(v.weights[d].w_hh);
  to.b_ih_tangent = input_of<T>(v.weights[d].b_ih);
  to.b_hh_tangent = input_of<T>(v.weights[d].b_hh);
  to.hr_tangent = input_of<T>(hr_tangent);
  to.h0_tangent = at_direction<T>(p, v.h0, d);
  to.c0_tangent = at_direction<T>(p, v.c0, d);
  to.output_tangent = output_of<T>(t.output_tangent) + d * Hr;
  to.output_stride = p.D() * Hr;
  to.hn_tangent = at_direction_of<T>(p, t.hn_tangent, d);
  to.c_tangent = at_direction_of<T>(p, t.c_tangent, d);
  to.saved_tangent = at_direction_of<T>(p, t.saved_tangent, d);
  return to;
}

Tensor zeros_like_state(const Problem& p, int64_t size) { return p.allocate_state(size).zero_(); }

// rows weights, of all steps; undefined without weights.
Tensor product(const Problem& p, const Tensor& rows, const Tensor& weights) {
  Tensor result;
  if (weights.defined()) p.backend.add_product(result, rows, weights);
  return result;
}

// The scan forward: its results, and what the way back reads of it.
template <class T>
TangentArgs<T> scan(const Problem& p, Tensors& t, const Arguments& a, const Arguments& v) {
  TangentArgs<T> args{};
  args.shape = p.shape;
  args.threads = at::get_num_threads();
  std::array<Tensor, 2> hr_tangent;
  for (int64_t d = 0; d < p.D(); ++d) {
    const Tensor& change = v.weights[d].w_hr;
    if (change.defined()) hr_tangent[d] = product(p, hidden_of(p, t.saved, d), change.t().contiguous());
    args.direction[d] = tangent_direction<T>(p, t, a, v, hr_tangent[d], d);
  }
  run_tangent(p.cell.kind, args);
  return args;
}

// What each step adds to the changes of the gates' gradients, into `adds`, and those gradients.
template <class T>
void scan_steps(const Problem& p, const TangentArgs<T>& forward, Tensors& t, const Arguments& v, Adds& adds) {
  const Shape& s = p.shape;
  DualBackwardArgs<T> args{};
  args.shape = s;
  args.threads = forward.threads;
  std::array<Tensor, 2> dh, dh_change;
  for (int64_t d = 0; d < s.D; ++d) {
    dh[d] = t.dh.select(0, d);
    if (s.P > 0) {
      dh_change[d] = product(p, dh[d], v.weights[d].w_hr);
      dh[d] = product(p, dh[d], p.weights[d].w_hr);
    }
    t.dgates.push_back(p.allocate({s.N, p.cell.gate_grads * s.H}));
    DualBackwardDirection<T>& to = args.direction[d];
    to.forward = forward.direction[d];
    to.dh = input_of<T>(dh[d]);
    to.dh_change = input_of<T>(dh_change[d]);
    to.carry = at_direction_of<T>(p, t.carry, d);
    to.dgates = output_of<T>(t.dgates[d]);
    to.dgates_change = output_of<T>(adds.gates[d]);
    if (p.cell.carry) to.carry_change = output_of<T>(adds.carry[d]);
  }
  instruction_set().kernels->dual_backward(p.cell.kind, args);
  for (int64_t d = 0; d < s.D; ++d) {
    const Tensor& change = v.weights[d].w_hh;
    if (change.defined())
      multiply(adds.previous[d], part(t.dgates[d], 1, 0, p.cell.gates * s.H), change, false);
    else if (adds.previous[d].defined())
      adds.previous[d].zero_();
  }
}

// Memory for the adds of a pass that follows at once.
Adds adds_for(const Problem& p, const Tensors& t, const Arguments& v) {
  const Shape& s = p.shape;
  Adds adds;
  for (int64_t d = 0; d < s.D; ++d) {
    // What a unit has saved is read before its gradients are stored and, without a projection, never again.
    adds.gates.push_back(s.P == 0 && p.cell.saved == p.cell.gate_grads
                             ? t.saved_tangent.select(0, d)
                             : p.allocate({s.N, p.cell.gate_grads * s.H}));
    if (p.cell.carry) adds.carry.push_back(p.allocate({s.N, s.H}));
    adds.previous.push_back(v.weights[d].w_hh.defined() ? p.allocate({s.N, s.Hr()}) : Tensor());
  }
  return adds;
}

// The scan back: how the gates' gradients change, and with them those of the states.
BackwardTensors scan_back(const Problem& p, Tensors& t, Adds adds, const Arguments& a, const Wanted& wanted) {
  const Shape& s = p.shape;
  BackwardTensors changes{};
  changes.dgates = adds.gates;
  changes.adds = std::move(adds);
  for (int64_t d = 0; d < s.D; ++d) changes.dh.push_back(s.P > 0 ? p.allocate({s.N, s.P}) : Tensor());
  changes.x = a.x, changes.h0 = a.h0, changes.c0 = a.c0;
  changes.output = t.output, changes.saved = t.saved;
  if (p.cell.carry) changes.carry = zeros_like_state(p, s.H);
  changes.wants_dh0 = wanted(kH0);
  for (int64_t d = 0; d < s.D; ++d) changes.wants_previous |= wanted.weight(d, kWhh);
  p.backend.backward(p, changes);
  // Only the scans read these; the products that follow can have their memory.
  changes.adds = {};
  if (s.P == 0) t.saved_tangent.reset();
  return changes;
}

// A weight's gradient a^T b changes by that of either: these are the parts where b changes.
void add_changes_of_rows(const Problem& p, const Tensors& t, const Arguments& v, int64_t d,
                         const Wanted& wanted, Tensor* changes) {
  const Shape& s = p.shape;
  const Tensor& dgates = t.dgates[d];
  Tensor* result = changes + kFirstWeight + d * kWeightCount;
  // Whether there is a part to add to; if not, there is memory for it now.
  const auto begun = [&](int which, int64_t rows, int64_t columns) {
    if (result[which].defined()) return true;
    result[which] = p.allocate({rows, columns});
    return false;
  };
  if (wanted.weight(d, kWih) && v.x.defined()) {
    const bool add = begun(kWih, p.cell.gates * s.H, s.I);
    for (const InputSide& side : input_side(p.cell, s.H))
      sum_over_rows(part(result[kWih], 0, side.row, side.count), part(dgates, 1, side.column, side.count),
                    v.x, add);
  }
  if (wanted.weight(d, kWhh)) {
    const bool add = begun(kWhh, p.cell.gates * s.H, s.Hr());
    const Tensor change = previous_hidden(p, t.output_tangent, v.h0, d);
    sum_over_rows(result[kWhh], rows_after(change, part(dgates, 1, 0, p.cell.gates * s.H), d), change, add);
  }
  if (wanted.weight(d, kWhr)) {
    const bool add = begun(kWhr, s.P, s.H);
    const auto saved = [&](const Tensor& all, int64_t which) {
      return all.select(0, d).view({s.N, p.cell.saved, s.H}).select(1, which);
    };
    const Tensor tanh_c = saved(t.saved, Lstm::kSavedCell).tanh();
    const Tensor change =
        saved(t.saved_tangent, Lstm::kSavedOutput) * tanh_c +
        saved(t.saved, Lstm::kSavedOutput) * (1 - tanh_c * tanh_c) * saved(t.saved_tangent, Lstm::kSavedCell);
    sum_over_rows(result[kWhr], t.dh.select(0, d), change, add);
  }
}

// How the gradients of the arguments change with those of the gates: what layer_backward makes of `adds`.
Gradients changes_by_gates(const Problem& p, Tensors& t, Adds adds, const Arguments& a,
                           const Wanted& wanted) {
  const BackwardTensors back = scan_back(p, t, std::move(adds), a, wanted);
  Gradients changes;
  changes[kH0] = back.dh0;
  if (wanted(kC0)) changes[kC0] = back.carry;
  for (int64_t d = 0; d < p.D(); ++d) add_weight_gradients(p, back, d, wanted, changes.data());
  if (wanted(kInput)) changes[kInput] = input_gradient(p, back);
  return changes;
}

// How the gradients of the arguments change, without changes_by_gates if `adds` is defined: then they go there.
template <class T>
Gradients changes_of_gradients(const Problem& p, const TangentArgs<T>& forward, Tensors& t,
                               const Arguments& a, const Arguments& v, const Wanted& wanted,
                               const Tensor& adds) {
  Adds found = adds.defined() ? adds_in(p, adds) : adds_for(p, t, v);
  scan_steps(p, forward, t, v, found);
  Gradients changes;
  if (!adds.defined()) changes = changes_by_gates(p, t, std::move(found), a, wanted);
  for (int64_t d = 0; d < p.D(); ++d) {
    add_changes_of_rows(p, t, v, d, wanted, changes.data());
    if (wanted(kInput) && v.weights[d].w_ih.defined())
      for (const InputSide& side : input_side(p.cell, p.shape.H))
        p.backend.add_product(changes[kInput], part(t.dgates[d], 1, side.column, side.count),
                              part(v.weights[d].w_ih, 0, side.row, side.count));
  }
  return changes;
}

template <class T>
Gradients run(const Problem& p, Tensors& t, const Arguments& a, const Arguments& v, const Wanted& wanted,
              const Tensor& adds) {
  const TangentArgs<T> forward = scan<T>(p, t, a, v);
  return wanted.bits ? changes_of_gradients(p, forward, t, a, v, wanted, adds) : Gradients();
}

}  // namespace

Tensors17 layer_double_backward(std::string_view cell, const Tensor& dh, const OptTensor& grad_cn,
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
  t.hn_tangent = p.allocate_state(s.Hr());
  t.saved_tangent = p.allocate({s.D, s.N, p.cell.saved * s.H});
  if (p.cell.cell_state) t.c_tangent = v.c0.defined() ? v.c0.clone() : zeros_like_state(p, s.H);
  if (p.cell.carry)
    t.carry = p.cell.cell_state && grad_cell.defined() ? grad_cell.clone() : zeros_like_state(p, s.H);
  Gradients changes;
  Tensor adds;
  if (wanted(kAdds)) adds = p.allocate({s.D, s.N * adds_columns(p.cell, s.H, s.Hr())});
  if (p.empty()) {
    if (adds.defined()) adds.zero_();
    t.output_tangent.zero_();
    t.hn_tangent.zero_();
    changes = gradients_of_nothing(p, wanted);
  } else {
    changes = p.compute == at::kFloat ? run<float>(p, t, a, v, wanted, adds)
                                      : run<double>(p, t, a, v, wanted, adds);
  }
  if (changes[kInput].defined() && output.dim() == 3) changes[kInput] = changes[kInput].view({s.T, s.B, s.I});
  t.output_tangent = t.output_tangent.view(output.sizes());
  for (Tensor* tensor : {&t.output_tangent, &t.hn_tangent, &t.c_tangent}) p.to_dtype(*tensor);
  for (Tensor& change : changes) p.to_dtype(change);
  const auto if_needed = [&](int k, const Tensor& tensor) { return (needs >> k) & 1 ? tensor : Tensor(); };
  return std::tuple_cat(
      std::make_tuple(if_needed(0, t.output_tangent), if_needed(1, t.hn_tangent), if_needed(2, t.c_tangent)),
      changes, std::make_tuple(adds));
}

}  // namespace frnn
