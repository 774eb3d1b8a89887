// The forward pass of strategy "persistent" in bfloat16.
#include "persistent_forward.cuh"

namespace frnn {
FRNN_INSTANTIATE_PERSISTENT_FORWARD(BFloat16)
}  // namespace frnn
