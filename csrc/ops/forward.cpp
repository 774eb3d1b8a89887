// The forward operators: check, allocate, project the input of all steps by one matrix product, scan.
#include <ATen/Parallel.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

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
  const bool direct = plan_cpu(problem(p.cell.kind, s, args.threads, false)).direct;

  Tensor gates_x[2];
  for (int64_t d = 0; d < s.D; ++d) {
    const DirectionWeights& w = p.weights[d];
    ForwardDirection<T>& to = args.direction[d];
    if (direct) {
      to.x = pointer<T>(x);
      to.w_ih = pointer<T>(w.w_ih);
      to.b_ih = pointer<T>(w.b_ih);
    } else {
      gates_x[d] = w.b_ih.defined() ? at::addmm(w.b_ih, x, w.w_ih.t()) : at::mm(x, w.w_ih.t());
      to.gates_x = pointer<T>(gates_x[d]);
    }
    to.reverse = d == 1;
    to.w_hh = pointer<T>(w.w_hh);
    to.b_hh = pointer<T>(w.b_hh);
    to.w_hr = pointer<T>(w.w_hr);
    if (h0.defined()) to.h0 = pointer<T>(h0) + d * s.B * s.Hr();
    to.output = pointer<T>(result.output) + d * s.Hr();
    to.output_stride = s.D * s.Hr();
    if (result.hn.defined()) to.hn = pointer<T>(result.hn) + d * s.B * s.Hr();
    if (p.cell.cell_state) to.c = pointer<T>(result.cn) + d * s.B * s.H;
    if (save) to.saved = pointer<T>(result.saved) + d * s.N * p.cell.saved * s.H;
  }
  kernels.forward(p.cell.kind, args);
}

// x: [N, I] in any of the call's dtypes. hn is left undefined unless wanted.
ForwardResult forward(const Problem& p, const Tensor& input, const OptTensor& h0, const OptTensor& c0, bool save,
                      bool want_hn) {
  const Shape& s = p.shape;
  const Tensor x = p.operand(input.reshape({s.N, input.size(-1)}), {s.N, s.I}, "input");
  const Tensor h = p.operand(h0, {s.D, s.B, s.Hr()}, "h0");
  const Tensor c = p.operand(c0, {s.D, s.B, s.H}, "c0");
  ForwardResult result;
  result.output = p.allocate({s.N, s.D * s.Hr()});
  if (want_hn) result.hn = p.allocate({s.D, s.B, s.Hr()});
  result.saved = p.allocate({save ? s.D : 0, s.N, p.cell.saved * s.H});
  if (!p.cell.cell_state)
    result.cn = p.allocate({0});
  else if (!c.defined())
    result.cn = at::zeros({s.D, s.B, s.H}, at::dtype(p.compute));
  else
    result.cn = c.clone();  // c_t is updated in place
  if (p.empty()) {
    if (want_hn && s.B > 0) result.hn = h.defined() ? h.clone() : result.hn.zero_();
  } else if (p.compute == at::kFloat) {
    scan<float>(p, x, h, save, result);
  } else {
    scan<double>(p, x, h, save, result);
  }
  result.output = result.output.to(p.dtype);
  if (want_hn) result.hn = result.hn.to(p.dtype);
  result.cn = result.cn.to(p.dtype);
  return result;
}

}  // namespace

Tensors4 layer_forward(std::string_view cell, const Tensor& input, const OptTensor& batch_sizes, const OptTensor& h0,
                       const OptTensor& c0, const Tensor& w_ih, const Tensor& w_hh, const OptTensor& b_ih,
                       const OptTensor& b_hh, const OptTensor& w_hr, const OptTensor& w_ih_reverse,
                       const OptTensor& w_hh_reverse, const OptTensor& b_ih_reverse, const OptTensor& b_hh_reverse,
                       const OptTensor& w_hr_reverse, bool save) {
  const PlainDispatch guard;
  std::vector<DirectionWeights> weights{direction_weights(w_ih, w_hh, b_ih, b_hh, w_hr)};
  if (w_ih_reverse.has_value())
    weights.push_back(direction_weights(w_ih_reverse, w_hh_reverse, b_ih_reverse, b_hh_reverse, w_hr_reverse));
  const Problem p(cell_traits(cell), steps_of(input, batch_sizes), std::move(weights), input.scalar_type());
  ForwardResult r = forward(p, input, h0, c0, save, true);
  if (input.dim() == 3) r.output = r.output.view({p.shape.T, p.shape.B, r.output.size(1)});
  return {r.output, r.hn, r.cn, r.saved};
}

Tensors3 cell_forward(std::string_view cell, const Tensor& input, const OptTensor& h0, const OptTensor& c0,
                      const Tensor& w_ih, const Tensor& w_hh, const OptTensor& b_ih, const OptTensor& b_hh,
                      bool save) {
  const PlainDispatch guard;
  TORCH_CHECK(input.dim() == 2, "fused_rnn: a cell's input must be 2-D, got ", input.dim(), "-D");
  const auto one_step = [](const OptTensor& t) { return t.has_value() ? OptTensor(t->unsqueeze(0)) : t; };
  const Problem p(cell_traits(cell), steps_of(input.unsqueeze(0), {}),
                  {direction_weights(w_ih, w_hh, b_ih, b_hh, {})}, input.scalar_type());
  ForwardResult r = forward(p, input, one_step(h0), one_step(c0), save, false);
  return {r.output, p.cell.cell_state ? r.cn.view({p.shape.B, p.shape.H}) : r.cn, r.saved};
}

}  // namespace frnn
