// What csrc/cuda/ptx.cuh calls in the runtime, besides hooks.h.
#pragma once

#include <string.h>

#include "hooks.h"

namespace frnn_emulation {

// 32-bit addresses of shared memory: distinct for every byte of every block that runs.
uint32_t shared_address(const void* pointer);
void* shared_pointer(uint32_t address);
uint32_t address_at_rank(uint32_t address, unsigned rank);

enum class Mma : int { bf16, f16, f16_k8, tf32 };
void mma(Mma kind, float* acc, const uint32_t* a, const uint32_t* b);
uint32_t to_tf32(float value);
void load_matrices(uint32_t* registers, const void* row, bool transpose);

// A result as coarse as the special-function unit's may be: without its last bit.
inline float coarse(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  bits &= ~1u;
  memcpy(&value, &bits, sizeof bits);
  return value;
}

// Stands still, but for a test that lets time pass: then it moves whenever all threads wait in vain.
unsigned clock_high();

void copy_async(void* shared, const void* global, unsigned bytes);
void copy_commit();
void copy_wait(unsigned groups_left);

unsigned cluster_rank();
unsigned cluster_size();
void cluster_arrive();
void cluster_wait();

void mbarrier_init(uint64_t* mbarrier, unsigned arrivals);
void mbarrier_arrive(uint64_t* mbarrier, unsigned expect_bytes);
enum class Publish : int { all, reads };
void mbarrier_arrive_cluster(uint32_t mbarrier, Publish what);
enum class Wait : int { block, stores, cluster };
bool mbarrier_try_wait(uint64_t* mbarrier, unsigned parity, Wait reach);
// false: it took too long, see clock_high().
bool mbarrier_wait(uint64_t* mbarrier, unsigned parity, Wait reach);
void store_async(uint32_t address, const void* value, unsigned bytes, uint32_t mbarrier);

}  // namespace frnn_emulation
