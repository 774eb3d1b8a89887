// The CPU's part of the operators: threads, the kernels of csrc/cpu, and sums over the rows of all steps.
#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "../cpu/kernels.h"
#include "gradients.h"

namespace frnn {
namespace {

// The kernels' names for numbers whose type torch has a name of its own for.
template <class S>
const S* stored_in(const Tensor& tensor) {
  if constexpr (std::is_same_v<S, BFloat16>)
    return reinterpret_cast<const BFloat16*>(input_of<at::BFloat16>(tensor));
  else
    return input_of<S>(tensor);
}
template <class S>
S* stored_out(const Tensor& tensor) {
  if constexpr (std::is_same_v<S, BFloat16>)
    return reinterpret_cast<BFloat16*>(output_of<at::BFloat16>(tensor));
  else
    return output_of<S>(tensor);
}

// Null where float is multiplied as it is.
template <class S>
const SplitKernels* split_kernels(const Problem& p) {
  const SplitKernels* split = std::is_same_v<S, float> ? instruction_set().split : nullptr;
  return split && split->pays(p.cell.kind, p.shape) ? split : nullptr;
}

const MatrixKernels* matrix_kernels(int64_t M, int64_t N, int64_t K) {
  const MatrixKernels* split = instruction_set().products;
  return split && split->pays(M, N, K) ? split : nullptr;
}

// Two parts only for who has asked torch.set_float32_matmul_precision for less than "highest".
int parts_of_float() {
  const auto asked = at::globalContext().float32Precision(at::Float32Backend::MKLDNN, at::Float32Op::MATMUL);
  return asked == at::Float32Precision::TF32 || asked == at::Float32Precision::BF16 ? 2 : 3;
}

// c_t is updated in place.
template <class T>
void begin_cell_state(const ForwardTensors& t) {
  const size_t bytes = t.cn.numel() * sizeof(T);
  if (!t.c0.defined())
    std::memset(output_of<T>(t.cn), 0, bytes);
  else if (t.c0.scalar_type() == t.cn.scalar_type())
    std::memcpy(output_of<T>(t.cn), input_of<T>(t.c0), bytes);  // ATen's copy costs a microsecond
  else
    t.cn.copy_(t.c0);
}

template <class S>
void forward(const Problem& p, bool save, ForwardTensors& t) {
  using T = Accumulate<S>;
  const Shape& s = p.shape;
  ForwardArgs<S> args{};
  args.shape = s;
  args.threads = at::get_num_threads();
  const SplitKernels* split = split_kernels<S>(p);

  if (p.cell.cell_state) begin_cell_state<T>(t);
  for (int64_t d = 0; d < s.D; ++d) {
    const DirectionWeights& w = p.weights[d];
    ForwardDirection<S>& to = args.direction[d];
    to.x = stored_in<S>(t.x);
    to.w_ih = stored_in<S>(w.w_ih);
    to.b_ih = stored_in<S>(w.b_ih);
    to.reverse = d == 1;
    to.w_hh = stored_in<S>(w.w_hh);
    to.b_hh = stored_in<S>(w.b_hh);
    to.w_hr = stored_in<S>(w.w_hr);
    if (t.h0.defined()) to.h0 = stored_in<S>(t.h0) + d * s.B * s.Hr();
    to.reset = input_of<bool>(t.reset);
    to.output = stored_out<S>(t.output) + d * s.Hr();
    to.output_stride = s.D * s.Hr();
    if (t.hn.defined()) to.hn = stored_out<S>(t.hn) + d * s.B * s.Hr();
    if (p.cell.cell_state) to.c = output_of<T>(t.cn) + d * s.B * s.H;
    if (save) to.saved = output_of<T>(t.saved) + d * s.N * p.cell.saved * s.H;
  }
  if constexpr (std::is_same_v<S, float>)
    if (split) return split->forward(p.cell.kind, args, parts_of_float());
  if constexpr (std::is_same_v<S, BFloat16>)
    instruction_set().bfloat16->forward(p.cell.kind, args);
  else
    instruction_set().kernels->forward(p.cell.kind, args);
}

void run_backward(CellKind kind, const BackwardArgs<float>& args) {
  const SplitBackwardKernels* split = instruction_set().split_backward;
  if (split && split->pays(kind, args.shape)) return split->backward(kind, args, parts_of_float());
  instruction_set().kernels->backward(kind, args);
}
void run_backward(CellKind kind, const BackwardArgs<double>& args) {
  instruction_set().kernels->backward(kind, args);
}
void run_backward(CellKind kind, const BackwardArgs<BFloat16>& args) {
  instruction_set().bfloat16_backward->backward(kind, args);
}

template <class T>
void copy_previous(const Shape& s, const T* output, int64_t stride, const T* h0, const bool* reset,
                   bool reverse, T* to) {
  const int64_t Hr = s.Hr();
  at::parallel_for(0, s.T, 1 + 32768 / (1 + s.B * Hr), [&](int64_t first, int64_t last) {
    for (int64_t step = first; step < last; ++step) {
      const int64_t before = reverse ? step + 1 : step - 1;
      const bool inside = before >= 0 && before < s.T;
      for (int64_t b = 0; b < s.batch_sizes[step]; ++b) {
        T* row = to + (s.offsets[step] + b) * Hr;
        if (reset && reset[s.offsets[step] + b])
          std::fill_n(row, Hr, T{});
        else if (inside && b < s.batch_sizes[before])
          std::copy_n(output + (s.offsets[before] + b) * stride, Hr, row);
        else if (h0)
          std::copy_n(h0 + b * Hr, Hr, row);
        else
          std::fill_n(row, Hr, T{});
      }
    }
  });
}

template <class S>
void backward(const Problem& p, BackwardTensors& t) {
  using T = Accumulate<S>;
  const Shape& s = p.shape;
  if (t.wants_dh0) t.dh0 = p.allocate_state(s.Hr());
  BackwardArgs<S> args{};
  args.shape = s;
  args.threads = at::get_num_threads();
  const auto at_direction = [&s](const Tensor& tensor, int64_t d) {
    return tensor.defined() ? stored_out<S>(tensor) + d * tensor.numel() / s.D : nullptr;
  };
  const auto sums_at_direction = [&s](const Tensor& tensor, int64_t d) {
    return tensor.defined() ? output_of<T>(tensor) + d * tensor.numel() / s.D : nullptr;
  };
  for (int64_t d = 0; d < s.D; ++d) {
    BackwardDirection<S>& to = args.direction[d];
    to.reverse = d == 1;
    to.w_hh = stored_in<S>(p.weights[d].w_hh);
    to.w_hr = stored_in<S>(p.weights[d].w_hr);
    to.h0 = at_direction(t.h0, d);
    to.c0 = at_direction(t.c0, d);
    to.reset = input_of<bool>(t.reset);
    to.output = stored_in<S>(t.output) + d * s.Hr();
    to.output_stride = s.D * s.Hr();
    to.saved = sums_at_direction(t.saved, d);
    if (t.grad_output.defined()) to.grad_output = stored_in<S>(t.grad_output) + d * s.Hr();
    to.grad_output_stride = s.D * s.Hr();
    to.grad_hn = at_direction(t.grad_hn, d);
    to.dgates = stored_out<S>(t.dgates[d]);
    to.dgates_stride = t.dgates[d].stride(0);
    to.dh = stored_out<S>(t.dh[d]);
    to.carry = sums_at_direction(t.carry, d);
    to.dh0 = at_direction(t.dh0, d);
    if (!t.adds.gates.empty()) to.adds_gates = stored_in<S>(t.adds.gates[d]);
    if (!t.adds.carry.empty()) to.adds_carry = input_of<T>(t.adds.carry[d]);
    if (!t.adds.previous.empty()) to.adds_previous = stored_in<S>(t.adds.previous[d]);
  }
  run_backward(p.cell.kind, args);
  for (int64_t d = 0; d < s.D && t.wants_previous; ++d)
    t.previous.push_back(previous_hidden(p, t.output, t.h0, d, t.reset));
}

// result = a^T b of one to four rows, as a cell's step has them: not worth a call of a matrix product.
constexpr int64_t kFewRows = 4;
// As many products repay waking a thread, as in cpu/plan.cpp.
constexpr int64_t kThreadWork = 1 << 17;
template <class T>
void product_over_few_rows(const Tensor& result, const Tensor& a, const Tensor& b) {
  const int64_t rows = a.size(0), columns = b.size(1), a_stride = a.stride(0), b_stride = b.stride(0);
  const T *from_a = input_of<T>(a), *from_b = input_of<T>(b);
  T* const begin = output_of<T>(result);
  const int64_t grain = 1 + kThreadWork / (1 + rows * columns);
  at::parallel_for(0, result.size(0), grain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      T* to = begin + i * columns;
      for (int64_t j = 0; j < columns; ++j) to[j] = from_a[i] * from_b[j];
      for (int64_t row = 1; row < rows; ++row)
        for (int64_t j = 0; j < columns; ++j)
          to[j] += from_a[row * a_stride + i] * from_b[row * b_stride + j];
    }
  });
}

