// The CPU's part of the operators: threads, the kernels of csrc/cpu, and sums over the rows of all steps.
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

#include <algorithm>

#include "../cpu/kernels.h"
#include "scan.h"

namespace frnn {
namespace {

template <class T>
void forward(const Problem& p, bool save, ForwardTensors& t) {
  const CpuKernels& kernels = *instruction_set().kernels;
  const Shape& s = p.shape;
  ForwardArgs<T> args{};
  args.shape = s;
  args.threads = at::get_num_threads();
  const auto problem = sizeof(T) == 4 ? kernels.problem_float : kernels.problem_double;
  const bool fuse_input = plan_cpu(problem(p.cell.kind, s, args.threads, false)).fuse_input;

  if (p.cell.cell_state) t.c0.defined() ? t.cn.copy_(t.c0) : t.cn.zero_();  // c_t is updated in place
  Tensor gates_x[2];
  for (int64_t d = 0; d < s.D; ++d) {
    const DirectionWeights& w = p.weights[d];
    ForwardDirection<T>& to = args.direction[d];
    if (fuse_input) {
      to.x = input_of<T>(t.x);
      to.w_ih = input_of<T>(w.w_ih);
      to.b_ih = input_of<T>(w.b_ih);
    } else {
      gates_x[d] = w.b_ih.defined() ? at::addmm(w.b_ih, t.x, w.w_ih.t()) : at::mm(t.x, w.w_ih.t());
      to.gates_x = input_of<T>(gates_x[d]);
    }
    to.reverse = d == 1;
    to.w_hh = input_of<T>(w.w_hh);
    to.b_hh = input_of<T>(w.b_hh);
    to.w_hr = input_of<T>(w.w_hr);
    if (t.h0.defined()) to.h0 = input_of<T>(t.h0) + d * s.B * s.Hr();
    to.output = output_of<T>(t.output) + d * s.Hr();
    to.output_stride = s.D * s.Hr();
    if (t.hn.defined()) to.hn = output_of<T>(t.hn) + d * s.B * s.Hr();
    if (p.cell.cell_state) to.c = output_of<T>(t.cn) + d * s.B * s.H;
    if (save) to.saved = output_of<T>(t.saved) + d * s.N * p.cell.saved * s.H;
  }
  kernels.forward(p.cell.kind, args);
}

template <class T>
void copy_previous(const Shape& s, const T* output, int64_t stride, const T* h0, bool reverse, T* to) {
  const int64_t Hr = s.Hr();
  at::parallel_for(0, s.T, 1 + 32768 / (1 + s.B * Hr), [&](int64_t first, int64_t last) {
    for (int64_t step = first; step < last; ++step) {
      const int64_t before = reverse ? step + 1 : step - 1;
      const bool inside = before >= 0 && before < s.T;
      for (int64_t b = 0; b < s.batch_sizes[step]; ++b) {
        T* row = to + (s.offsets[step] + b) * Hr;
        if (inside && b < s.batch_sizes[before])
          std::copy_n(output + (s.offsets[before] + b) * stride, Hr, row);
        else if (h0)
          std::copy_n(h0 + b * Hr, Hr, row);
        else
          std::fill_n(row, Hr, T(0));
      }
    }
  });
}

template <class T>
void backward(const Problem& p, BackwardTensors& t) {
  const Shape& s = p.shape;
  if (t.wants_dh0) t.dh0 = p.allocate_state(s.Hr());
  BackwardArgs<T> args{};
  args.shape = s;
  args.threads = at::get_num_threads();
  const auto at_direction = [&s](const Tensor& tensor, int64_t d) {
    return tensor.defined() ? output_of<T>(tensor) + d * tensor.numel() / s.D : nullptr;
  };
  for (int64_t d = 0; d < s.D; ++d) {
    BackwardDirection<T>& to = args.direction[d];
    to.reverse = d == 1;
    to.w_hh = input_of<T>(p.weights[d].w_hh);
    to.w_hr = input_of<T>(p.weights[d].w_hr);
    to.h0 = at_direction(t.h0, d);
    to.c0 = at_direction(t.c0, d);
    to.output = input_of<T>(t.output) + d * s.Hr();
    to.output_stride = s.D * s.Hr();
    to.saved = at_direction(t.saved, d);
    if (t.grad_output.defined()) to.grad_output = input_of<T>(t.grad_output) + d * s.Hr();
    to.grad_output_stride = s.D * s.Hr();
    to.grad_hn = at_direction(t.grad_hn, d);
    to.dgates = output_of<T>(t.dgates[d]);
    to.dproj = output_of<T>(t.dproj[d]);
    to.carry = at_direction(t.carry, d);
    to.dh0 = at_direction(t.dh0, d);
  }
  instruction_set().kernels->backward(p.cell.kind, args);
  for (int64_t d = 0; d < s.D && t.wants_previous; ++d)
    t.previous.push_back(previous_hidden(p, t.output, t.h0, d));
}

// result = a^T b of one to four rows, as a cell's step has them: not worth a call of a matrix product.
constexpr int64_t kFewRows = 4;
template <class T>
void product_over_few_rows(const Tensor& result, const Tensor& a, const Tensor& b) {
  const int64_t rows = a.size(0), columns = b.size(1), a_stride = a.stride(0), b_stride = b.stride(0);
  const T *from_a = input_of<T>(a), *from_b = input_of<T>(b);
  T* to = output_of<T>(result);
  for (int64_t i = 0; i < result.size(0); ++i, to += columns) {
    for (int64_t j = 0; j < columns; ++j) to[j] = from_a[i] * from_b[j];
    for (int64_t row = 1; row < rows; ++row)
      for (int64_t j = 0; j < columns; ++j) to[j] += from_a[row * a_stride + i] * from_b[row * b_stride + j];
  }
}

// Torch's own gradients of weights are sums of one product a step; the micro-kernel's sums are as short, and a matrix
// product of ATen's here would be one running sum over thousands of rows.
template <class T>
void sum_over_rows(const Tensor& result, const Tensor& a, const Tensor& b) {
  instruction_set().kernels->sum_over_rows(SumOverRows<T>{a.size(0), a.size(1), b.size(1), input_of<T>(a),
                                                          a.stride(0), input_of<T>(b), b.stride(0),
                                                          output_of<T>(result), at::get_num_threads()});
}

void product_over_rows(const Tensor& result, const Tensor& a, const Tensor& b, int64_t) {
  const bool single = result.scalar_type() == at::kFloat;
  if (a.size(0) <= kFewRows)
    single ? product_over_few_rows<float>(result, a, b) : product_over_few_rows<double>(result, a, b);
  else
    single ? sum_over_rows<float>(result, a, b) : sum_over_rows<double>(result, a, b);
}

template <class T>
void multiply(const Tensor& result, const Tensor& a, const Tensor& b, bool add) {
  instruction_set().kernels->multiply(RowsTimesMatrix<T>{a.size(0), a.size(1), b.size(1), input_of<T>(a),
                                                         a.stride(0), input_of<T>(b), output_of<T>(result),
                                                         add, at::get_num_threads()});
}

void add_product(Tensor& sum, const Tensor& a, const Tensor& b) {
  const bool add = sum.defined();
  if (!add) sum = at::detail::empty_cpu({a.size(0), b.size(1)}, a.scalar_type(), false, std::nullopt);
  a.scalar_type() == at::kFloat ? multiply<float>(sum, a, b, add) : multiply<double>(sum, a, b, add);
}

}  // namespace

Tensor previous_hidden(const Problem& p, const Tensor& output, const Tensor& h0, int64_t d) {
  const Shape& s = p.shape;
  const int64_t Hr = s.Hr();
  if (s.T == 1 && h0.defined()) return h0.view({s.D, s.B, Hr}).select(0, d);
  Tensor result = p.allocate({s.N, Hr});
  const auto copy = [&](auto type) {
    using T = decltype(type);
    const T* initial = h0.defined() ? input_of<T>(h0) + d * s.B * Hr : nullptr;
    copy_previous<T>(s, input_of<T>(output) + d * Hr, s.D * Hr, initial, d == 1, output_of<T>(result));
  };
  p.compute == at::kFloat ? copy(float{}) : copy(double{});
  return result;
}

const Backend kCpuBackend{
    /*widens=*/true,
    [](const Problem& p, bool save, ForwardTensors& t) {
      p.compute == at::kFloat ? forward<float>(p, save, t) : forward<double>(p, save, t);
    },
    [](const Problem& p, BackwardTensors& t) {
      p.compute == at::kFloat ? backward<float>(p, t) : backward<double>(p, t);
    },
    &product_over_rows,
    &add_product,
};

}  // namespace frnn
