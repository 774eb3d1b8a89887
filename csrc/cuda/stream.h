// What host code asks of a stream (a cudaStream_t) besides launches on it.
#pragma once

#include <stddef.h>

namespace frnn {

// Whether launches on it are recorded for a CUDA graph, in place of being run. Nobody may wait for them then.
bool is_capturing(void* stream);

// Copies from the device once everything on the stream is done. Other threads may be capturing meanwhile. Returns null, or
// what CUDA says is wrong: with the copy, or with a kernel that ran before it.
const char* fetch(void* to, const void* from, size_t bytes, void* stream);

}  // namespace frnn
