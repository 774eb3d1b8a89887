// What a device does for the operators: the scan over time, and the few sums that it does better than ATen alone.
#pragma once

#include "problem.h"

namespace frnn {

struct ForwardTensors {
  Tensor x, h0, c0;  // [N, I] or [T, B, I], [D, B, Hr], [D, B, H]; states undefined: zero
  Tensor reset;      // [N] bool or undefined: a row's state is zero before the steps where it is set
  // As x, of D*Hr columns; [D, B, Hr] or undefined: not wanted; [D, B, H]; [D, N, kSaved*H].
  Tensor output, hn, cn, saved;
};

// On the CPU, what a second derivative adds on the way (BackwardDirection): by direction [N, kGateGrads*H]; [N, H] of a
// cell with a carry; [N, Hr] or undefined. Empty: nothing.
struct Adds {
  std::vector<Tensor> gates, carry, previous;
};

struct BackwardTensors {
  Tensor x, h0, c0, output, saved, reset;  // of the forward pass
  Tensor grad_output, grad_hn;             // [N, D*Hr], [D, B, Hr]; undefined: zero
  bool wants_dh0, wants_previous;
  // By direction, in one allocation each: [N, kGateGrads*H]; [N, Hr], of every h_t, where it is projected or, on the
  // CPU, wanted.
  std::vector<Tensor> dgates, dh;
  std::vector<Tensor> previous;  // by direction, where wanted: h_{t-1}, [N, Hr] or, on the CPU, fewer rows
  Tensor carry, dh0;             // [D, B, H] holding the gradient of c_n or zero; [D, B, Hr], where wanted
  Adds adds;
};

struct Backend {
  // Whether kernels read and write the dtype of the call, of these sizes; otherwise that of sums.
  bool (*computes_in)(const Problem& p, Stage stage);
  // Whether products around the backward scan take operands of this dtype, though the scan itself may not.
  bool (*multiplies)(at::ScalarType dtype);
  bool keeps_wide;    // saves for the backward pass in the dtype of sums
  bool padded_rows;   // takes the rows of a pass forward as [T, B, columns] too: a view costs a dispatch
  bool spends_saved;  // a backward scan may write `dgates` over `saved`
  void (*forward)(const Problem& p, bool save, ForwardTensors& t);
  void (*backward)(const Problem& p, BackwardTensors& t);
  // result = a^T b, a [rows, m], b [rows, n]: a sum over the rows of all steps.
  void (*product_over_rows)(const Tensor& result, const Tensor& a, const Tensor& b, int64_t batch);
  // sum += a b, or its first term if undefined; in the dtype of sums.
  void (*add_product)(Tensor& sum, const Tensor& a, const Tensor& b);
};
extern const Backend kCpuBackend, kCudaBackend;

// What `layer_forward` does (library.cpp), of weights by direction; under PlainDispatch.
Tensors4 layer_of(const CellTraits& cell, const Tensor& input, const OptTensor& batch_sizes,
                  const OptTensor& h0, const OptTensor& c0, std::vector<DirectionWeights> weights, bool save,
                  const OptTensor& reset = {});

// On the CPU: the scan forward of a second derivative.
void run_tangent(CellKind kind, const TangentArgs<float>& args);
void run_tangent(CellKind kind, const TangentArgs<double>& args);

// On the CPU: result = a^T b, as product_over_rows, or result += a^T b; in float or double.
void sum_over_rows(const Tensor& result, const Tensor& a, const Tensor& b, bool add);
// Likewise result = a b, or result += a b; b and the result contiguous.
void multiply(const Tensor& result, const Tensor& a, const Tensor& b, bool add);

// On the CPU: h_{t-1} of every row, [N, Hr], as direction d of a scan met it. output [N, D*Hr], h0 [D, B, Hr] or
// undefined: zero; reset [N] or undefined. Where the first step of the scan has it zero and the batch is dense, a view of the rows of the other
// steps: see rows_after.
Tensor previous_hidden(const Problem& p, const Tensor& output, const Tensor& h0, int64_t d,
                       const Tensor& reset = {});

// That of the device where the tensor is (library.cpp).
const Backend& backend_of(const Tensor& tensor);

}  // namespace frnn
