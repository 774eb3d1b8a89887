// The scans over the steps of one pass of a layer on a GPU, by strategy (csrc/cuda/plan.h), and what they share.
// Between the steps nothing is allocated and nothing waits: all of a scan can be captured in a CUDA graph.
#pragma once

#include <type_traits>

#include "../../cuda/plan.h"
#include "../scan.h"
#include "gpu.h"

namespace frnn {

// T: float, double, Half, BFloat16.
template <class T>
void step_forward_scan(const Problem& p, const CudaPlan& plan, bool save, ForwardTensors& t, void* stream);
template <class T>
void step_backward_scan(const Problem& p, BackwardTensors& t, void* stream);

// The step kernels' own name: they leave products to matrix products, which torch's switches rule.
template <class T>
using Stored = std::conditional_t<std::is_same_v<T, Exact>, float, T>;

// T: float, Exact, Half, BFloat16. `gave_up`: of a check, int32 and zero; not zero afterwards if a block waited for another
// in vain.
template <class T>
void persistent_forward_scan(const Problem& p, const CudaPlan& plan, bool save, ForwardTensors& t,
                             void* stream, const Tensor& gave_up = {});
template <class T>
void persistent_backward_scan(const Problem& p, const CudaPlan& plan, BackwardTensors& t, void* stream,
                              const Tensor& gave_up = {});
// How many replicas of this plan's kernel the device runs at once.
template <class T>
int64_t residents(const Problem& p, Pass pass, const CudaPlan& plan);

template <class T>
const T* input_at(const Tensor& tensor, int64_t offset = 0) {
  return tensor.defined() ? static_cast<const T*>(tensor.const_data_ptr()) + offset : nullptr;
}
template <class T>
T* output_at(const Tensor& tensor, int64_t offset = 0) {
  return tensor.defined() ? static_cast<T*>(tensor.mutable_data_ptr()) + offset : nullptr;
}

// Raises what a launch returned, unless it is null.
void check(const char* error, const char* kernel, const Problem& p);

// gates_x = x w_ih^T of `chunk_steps` steps at a time, in the order in which each direction meets them: direction 0
// from the first step to the last, direction 1 from the last to the first.
class InputGates {
 public:
  // chunk_steps 0: none are needed.
  InputGates(const Problem& p, const Tensor& x, int64_t chunk_steps);

  // To be called for every `order` in turn, before the kernel that reads at(); for a kernel that runs a whole chunk,
  // for the first `order` of each.
  void advance(int64_t order);

  // Of row `first` of the N.
  template <class A>
  const A* at(int64_t d, int64_t first) const {
    return input_at<A>(rows_[d], (first - first_[d]) * p_.cell.gates * p_.shape.H);
  }
  // The first row of the N that the present chunk has.
  int64_t first(int64_t d) const { return first_[d]; }

 private:
  const Problem& p_;
  const Tensor& x_;
  int64_t chunk_;
  Tensor rows_[2], transposed_[2];
  int64_t first_[2] = {0, 0};
};

}  // namespace frnn