// Torch's own gradients of weights are sums of one product a step; the micro-kernel's sums are as short, and a matrix
// product of ATen's here would be one running sum over thousands of rows.
template <class T>
void sum_over_rows(const Tensor& result, const Tensor& a, const Tensor& b, bool add) {
  const SumOverRows<T> args{a.size(0),   a.size(1),
                            b.size(1),   input_of<T>(a),
                            a.stride(0), input_of<T>(b),
                            b.stride(0), output_of<T>(result),
                            add,         at::get_num_threads()};
  if constexpr (std::is_same_v<T, float>)
    if (const MatrixKernels* split = matrix_kernels(args.M, args.N, args.rows))
      return split->sum_over_rows(args, parts_of_float());
  instruction_set().kernels->sum_over_rows(args);
}

void product_over_rows(const Tensor& result, const Tensor& a, const Tensor& b, int64_t) {
  if (a.scalar_type() == at::kBFloat16) {
    result.copy_(at::mm(a.t(), b));
    return;
  }
  if (a.size(0) > kFewRows || a.size(0) == 0) return frnn::sum_over_rows(result, a, b, false);
  if (result.scalar_type() == at::kFloat)
    product_over_few_rows<float>(result, a, b);
  else
    product_over_few_rows<double>(result, a, b);
}

