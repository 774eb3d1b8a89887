// The forward operators: check, allocate, multiply the input of all steps first where the plan says so, scan.
#include <ATen/Parallel.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

#include "problem.h"

namespace frnn {
namespace {

struct ForwardResult {
  Tensor output, hn, cn, saved;  // [N, D*Hr], [D, B, Hr], [D, B, H], [D, N, kSaved*H]
};

template <class T>
void scan(const Problem& p, const Tensor& x, const Tensor& h0, bool save, ForwardResult& result) {
  const CpuKernels& kernels = *instruction_set().kernels;
  const Shape& s = p.shape;
  ForwardArgs<T> args{};
  args.shape = s;
  args.threads = at::get_num_threads();
  const auto problem = sizeof(T) == 4 ? kernels.problem_float : kernels.problem_double;
  const bool fuse_input = plan_cpu(problem(p.cell.kind, s, args.threads, false)).fuse_input;

  Tensor gates_x[2];
  for (int64_t d = 0; d < s.D; ++d) {
    const DirectionWeights& w = p.weights[d];
    ForwardDirection<T>& to = args.direction[d];
    if (fuse_input) {
      to.x = input_of<T>(x);
      to.w_ih = input_of<T>(w.w_ih);
      to.b_ih = input_of<T>(w.b_ih);
    } else {
      gates_x[d] = w.b_ih.defined() ? at::addmm(w.b_ih, x, w.w_ih.t()) : at::mm(x, w.w_ih.t());
      to.gates_x = input_of<T>(gates_x[d]);
    }
    to.reverse = d == 1;
    to.w_hh = input_of<T>(w.w_hh);
    to.b_hh = input_of<T>(w.b_hh);
    to.w_hr = input_of<T>(w.w_hr);
    if (h0.defined()) to.h0 = input_of<T>(h0) + d * s.B * s.Hr();
    to.output = output_of<T>(result.output) + d * s.Hr();
    to.output_stride = s.D * s.Hr();
    if (result.hn.defined()) to.hn = output_of<T>(result.hn) + d * s.B * s.Hr();
    if (p.cell.cell_state) to.c = output_of<T>(result.cn) + d * s.B * s.H;
    if (save) to.saved = output_of<T>(result.saved) + d * s.N * p.cell.saved * s.H;
  }
  kernels.forward(p.cell.kind, args);
}

// hn is left undefined unless wanted.
ForwardResult forward(const Problem& p, const Tensor& input, const OptTensor& h0, const OptTensor& c0,
                      bool save, bool want_hn) {
  const Shape& s = p.shape;
  const Tensor rows = input.dim() == 2 ? input : input.reshape({s.N, input.size(-1)});
  const Tensor x = p.operand(rows, {s.N, s.I}, "input");
  const Tensor h = p.state(h0, s.Hr(), "h0");
  const Tensor c = p.state(c0, s.H, "c0");
  ForwardResult result;
  result.output = p.allocate({s.N, s.D * s.Hr()});
  if (want_hn) result.hn = p.allocate_state(s.Hr());
  result.saved = p.allocate({save ? s.D : 0, s.N, p.cell.saved * s.H});
  result.cn = p.cell.cell_state ? p.allocate_state(s.H) : p.allocate({0});
  if (p.cell.cell_state) {  // c_t is updated in place
    if (c.defined())
      result.cn.copy_(c);
    else
      result.cn.zero_();
  }
  if (p.empty()) {
    if (want_hn && s.B > 0) result.hn = h.defined() ? h.clone() : result.hn.zero_();
  } else if (p.compute == at::kFloat) {
    scan<float>(p, x, h, save, result);
  } else {
    scan<double>(p, x, h, save, result);
  }
  p.to_dtype(result.output);
  p.to_dtype(result.hn);
  p.to_dtype(result.cn);
  return result;
}

}  // namespace

Tensors4 layer_forward(std::string_view cell, const Tensor& input, const OptTensor& batch_sizes,
                       const OptTensor& h0, const OptTensor& c0, const Tensor& w_ih, const Tensor& w_hh,
                       const OptTensor& b_ih, const OptTensor& b_hh, const OptTensor& w_hr,
                       const OptTensor& w_ih_reverse, const OptTensor& w_hh_reverse,
                       const OptTensor& b_ih_reverse, const OptTensor& b_hh_reverse,
                       const OptTensor& w_hr_reverse, bool save) {
  const PlainDispatch guard;
  std::vector<DirectionWeights> weights{direction_weights(w_ih, w_hh, b_ih, b_hh, w_hr)};
  if (w_ih_reverse.has_value())
    weights.push_back(
        direction_weights(w_ih_reverse, w_hh_reverse, b_ih_reverse, b_hh_reverse, w_hr_reverse));
  const Problem p(cell_traits(cell), steps_of(input, batch_sizes), std::move(weights), input.scalar_type(),
                  false);
  ForwardResult r = forward(p, input, h0, c0, save, true);
  if (input.dim() == 3) r.output = r.output.view({p.shape.T, p.shape.B, r.output.size(1)});
  return {r.output, r.hn, r.cn, r.saved};
}

Tensors3 cell_forward(std::string_view cell, const Tensor& input, const OptTensor& h0, const OptTensor& c0,
                      const Tensor& w_ih, const Tensor& w_hh, const OptTensor& b_ih, const OptTensor& b_hh,
                      bool save) {
  const PlainDispatch guard;
  const Problem p(cell_traits(cell), one_step(input), {direction_weights(w_ih, w_hh, b_ih, b_hh, {})},
                  input.scalar_type(), true);
  ForwardResult r = forward(p, input, h0, c0, save, false);
  return {r.output, r.cn, r.saved};
}

}  // namespace frnn
