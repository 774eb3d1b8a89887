// The backward pass of strategy "persistent" in TF32.
#include "persistent_backward.cuh"

namespace frnn {
FRNN_INSTANTIATE_PERSISTENT_BACKWARD(float)
}  // namespace frnn
