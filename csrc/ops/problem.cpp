// The checks of the raw operators. Python raises the friendly errors; these keep a wrong call of a raw operator from
// reading out of bounds.
#include "problem.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include "../huge_pages.h"
#include "scan.h"

namespace frnn {

CellTraits cell_traits(std::string_view name) {
  for (const CellName& known : kCellNames)
    if (name == known.name)
      return with_cell(known.kind, [&](auto cell) {
        using Cell = decltype(cell);
        return CellTraits{known.kind,
                          Cell::kGates,
                          Cell::kSaved,
                          Cell::kGateGrads,
                          Cell::kHasCellState,
                          Cell::kHasCarry,
                          Cell::kReadsPreviousHidden};
      });
  TORCH_CHECK_VALUE(false, "fused_rnn: unknown cell '", std::string(name),
                    "': expected rnn_tanh, rnn_relu, gru or lstm");
}

Steps steps_of(const Tensor& rows, const OptTensor& batch_sizes) {
  Steps steps;
  if (batch_sizes.has_value() && batch_sizes->defined()) {
    TORCH_CHECK(rows.dim() == 2, "fused_rnn: packed rows must be 2-D, got ", rows.dim(), "-D");
    TORCH_CHECK(batch_sizes->dim() == 1 && batch_sizes->scalar_type() == at::kLong && batch_sizes->is_cpu() &&
                    batch_sizes->is_contiguous() && batch_sizes->numel() > 0,
                "fused_rnn: batch_sizes must be a contiguous, non-empty 1-D int64 tensor on the CPU");
    const int64_t* sizes = batch_sizes->const_data_ptr<int64_t>();
    steps.batch_sizes.assign(sizes, sizes + batch_sizes->numel());
  } else {
    TORCH_CHECK(rows.dim() == 3, "fused_rnn: rows must be 3-D (steps, batch, features), got ", rows.dim(),
                "-D");
    TORCH_CHECK(rows.size(0) > 0, "Expected sequence length to be larger than 0 in RNN");
    steps.batch_sizes.assign(rows.size(0), rows.size(1));
  }
  steps.T = static_cast<int64_t>(steps.batch_sizes.size());
  steps.B = steps.batch_sizes[0];
  steps.offsets.resize(steps.T + 1);
  steps.lengths.assign(steps.B, steps.T);
  int64_t total = 0, longest = steps.B;
  for (int64_t t = 0; t < steps.T; ++t) {
    const int64_t now = steps.batch_sizes[t];
    TORCH_CHECK(now >= 0 && now <= longest,
                "fused_rnn: batch_sizes must not be negative and must not increase");
    for (int64_t b = now; b < longest; ++b) steps.lengths[b] = t;
    longest = now;
    steps.offsets[t] = total;
    total += now;
  }
  steps.offsets[steps.T] = steps.N = total;
  const int64_t given = rows.dim() == 2 ? rows.size(0) : rows.size(0) * rows.size(1);
  TORCH_CHECK(given == total, "fused_rnn: batch_sizes add up to ", total, " rows, got ", given);
  return steps;
}

Steps one_step(const Tensor& rows) {
  TORCH_CHECK(rows.dim() == 2, "fused_rnn: a cell's tensors must be 2-D, got ", rows.dim(), "-D");
  const int64_t B = rows.size(0);
  return {1, B, B, {B}, {0, B}, std::vector<int64_t>(B, 1)};
}

DirectionWeights direction_weights(const OptTensor& w_ih, const OptTensor& w_hh, const OptTensor& b_ih,
                                   const OptTensor& b_hh, const OptTensor& w_hr) {
  const auto get = [](const OptTensor& t) { return t.has_value() ? *t : Tensor(); };
  return {get(w_ih), get(w_hh), get(b_ih), get(b_hh), get(w_hr)};
}

Problem::Problem(CellTraits cell_, Steps steps_, std::vector<DirectionWeights> given, const Tensor& rows_,
                 bool is_cell_, Stage stage)
    : backend(backend_of(rows_)), cell(cell_), steps(std::move(steps_)), weights(std::move(given)),
      device(rows_.device()), dtype(rows_.scalar_type()), is_cell(is_cell_) {
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16,
              "fused_rnn: unsupported dtype ", dtype);
  accumulate = dtype == at::kDouble ? at::kDouble : at::kFloat;
  kept = backend.keeps_wide ? accumulate : dtype;

