// torch has a TF32 switch for recurrent layers (torch.backends.cudnn.rnn.fp32_precision, on unless told) beside that of
// matrix products (torch.backends.cuda.matmul.fp32_precision, off unless told). Our products are matrix products in a
// recurrent layer: while a RecurrentPrecision lives, the first switch rules them.
#pragma once

#include <ATen/Context.h>

#include <optional>

namespace frnn {

inline at::Float32Precision float32_precision(at::Float32Op op) {
  return at::globalContext().float32Precision(at::Float32Backend::CUDA, op);
}

// Whether float32 may be multiplied in TF32 in a recurrent layer.
inline bool recurrent_tf32() { return float32_precision(at::Float32Op::RNN) == at::Float32Precision::TF32; }

class RecurrentPrecision {
 public:
  RecurrentPrecision() {
    const bool wanted = recurrent_tf32();
    const at::Float32Precision given = float32_precision(at::Float32Op::MATMUL);
    if (wanted == (given == at::Float32Precision::TF32)) return;
    if (wanted) {
      // torch has no switch for one thread in this sense: for as long as a product is being launched, another thread's
      // matrix products may see TF32 allowed too.
      before_ = given;
      at::globalContext().setAllowTF32CuBLAS(true);
    } else {
      no_tf32_.emplace();
    }
  }
  ~RecurrentPrecision() {
    if (!before_) return;
    at::globalContext().setAllowTF32CuBLAS(false);
    at::globalContext().setFloat32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL, *before_);
  }
  RecurrentPrecision(const RecurrentPrecision&) = delete;
  RecurrentPrecision& operator=(const RecurrentPrecision&) = delete;

 private:
  std::optional<at::Float32Precision> before_;
  std::optional<at::NoTF32Guard> no_tf32_;
};

}  // namespace frnn
