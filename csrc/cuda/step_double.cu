// Strategy "step" in double.
#include "step.cuh"

namespace frnn {
FRNN_INSTANTIATE_STEP(double)
}  // namespace frnn