  const DirectionWeights& first = weights[0];
  TORCH_CHECK(first.w_ih.dim() == 2 && first.w_hh.dim() == 2, "fused_rnn: w_ih and w_hh must be 2-D");
  const bool projected = first.w_hr.defined();
  TORCH_CHECK(!projected || (cell.kind == CellKind::lstm && first.w_hr.dim() == 2),
              "fused_rnn: w_hr must be 2-D and belongs to lstm alone");
  shape = Shape{};
  shape.T = steps.T, shape.B = steps.B, shape.N = steps.N, shape.D = D();
  shape.I = first.w_ih.size(1);
  shape.H = first.w_hh.size(0) / cell.gates;
  shape.P = projected ? first.w_hr.size(0) : 0;
  TORCH_CHECK(!projected || shape.P > 0, "fused_rnn: w_hr has no rows");
  shape.batch_sizes = steps.batch_sizes.data();
  shape.offsets = steps.offsets.data();
  shape.lengths = steps.lengths.data();
  compute = backend.computes_in(*this, stage) ? dtype : accumulate;

  const int64_t rows = cell.gates * shape.H;
  for (DirectionWeights& w : weights) {
    const bool bias = first.b_ih.defined();
    TORCH_CHECK(w.w_ih.defined() && w.w_hh.defined(), "fused_rnn: the second direction lacks a weight");
    TORCH_CHECK(w.b_ih.defined() == bias && w.b_hh.defined() == bias,
                "fused_rnn: expected biases in all places or in none");
    TORCH_CHECK(w.w_hr.defined() == projected, "fused_rnn: w_hr is expected in both directions or in none");
    w.w_ih = operand(w.w_ih, {rows, shape.I}, "w_ih");
    w.w_hh = operand(w.w_hh, {rows, shape.Hr()}, "w_hh");
    w.b_ih = operand(w.b_ih, {rows}, "b_ih");
    w.b_hh = operand(w.b_hh, {rows}, "b_hh");
    w.w_hr = operand(w.w_hr, {shape.P, shape.H}, "w_hr");
  }
}

Tensor Problem::operand(const OptTensor& tensor, at::IntArrayRef sizes, const char* name,
                        at::ScalarType type) const {
  if (!tensor.has_value() || !tensor->defined()) return {};
  TORCH_CHECK(tensor->sizes() == sizes, "fused_rnn: expected ", name, " of size ", sizes, ", got ",
              tensor->sizes());
  TORCH_CHECK(tensor->device() == device, "fused_rnn: expected ", name, " on ", device, ", got ",
              tensor->device());
  TORCH_CHECK(tensor->scalar_type() == dtype || tensor->scalar_type() == type, "fused_rnn: expected ", name,
              " of dtype ", dtype, ", got ", tensor->scalar_type());
  // `to` and `contiguous` cost a dispatch each even where they have nothing to do, a tenth of a small cell's call.
  const bool converted = tensor->scalar_type() == type;
  if (converted && tensor->is_contiguous()) return *tensor;
  return (converted ? *tensor : tensor->to(type)).contiguous();
}

Tensor Problem::state(const OptTensor& tensor, int64_t size, const char* name) const {
  if (is_cell) return operand(tensor, {shape.B, size}, name);
  return operand(tensor, {shape.D, shape.B, size}, name);
}

Tensor Problem::mask(const OptTensor& tensor, const char* name) const {
  TORCH_CHECK(!tensor.has_value() || tensor->scalar_type() == at::kBool, "fused_rnn: expected ", name,
              " of dtype ", at::kBool, ", got ", tensor->scalar_type());
  return operand(tensor, {shape.N}, name, at::kBool);
}

Tensor Problem::allocate(at::IntArrayRef sizes, at::ScalarType type) const {
  if (device.is_cpu()) {
    Tensor tensor = at::detail::empty_cpu(sizes, type, /*pin_memory=*/false, std::nullopt);  // no dispatch
    ask_for_huge_pages(tensor.unsafeGetTensorImpl()->mutable_data(), tensor.nbytes());
    return tensor;
  }
  return at::empty(sizes, at::dtype(type).device(device));
}

Tensor Problem::allocate_state(int64_t size, at::ScalarType type) const {
  return is_cell ? allocate({shape.B, size}, type) : allocate({shape.D, shape.B, size}, type);
}

void Problem::to_dtype(Tensor& tensor) const {
  if (tensor.defined() && tensor.scalar_type() != dtype) tensor = tensor.to(dtype);
}

}  // namespace frnn
