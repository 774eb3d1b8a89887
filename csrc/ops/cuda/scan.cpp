// The GPU's part of the operators: which scan runs a pass, and the sums over the rows of all steps.
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>
#include <type_traits>

#include "precision.h"
#include "scans.h"
#include "trust.h"

namespace frnn {

void check(const char* error, const char* kernel, const Problem& p) {
  TORCH_CHECK(!error, "fused_rnn: ", kernel, " (", p.compute, ", T ", p.shape.T, ", B ", p.shape.B, ", I ",
              p.shape.I, ", H ", p.shape.H, ", D ", p.shape.D, ") on ", p.device, ": ", error);
}

namespace {

// Numbers as the persistent kernels name them: calls f with a value of the type.
template <class F>
void with_dtype(at::ScalarType dtype, F&& f) {
  switch (dtype) {
    case at::kFloat:
      return recurrent_tf32() ? f(float{}) : f(Exact{});
    case at::kDouble:
      return f(double{});
    case at::kHalf:
      return f(Half{});
    default:
      return f(BFloat16{});
  }
}

template <class T>
constexpr bool kHasPersistent = !std::is_same_v<T, double>;

CudaDtype dtype_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return recurrent_tf32() ? CudaDtype::tf32 : CudaDtype::fp32;
    case at::kDouble:
      return CudaDtype::fp64;
    case at::kHalf:
      return CudaDtype::fp16;
    default:
      return CudaDtype::bf16;
  }
}

template <class T>
CudaPlan plan(const Problem& p, Pass pass, bool training) {
  const Shape& s = p.shape;
  const bool packed = s.N != s.T * s.B;
  const CudaProblem problem{p.cell.kind, dtype_of(p.compute), pass, training, packed, s.T, s.B, s.I, s.H, s.P,
                            s.D,         gpu_of(p.device)};
  if (p.is_cell) return plan_steps(problem);
  const bool asked_for = forced_strategy() != nullptr;
  const CudaPlan planned = plan_cuda(problem);
  if constexpr (kHasPersistent<T>)
    if (is_persistent(planned.strategy) && !may_run<T>(p, pass, planned, asked_for))
      return plan_steps(problem);
  return planned;
}

template <class T>
void forward(const Problem& p, bool save, ForwardTensors& t) {
  const CudaPlan planned = plan<T>(p, Pass::forward, save);
  void* stream = current_stream(p.device);
  if constexpr (kHasPersistent<T>)
    if (is_persistent(planned.strategy)) return persistent_forward_scan<T>(p, planned, save, t, stream);
  step_forward_scan<Stored<T>>(p, planned, save, t, stream);
}

template <class T>
void backward(const Problem& p, BackwardTensors& t) {
  const CudaPlan planned = plan<T>(p, Pass::backward, true);
  void* stream = current_stream(p.device);
  if constexpr (kHasPersistent<T>)
    if (is_persistent(planned.strategy)) return persistent_backward_scan<T>(p, planned, t, stream);
  step_backward_scan<Stored<T>>(p, t, stream);
}

// Torch's own gradients of weights are sums of one product a step; a single running sum over the rows of all steps
// would be less accurate, and over a small matrix it would keep few multiprocessors busy. So the rows are summed in
// parts side by side, at least so many each, and the parts take at most so much memory.
constexpr int64_t kPartRows = 32;
constexpr int64_t kPartsBytes = 32 << 20;

void product_over_rows(const Tensor& result, const Tensor& a, const Tensor& b, int64_t) {
  const int64_t rows = a.size(0), numbers = std::max<int64_t>(1, result.numel());
  const bool wide = result.scalar_type() == at::kFloat || result.scalar_type() == at::kDouble;
  const auto options = result.options().dtype(wide ? result.scalar_type() : at::kFloat);
  const int64_t parts =
      std::min(rows / kPartRows, kPartsBytes / (numbers * static_cast<int64_t>(options.dtype().itemsize())));
  if (parts <= 1) {
    if (wide) return product(result, a.t(), b);
    // In float32, and rounded once: cuBLAS may otherwise add up what it has rounded already.
    const Tensor sum = at::empty(result.sizes(), options);
    product(sum, a.t(), b);
    Tensor(result).copy_(sum);
    return;
  }
  const int64_t each = rows / parts, whole = parts * each;
  const auto split = [&](const Tensor& t) { return t.narrow(0, 0, whole).unflatten(0, {parts, each}); };
  Tensor sums = at::empty({parts + (whole < rows), result.size(0), result.size(1)}, options);
  product(sums.narrow(0, 0, parts), split(a).transpose(1, 2), split(b));
  if (whole < rows) {
    const int64_t rest = rows - whole;
    product(sums.select(0, parts), a.narrow(0, whole, rest).t(), b.narrow(0, whole, rest));
  }
  Tensor(result).copy_(sums.sum(0));
}

void add_product(Tensor& sum, const Tensor& a, const Tensor& b) {
  const at::ScalarType type = a.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const Tensor term = at::empty({a.size(0), b.size(1)}, a.options().dtype(type));
  product(term, a, b);
  sum = sum.defined() ? sum.add_(term) : term;
}

}  // namespace

const Backend kCudaBackend{
    [](const Problem&, Stage) { return true; },
    [](at::ScalarType) { return true; },
    /*keeps_wide=*/false,
    /*padded_rows=*/false,
    /*spends_saved=*/false,
    [](const Problem& p, bool save, ForwardTensors& t) {
      const c10::DeviceGuard device(p.device);
      with_dtype(p.compute, [&](auto number) { forward<decltype(number)>(p, save, t); });
    },
    [](const Problem& p, BackwardTensors& t) {
      const c10::DeviceGuard device(p.device);
      with_dtype(p.compute, [&](auto number) { backward<decltype(number)>(p, t); });
    },
    &product_over_rows,
    &add_product,
};

}  // namespace frnn
