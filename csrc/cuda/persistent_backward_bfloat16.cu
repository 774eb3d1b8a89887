// The backward pass of strategy "persistent" in bfloat16.
#include "persistent_backward.cuh"

namespace frnn {
FRNN_INSTANTIATE_PERSISTENT_BACKWARD(BFloat16)
}  // namespace frnn