template <class T>
void multiply(const Tensor& result, const Tensor& a, const Tensor& b, bool add) {
  const RowsTimesMatrix<T> args{a.size(0),
                                a.size(1),
                                b.size(1),
                                input_of<T>(a),
                                a.stride(0),
                                input_of<T>(b),
                                output_of<T>(result),
                                add,
                                at::get_num_threads()};
  if constexpr (std::is_same_v<T, float>)
    if (const MatrixKernels* split = matrix_kernels(args.rows, args.N, args.K))
      return split->multiply(args, parts_of_float());
  instruction_set().kernels->multiply(args);
}

void add_product(Tensor& sum, const Tensor& a, const Tensor& b) {
  const bool add = sum.defined();
  if (a.scalar_type() == at::kBFloat16) {
    const Tensor product = at::mm(a, b);
    sum = add ? sum.to(at::kFloat).add_(product) : product;  // of two directions: rounded once
    return;
  }
  if (!add) sum = at::detail::empty_cpu({a.size(0), b.size(1)}, a.scalar_type(), false, std::nullopt);
  frnn::multiply(sum, a, b, add);
}

}  // namespace

void run_tangent(CellKind kind, const TangentArgs<float>& args) {
  const SplitKernels* split = instruction_set().split;
  if (split && split->pays(kind, args.shape)) return split->tangent(kind, args, parts_of_float());
  instruction_set().kernels->tangent(kind, args);
}
void run_tangent(CellKind kind, const TangentArgs<double>& args) {
  instruction_set().kernels->tangent(kind, args);
}

void sum_over_rows(const Tensor& result, const Tensor& a, const Tensor& b, bool add) {
  if (a.size(0) == 0) {
    if (!add) result.zero_();
    return;
  }
  result.scalar_type() == at::kFloat ? sum_over_rows<float>(result, a, b, add)
                                     : sum_over_rows<double>(result, a, b, add);
}

void multiply(const Tensor& result, const Tensor& a, const Tensor& b, bool add) {
  a.scalar_type() == at::kFloat ? multiply<float>(result, a, b, add) : multiply<double>(result, a, b, add);
}

Tensor previous_hidden(const Problem& p, const Tensor& output, const Tensor& h0, int64_t d,
                       const Tensor& reset) {
  const Shape& s = p.shape;
  const int64_t Hr = s.Hr();
  const bool all_go_on = !reset.defined();
  if (all_go_on && s.T == 1 && h0.defined()) return h0.view({s.D, s.B, Hr}).select(0, d);
  if (all_go_on && s.N == s.T * s.B && !h0.defined())
    return part(part(output, 1, d * Hr, Hr), 0, d == 0 ? 0 : s.B, s.N - s.B);
  Tensor result = p.allocate({s.N, Hr});
  const auto copy = [&](auto type) {
    using T = decltype(type);
    const T* initial = h0.defined() ? stored_in<T>(h0) + d * s.B * Hr : nullptr;
    copy_previous<T>(s, stored_in<T>(output) + d * Hr, s.D * Hr, initial, input_of<bool>(reset), d == 1,
                     stored_out<T>(result));
  };
  if (p.compute == at::kBFloat16)
    copy(BFloat16{});
  else
    p.compute == at::kFloat ? copy(float{}) : copy(double{});
  return result;
}

const Backend kCpuBackend{
    [](const Problem& p, Stage stage) {
      if (p.dtype != at::kBFloat16) return p.dtype == at::kFloat || p.dtype == at::kDouble;
      if (stage == Stage::forward) return instruction_set().bfloat16 != nullptr;
      const Bfloat16BackwardKernels* backward = instruction_set().bfloat16_backward;
      return stage == Stage::backward && backward && backward->pays(p.cell.kind, p.shape);
    },
    [](at::ScalarType dtype) {
      return dtype != at::kHalf && (dtype != at::kBFloat16 || instruction_set().bfloat16);
    },
    /*keeps_wide=*/true,
    /*padded_rows=*/true,
    /*spends_saved=*/true,
    [](const Problem& p, bool save, ForwardTensors& t) {
      if (p.compute == at::kBFloat16) return forward<BFloat16>(p, save, t);
      p.compute == at::kFloat ? forward<float>(p, save, t) : forward<double>(p, save, t);
    },
    [](const Problem& p, BackwardTensors& t) {
      if (p.compute == at::kBFloat16) return backward<BFloat16>(p, t);
      p.compute == at::kFloat ? backward<float>(p, t) : backward<double>(p, t);
    },
    &product_over_rows,
    &add_product,
};

}  // namespace frnn
