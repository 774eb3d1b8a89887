// The forward pass of strategy "persistent" in true float32.
#include "persistent_forward.cuh"

namespace frnn {
FRNN_INSTANTIATE_PERSISTENT_FORWARD(Exact)
}  // namespace frnn
