// What an operator call amounts to once its tensors are checked: sizes, weights by direction, dtype to compute in.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <vector>

#include "../args.h"
#include "../cells/cells.h"
#include "ops.h"

namespace frnn {

// The tensor operations inside an operator record nothing and cast nothing: autograd and autocast have been dealt
// with in Python by then, and would only cost time or, autocast, change the dtypes agreed on.
struct PlainDispatch {
  at::AutoDispatchBelowADInplaceOrView no_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

// A cell's constants as run-time values (csrc/cells).
struct CellTraits {
  CellKind kind;
  int gates, saved, gate_grads;
  bool cell_state, carry, reads_previous_hidden;
};
CellTraits cell_traits(std::string_view name);

struct DirectionWeights {
  Tensor w_ih, w_hh, b_ih, b_hh, w_hr;  // undefined where absent
};

// Steps of a padded ([T, B, ...]) or packed ([N, ...] with batch sizes) input.
struct Steps {
  int64_t T, B, N;
  std::vector<int64_t> batch_sizes, offsets, lengths;
};
Steps steps_of(const Tensor& rows, const OptTensor& batch_sizes);
Steps one_step(const Tensor& rows);  // of a cell, [B, ...]

struct Backend;

// `derivable`: a backward pass that a second derivative or another sum follows, or that derivative.
enum class Stage { forward, backward, derivable };

struct Problem {
  const Backend& backend;
  CellTraits cell;
  Steps steps;
  std::vector<DirectionWeights> weights;  // one a direction, in the dtype of the computation, contiguous
  Shape shape;                            // points into `steps`
  at::Device device;
  at::ScalarType dtype;       // of the tensors that come and go
  at::ScalarType compute;     // of the numbers that kernels read and write; those of tensors, or wider
  at::ScalarType accumulate;  // of sums and of the cell state: float or double
  at::ScalarType kept;        // of what is saved for the backward pass, and of c_n until it is returned
  bool is_cell;               // a *Cell's call: states are [B, size], without directions

  // `rows` is the call's input or output: its device and dtype are the call's.
  Problem(CellTraits cell, Steps steps, std::vector<DirectionWeights> given, const Tensor& rows, bool is_cell,
          Stage stage);
  Problem(const Problem&) = delete;
  Problem& operator=(const Problem&) = delete;

  int64_t D() const { return static_cast<int64_t>(weights.size()); }
  bool empty() const { return steps.N == 0 || shape.H == 0; }
  // A tensor of the call in the computation's dtype, contiguous and of this shape, or undefined if absent.
  Tensor operand(const OptTensor& tensor, at::IntArrayRef sizes, const char* name) const {
    return operand(tensor, sizes, name, compute);
  }
  Tensor operand(const OptTensor& tensor, at::IntArrayRef sizes, const char* name, at::ScalarType type) const;
  Tensor state(const OptTensor& tensor, int64_t size,
               const char* name) const;                          // likewise, a hidden or cell state
  Tensor mask(const OptTensor& tensor, const char* name) const;  // likewise, bool, of the rows of all steps
  Tensor allocate(at::IntArrayRef sizes) const { return allocate(sizes, compute); }
  Tensor allocate(at::IntArrayRef sizes, at::ScalarType type) const;
  Tensor allocate_state(int64_t size) const { return allocate_state(size, compute); }
  Tensor allocate_state(int64_t size, at::ScalarType type) const;
  void to_dtype(
      Tensor& tensor) const;  // what the call returns, in the dtype of its tensors; undefined stays so
};

// Optional arguments of the schema, as a direction's weights.
DirectionWeights direction_weights(const OptTensor& w_ih, const OptTensor& w_hh, const OptTensor& b_ih,
                                   const OptTensor& b_hh, const OptTensor& w_hr);

// The numbers of a tensor, to read or to write; null if it is undefined.
template <class T>
const T* input_of(const Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<T>() : nullptr;
}
template <class T>
T* output_of(const Tensor& tensor) {
  return tensor.defined() ? tensor.mutable_data_ptr<T>() : nullptr;
}

}  // namespace frnn
