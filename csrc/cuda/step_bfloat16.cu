// Strategy "step" in bfloat16.
#include "step.cuh"

namespace frnn {
FRNN_INSTANTIATE_STEP(BFloat16)
}  // namespace frnn
