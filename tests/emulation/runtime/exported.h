// The C functions by which tests drive the emulation, through ctypes.
#pragma once

#include <stddef.h>
#include <stdint.h>

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED void* frnn_emulation_malloc(size_t bytes);  // 64-byte aligned, every byte 0xff; null: no room
EXPORTED void frnn_emulation_free(void* address);

// The schedule of every launch from here on follows from this seed.
EXPORTED void frnn_emulation_set_seed(uint64_t seed);
// How probable it is that a thread gives way before an access to shared or global memory. 0: never.
EXPORTED void frnn_emulation_set_yield_probability(double probability);
EXPORTED void frnn_emulation_set_multiprocessors(int count);
// What the last launch that failed did wrong; empty if none has failed since frnn_emulation_set_seed.
EXPORTED const char* frnn_emulation_last_error();
// A device that is broken: messages between blocks are lost, after which time passes and waits can give up; or what matrix
// instructions multiply is wrong.
EXPORTED void frnn_emulation_break(bool messages, bool products);
// By how much clock_high() is ahead then, each time that all wait in vain; and what it came to in any launch since the last
// question.
EXPORTED void frnn_emulation_set_turns_in_vain(uint32_t turns);
EXPORTED uint32_t frnn_emulation_longest_wait();
// The most threads that cudaFuncGetAttributes says a block of any kernel may have.
EXPORTED void frnn_emulation_set_threads_of_kernels(int count);
// The driver is too old for the CUDA runtime.
EXPORTED void frnn_emulation_set_old_driver(bool is);
// What cudaStreamIsCapturing says.
EXPORTED void frnn_emulation_set_capturing(bool capturing);
// How many kernels have been launched.
EXPORTED uint32_t frnn_emulation_launches();
// Which thread ran when, in all launches since frnn_emulation_set_seed, as a hash.
EXPORTED uint64_t frnn_emulation_schedule();
