// The forward pass of strategy "persistent" in TF32.
#include "persistent_forward.cuh"

namespace frnn {
FRNN_INSTANTIATE_PERSISTENT_FORWARD(float)
}  // namespace frnn
