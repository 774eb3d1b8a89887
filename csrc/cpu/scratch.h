// Memory of one call that a thread keeps for its next: packed weights are megabytes, and as fresh pages from the system
// they would cost a short call more than its arithmetic.
#pragma once

#include <stddef.h>

namespace frnn {

struct ScratchBlock {
  void* data;  // aligned to a cache line
  size_t bytes;
};

// At least `bytes`, of what the calling thread has kept or new. Throws std::bad_alloc.
ScratchBlock take_scratch(size_t bytes);
// Gives a block back, to any thread. A thread keeps the last blocks that it was given, of at most kKeptScratch bytes.
void keep_scratch(ScratchBlock block) noexcept;

constexpr size_t kKeptScratch = size_t{32} << 20;

}  // namespace frnn
