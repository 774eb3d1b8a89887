// The forward pass of strategy "persistent" in half.
#include "persistent_forward.cuh"

namespace frnn {
FRNN_INSTANTIATE_PERSISTENT_FORWARD(Half)
}  // namespace frnn
