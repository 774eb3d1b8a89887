// Where the rows of each step begin, for kernels that run many steps of a packed input.
#pragma once

#include <stdint.h>

namespace frnn {

// offsets[t] = rows of all steps before step t, [T+1] on the device; lengths [B] on the host, the steps of each row,
// B at least 1.
// What the host's memory holds after the call does not matter. Launches on `stream` (a cudaStream_t of the current
// device). Returns null, or what CUDA says is wrong.
const char* write_offsets(const int64_t* lengths, int64_t B, int64_t T, int64_t* offsets, void* stream);

}  // namespace frnn
