// The backward pass of strategy "persistent" in half.
#include "persistent_backward.cuh"

namespace frnn {
FRNN_INSTANTIATE_PERSISTENT_BACKWARD(Half)
}  // namespace frnn
