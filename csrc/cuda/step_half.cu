// Strategy "step" in half.
#include "step.cuh"

namespace frnn {
FRNN_INSTANTIATE_STEP(Half)
}  // namespace frnn
