// The backward pass of strategy "persistent" in true float32.
#include "persistent_backward.cuh"

namespace frnn {
FRNN_INSTANTIATE_PERSISTENT_BACKWARD(Exact)
}  // namespace frnn
