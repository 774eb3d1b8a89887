// The operators' C++ signatures; library.cpp says what they take and return.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace frnn {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

using Tensors3 = std::tuple<Tensor, Tensor, Tensor>;
using Tensors4 = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Tensors7 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Tensors14 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                             Tensor, Tensor, Tensor, Tensor>;
using Tensors17 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                             Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Tensors4 layer_forward(std::string_view cell, const Tensor& input, const OptTensor& batch_sizes,
                       const OptTensor& h0, const OptTensor& c0, const Tensor& w_ih, const Tensor& w_hh,
                       const OptTensor& b_ih, const OptTensor& b_hh, const OptTensor& w_hr,
                       const OptTensor& w_ih_reverse, const OptTensor& w_hh_reverse,
                       const OptTensor& b_ih_reverse, const OptTensor& b_hh_reverse,
                       const OptTensor& w_hr_reverse, bool save, const OptTensor& reset);

Tensors14 layer_backward(std::string_view cell, const OptTensor& grad_output, const OptTensor& grad_hn,
                         const OptTensor& grad_cn, const OptTensor& input, const OptTensor& batch_sizes,
                         const OptTensor& h0, const OptTensor& c0, const Tensor& w_ih, const Tensor& w_hh,
                         const OptTensor& b_ih, const OptTensor& b_hh, const OptTensor& w_hr,
                         const OptTensor& w_ih_reverse, const OptTensor& w_hh_reverse,
                         const OptTensor& b_ih_reverse, const OptTensor& b_hh_reverse,
                         const OptTensor& w_hr_reverse, const Tensor& output, const Tensor& saved,
                         int64_t needs, const OptTensor& adds, const OptTensor& reset);

Tensors4 layer_gate_gradients(std::string_view cell, const OptTensor& grad_output, const OptTensor& grad_hn,
                              const OptTensor& grad_cn, const OptTensor& batch_sizes, const OptTensor& h0,
                              const OptTensor& c0, const Tensor& w_ih, const Tensor& w_hh,
                              const OptTensor& b_ih, const OptTensor& b_hh, const OptTensor& w_hr,
                              const OptTensor& w_ih_reverse, const OptTensor& w_hh_reverse,
                              const OptTensor& b_ih_reverse, const OptTensor& b_hh_reverse,
                              const OptTensor& w_hr_reverse, const Tensor& output, const Tensor& saved,
                              const OptTensor& reset);

Tensors17 layer_double_backward(std::string_view cell, const Tensor& dh, const OptTensor& grad_cn,
                                const OptTensor& input, const OptTensor& batch_sizes, const OptTensor& h0,
                                const OptTensor& c0, const Tensor& w_ih, const Tensor& w_hh,
                                const OptTensor& b_ih, const OptTensor& b_hh, const OptTensor& w_hr,
                                const OptTensor& w_ih_reverse, const OptTensor& w_hh_reverse,
                                const OptTensor& b_ih_reverse, const OptTensor& b_hh_reverse,
                                const OptTensor& w_hr_reverse, const OptTensor& v_input,
                                const OptTensor& v_h0, const OptTensor& v_c0, const OptTensor& v_w_ih,
                                const OptTensor& v_w_hh, const OptTensor& v_b_ih, const OptTensor& v_b_hh,
                                const OptTensor& v_w_hr, const OptTensor& v_w_ih_reverse,
                                const OptTensor& v_w_hh_reverse, const OptTensor& v_b_ih_reverse,
                                const OptTensor& v_b_hh_reverse, const OptTensor& v_w_hr_reverse,
                                const Tensor& output, const Tensor& saved, int64_t needs);

Tensors3 cell_forward(std::string_view cell, const Tensor& input, const OptTensor& h0, const OptTensor& c0,
                      const Tensor& w_ih, const Tensor& w_hh, const OptTensor& b_ih, const OptTensor& b_hh,
                      bool save);

Tensors7 cell_backward(std::string_view cell, const OptTensor& grad_h, const OptTensor& grad_c,
                       const OptTensor& input, const OptTensor& h0, const OptTensor& c0, const Tensor& w_ih,
                       const Tensor& w_hh, const OptTensor& b_ih, const OptTensor& b_hh, const Tensor& h,
                       const Tensor& saved, int64_t needs);

}  // namespace frnn
