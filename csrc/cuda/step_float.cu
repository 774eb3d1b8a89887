// Strategy "step" in float.
#include "step.cuh"

namespace frnn {
FRNN_INSTANTIATE_STEP(float)
}  // namespace frnn
