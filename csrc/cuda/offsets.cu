// See offsets.h.
#include "offsets.h"

#include <string.h>

#include "launch.cuh"

namespace frnn {

constexpr int kOffsetThreads = 128;

// As many lengths as the 4 KB of a kernel's arguments have room for.
constexpr int kLengths = 500;
struct Lengths {
  int64_t count;
  int64_t value[kLengths];
};

// Adds the rows' part in all offsets: min(length, t), a row being in every step before its end.
__global__ void __launch_bounds__(kOffsetThreads)
    offsets_kernel(const Lengths lengths, bool first, int64_t T, int64_t* offsets) {
  const int64_t t = int64_t{blockIdx.x} * kOffsetThreads + threadIdx.x;
  if (t > T) return;
  int64_t sum = first ? 0 : offsets[t];
  for (int64_t b = 0; b < lengths.count; ++b) sum += lengths.value[b] < t ? lengths.value[b] : t;
  offsets[t] = sum;
}

const char* write_offsets(const int64_t* lengths, int64_t B, int64_t T, int64_t* offsets, void* stream) {
  const dim3 grid(static_cast<unsigned>(T / kOffsetThreads + 1));
  for (int64_t b = 0; b < B; b += kLengths) {
    Lengths part{};
    part.count = B - b < kLengths ? B - b : kLengths;
    memcpy(part.value, lengths + b, part.count * sizeof(int64_t));
    const char* error =
        launch(&offsets_kernel, grid, dim3(kOffsetThreads), 0, stream, part, b == 0, T, offsets);
    if (error) return error;
  }
  return nullptr;
}

}  // namespace frnn
