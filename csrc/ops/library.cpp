// Every operator of fused_rnn, as a table of contents. Tensor shapes, with T steps, B rows, I input size, H hidden
// size, Hr = projection size or else H, D directions, N rows of a packed input, G gates:
//
//   input        [T, B, I], or [N, I] with batch_sizes (int64 [T], on the CPU, not increasing)
//   h0, c0       [D, B, Hr], [D, B, H]; absent: zero
//   w_ih, w_hh   [G*H, I], [G*H, Hr]        b_ih, b_hh [G*H], or absent both       w_hr [P, H], LSTM only
//   ..._reverse  the second direction's; its presence makes D = 2
//   reset        [N] bool; where set, the row's state is zero before that step, in either direction; absent: nowhere
//   output       [T, B, D*Hr] or [N, D*Hr]  hn, cn as h0, c0 (cn is empty but for LSTM)
//   saved        [D, N, kSaved*H], what the backward pass reads; empty unless `save`
//
//   v_...        the direction in which an argument changes, in its shape; absent: it does not change
//   dgates       [D, N, kGateGrads*H], gradients of the pre-activations of the gates (csrc/cells)
//   previous     [D, N, Hr], h_{t-1} of every row
//   dh           [D, N, Hr], gradient of every h_t
//   adds         [D, N * columns], what a second derivative adds to each step of a backward pass (Adds in scan.h)
//
// `needs` has bit k set where gradient k of the results is wanted; the others come back undefined (None). dh is made on
// the CPU alone. Above them, for layer_backward: nobody reads `saved` again, so its memory may be used; a graph, which
// does not know, never sets that bit (fused_rnn/autograd.py).
// These operators know no autograd: fused_rnn/ops.py and autograd.py are the way to call them. `layer` and `cell_step`,
// which torch.compile and torch.export see, are defined in fused_rnn/ops.py.
#include <torch/library.h>

#include "scan.h"

TORCH_LIBRARY(fused_rnn, m) {
  m.def(
      "layer_forward(str cell, Tensor input, Tensor? batch_sizes, Tensor? h0, Tensor? c0, "
      "Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? w_hr, "
      "Tensor? w_ih_reverse, Tensor? w_hh_reverse, Tensor? b_ih_reverse, Tensor? b_hh_reverse, "
      "Tensor? w_hr_reverse, bool save, Tensor? reset=None) -> (Tensor output, Tensor hn, Tensor cn, Tensor "
      "saved)");
  m.def(
      "layer_backward(str cell, Tensor? grad_output, Tensor? grad_hn, Tensor? grad_cn, "
      "Tensor? input, Tensor? batch_sizes, Tensor? h0, Tensor? c0, "
      "Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? w_hr, "
      "Tensor? w_ih_reverse, Tensor? w_hh_reverse, Tensor? b_ih_reverse, Tensor? b_hh_reverse, "
      "Tensor? w_hr_reverse, Tensor output, Tensor saved, int needs, Tensor? adds=None, Tensor? reset=None) "
      "-> "
      "(Tensor input, Tensor h0, Tensor c0, Tensor w_ih, Tensor w_hh, Tensor b_ih, Tensor b_hh, Tensor w_hr, "
      "Tensor w_ih_reverse, Tensor w_hh_reverse, Tensor b_ih_reverse, Tensor b_hh_reverse, Tensor "
      "w_hr_reverse, "
      "Tensor dh)");
  // What layer_backward multiplies for the weights' gradients.
  m.def(
      "layer_gate_gradients(str cell, Tensor? grad_output, Tensor? grad_hn, Tensor? grad_cn, "
      "Tensor? batch_sizes, Tensor? h0, Tensor? c0, "
      "Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? w_hr, "
      "Tensor? w_ih_reverse, Tensor? w_hh_reverse, Tensor? b_ih_reverse, Tensor? b_hh_reverse, "
      "Tensor? w_hr_reverse, Tensor output, Tensor saved, Tensor? reset=None) -> "
      "(Tensor dgates, Tensor previous, Tensor h0, Tensor c0)");
  // The derivatives of <v, layer_backward>: by the gradients that it takes, then by the layer's arguments. Where `adds` is
  // wanted, without what layer_backward makes of it: it may have a pass to make anyhow.
  m.def(
      "layer_double_backward(str cell, Tensor dh, Tensor? grad_cn, Tensor? input, "
      "Tensor? batch_sizes, Tensor? h0, Tensor? c0, "
      "Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? w_hr, "
      "Tensor? w_ih_reverse, Tensor? w_hh_reverse, Tensor? b_ih_reverse, Tensor? b_hh_reverse, "
      "Tensor? w_hr_reverse, Tensor? v_input, Tensor? v_h0, Tensor? v_c0, "
      "Tensor? v_w_ih, Tensor? v_w_hh, Tensor? v_b_ih, Tensor? v_b_hh, Tensor? v_w_hr, "
      "Tensor? v_w_ih_reverse, Tensor? v_w_hh_reverse, Tensor? v_b_ih_reverse, Tensor? v_b_hh_reverse, "
      "Tensor? v_w_hr_reverse, Tensor output, Tensor saved, int needs) -> "
      "(Tensor grad_output, Tensor grad_hn, Tensor grad_cn, Tensor input, Tensor h0, Tensor c0, "
      "Tensor w_ih, Tensor w_hh, Tensor b_ih, Tensor b_hh, Tensor w_hr, Tensor w_ih_reverse, "
      "Tensor w_hh_reverse, Tensor b_ih_reverse, Tensor b_hh_reverse, Tensor w_hr_reverse, Tensor adds)");
  m.def(
      "cell_forward(str cell, Tensor input, Tensor? h0, Tensor? c0, Tensor w_ih, Tensor w_hh, "
      "Tensor? b_ih, Tensor? b_hh, bool save) -> (Tensor h, Tensor c, Tensor saved)");
  m.def(
      "cell_backward(str cell, Tensor? grad_h, Tensor? grad_c, Tensor? input, Tensor? h0, Tensor? c0, "
      "Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor h, Tensor saved, int needs) -> "
      "(Tensor input, Tensor h0, Tensor c0, Tensor w_ih, Tensor w_hh, Tensor b_ih, Tensor b_hh)");
}

namespace {
void register_operators(torch::Library& m) {
  m.impl("layer_forward", &frnn::layer_forward);
  m.impl("layer_backward", &frnn::layer_backward);
  m.impl("layer_gate_gradients", &frnn::layer_gate_gradients);
  m.impl("cell_forward", &frnn::cell_forward);
  m.impl("cell_backward", &frnn::cell_backward);
}
}  // namespace

TORCH_LIBRARY_IMPL(fused_rnn, CPU, m) {
  register_operators(m);
  m.impl("layer_double_backward", &frnn::layer_double_backward);
}

#ifdef FRNN_WITH_CUDA
TORCH_LIBRARY_IMPL(fused_rnn, CUDA, m) { register_operators(m); }

const frnn::Backend& frnn::backend_of(const Tensor& tensor) {
  return tensor.is_cuda() ? kCudaBackend : kCpuBackend;
}
#else
const frnn::Backend& frnn::backend_of(const Tensor&) { return kCpuBackend; }
#endif

// Past autograd without a stop: torch's own fallback would box every argument, some microseconds a call.
TORCH_LIBRARY_IMPL(fused_rnn, Autograd, m) {
  for (const char* name : {"layer_forward", "layer_backward", "layer_gate_gradients", "layer_double_backward",
                           "cell_forward", "cell_backward"})
    m.impl(name, torch::CppFunction::makeFallthrough());
}
