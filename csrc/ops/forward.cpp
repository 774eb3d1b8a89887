// The forward operators: check, allocate, scan.
#include "scan.h"

namespace frnn {
namespace {

// Of a call without rows or units.
void pass_states_through(ForwardTensors& t) {
  if (t.hn.defined()) t.h0.defined() ? t.hn.copy_(t.h0) : t.hn.zero_();
  if (t.cn.numel() > 0) t.c0.defined() ? t.cn.copy_(t.c0) : t.cn.zero_();
}

// hn is left undefined unless wanted.
ForwardTensors forward(const Problem& p, const Tensor& input, const OptTensor& h0, const OptTensor& c0,
                       bool save, bool want_hn, const OptTensor& reset = {}) {
  const Shape& s = p.shape;
  ForwardTensors t;
  const bool padded = input.dim() == 3, as_given = padded && p.backend.padded_rows;
  if (as_given)
    t.x = p.operand(input, {s.T, s.B, s.I}, "input");
  else
    t.x = p.operand(padded ? input.reshape({s.N, input.size(-1)}) : input, {s.N, s.I}, "input");
  t.h0 = p.state(h0, s.Hr(), "h0");
  t.c0 = p.state(c0, s.H, "c0");
  t.reset = p.mask(reset, "reset");
  t.output = as_given ? p.allocate({s.T, s.B, s.D * s.Hr()}) : p.allocate({s.N, s.D * s.Hr()});
  if (want_hn) t.hn = p.allocate_state(s.Hr());
  t.saved = p.allocate({save ? s.D : 0, s.N, p.cell.saved * s.H}, p.kept);
  t.cn = p.cell.cell_state ? p.allocate_state(s.H, p.kept) : p.allocate({0});
  if (!p.empty())
    p.backend.forward(p, save, t);
  else
    pass_states_through(t);
  if (padded && !as_given) t.output = t.output.view({s.T, s.B, s.D * s.Hr()});
  p.to_dtype(t.output);
  p.to_dtype(t.hn);
  p.to_dtype(t.cn);
  return t;
}

}  // namespace

Tensors4 layer_of(const CellTraits& cell, const Tensor& input, const OptTensor& batch_sizes,
                  const OptTensor& h0, const OptTensor& c0, std::vector<DirectionWeights> weights, bool save,
                  const OptTensor& reset) {
  const Problem p(cell, steps_of(input, batch_sizes), std::move(weights), input, false, Stage::forward);
  ForwardTensors r = forward(p, input, h0, c0, save, true, reset);
  return {r.output, r.hn, r.cn, r.saved};
}

Tensors4 layer_forward(std::string_view cell, const Tensor& input, const OptTensor& batch_sizes,
                       const OptTensor& h0, const OptTensor& c0, const Tensor& w_ih, const Tensor& w_hh,
                       const OptTensor& b_ih, const OptTensor& b_hh, const OptTensor& w_hr,
                       const OptTensor& w_ih_reverse, const OptTensor& w_hh_reverse,
                       const OptTensor& b_ih_reverse, const OptTensor& b_hh_reverse,
                       const OptTensor& w_hr_reverse, bool save, const OptTensor& reset) {
  const PlainDispatch guard;
  std::vector<DirectionWeights> weights{direction_weights(w_ih, w_hh, b_ih, b_hh, w_hr)};
  if (w_ih_reverse.has_value())
    weights.push_back(
        direction_weights(w_ih_reverse, w_hh_reverse, b_ih_reverse, b_hh_reverse, w_hr_reverse));
  return layer_of(cell_traits(cell), input, batch_sizes, h0, c0, std::move(weights), save, reset);
}

Tensors3 cell_forward(std::string_view cell, const Tensor& input, const OptTensor& h0, const OptTensor& c0,
                      const Tensor& w_ih, const Tensor& w_hh, const OptTensor& b_ih, const OptTensor& b_hh,
                      bool save) {
  const PlainDispatch guard;
  const Problem p(cell_traits(cell), one_step(input), {direction_weights(w_ih, w_hh, b_ih, b_hh, {})}, input,
                  true, Stage::forward);
  ForwardTensors r = forward(p, input, h0, c0, save, false);
  return {r.output, r.cn, r.saved};
}

}  // namespace frnn
