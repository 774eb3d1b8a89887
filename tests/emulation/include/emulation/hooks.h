// What device code calls in the runtime (tests/emulation/runtime): the seam between the emulated headers, which are
// compiled with the kernels and are instrumented, and the runtime, which is not.
#pragma once

#include <stdint.h>

#include "types.h"

namespace frnn_emulation {

enum class Scope : int { block, cluster, device };
// Of a strong load: relaxed or acquire. Of a strong store: relaxed or release.
enum class Order : int { relaxed, ordered };
enum class Atomic : int { add, exchange, compare_exchange, maximum, minimum, bit_and, bit_or };
enum class Number : int { i32, u32, u64, f32, f64 };
enum class WarpOperation : int { synchronize, shuffle, vote, multiply, load_matrices };

// The same for a thread as long as it lives, so that the compiler may call them once.
[[gnu::const]] unsigned thread_lane();
[[gnu::const]] unsigned char* dynamic_shared_memory();

// A barrier of the block. count: threads that meet at it, 0 for all of the block. Returns how many gave a predicate
// that is true.
unsigned block_barrier(unsigned id, unsigned count, bool predicate);
void block_barrier_arrive(unsigned id, unsigned count);

// The lanes of `mask` meet. shuffle: returns what lane `source` gave as value; vote: a bit for each value that is not 0.
uint64_t warp_meet(WarpOperation operation, unsigned mask, uint64_t value, unsigned source);

// Strong (relaxed, acquire, release, volatile, atomic) accesses: not races among themselves.
void strong_load(const void* address, void* value, unsigned bytes, Order order, Scope scope);
void strong_store(void* address, const void* value, unsigned bytes, Order order, Scope scope);
uint64_t atomic(void* address, Atomic operation, Number type, uint64_t operand, uint64_t compare);
void fence(Scope scope);
// The thread waits for others without saying for what: __nanosleep.
void pause();
[[noreturn]] void trap(const char* why);

}  // namespace frnn_emulation
