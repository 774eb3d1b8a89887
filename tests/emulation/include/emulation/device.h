// What a kernel may call: indices, barriers, warp intrinsics, atomics, loads, fences, numbers. Names, types and meaning
// are CUDA's. Part of the emulation's cuda_runtime.h.
#pragma once

#include <math.h>
#include <string.h>

#include "hooks.h"

// The runtime sets these whenever another thread goes on. To a thread they are constants: the compiler may keep them,
// and the instrumentation does not ask about them.
extern const uint3 threadIdx, blockIdx;
extern const dim3 blockDim, gridDim;
constexpr int warpSize = 32;

static inline void __syncthreads() { frnn_emulation::block_barrier(0, 0, false); }
static inline int __syncthreads_count(int predicate) {
  return static_cast<int>(frnn_emulation::block_barrier(0, 0, predicate != 0));
}
static inline int __syncthreads_or(int predicate) { return __syncthreads_count(predicate) != 0; }
static inline int __syncthreads_and(int predicate) { return __syncthreads_count(predicate == 0) == 0; }

static inline void __syncwarp(unsigned mask = 0xffffffffu) {
  frnn_emulation::warp_meet(frnn_emulation::WarpOperation::synchronize, mask, 0, 0);
}
static inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return static_cast<unsigned>(
      frnn_emulation::warp_meet(frnn_emulation::WarpOperation::vote, mask, predicate != 0, 0));
}
static inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
static inline int __all_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate == 0) == 0;
}

namespace frnn_emulation {
template <class T>
inline T shuffle(unsigned mask, T value, unsigned source) {
  static_assert(sizeof(T) <= 8, "a shuffle moves 4 or 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = warp_meet(WarpOperation::shuffle, mask, bits, source);
  memcpy(&value, &bits, sizeof(T));
  return value;
}
template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
}  // namespace frnn_emulation

template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = warpSize) {
  const unsigned lane = frnn_emulation::thread_lane(), inside = static_cast<unsigned>(width) - 1;
  return frnn_emulation::shuffle(mask, value, (lane & ~inside) | (static_cast<unsigned>(source) & inside));
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  const unsigned lane = frnn_emulation::thread_lane(), inside = lane & (static_cast<unsigned>(width) - 1);
  return frnn_emulation::shuffle(mask, value, delta <= inside ? lane - delta : lane);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  const unsigned lane = frnn_emulation::thread_lane(), last = lane | (static_cast<unsigned>(width) - 1);
  return frnn_emulation::shuffle(mask, value, lane + delta <= last ? lane + delta : lane);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = warpSize) {
  const unsigned lane = frnn_emulation::thread_lane(), last = lane | (static_cast<unsigned>(width) - 1);
  const unsigned source = lane ^ static_cast<unsigned>(bits);
  return frnn_emulation::shuffle(mask, value, source <= last ? source : lane);
}

static inline void __threadfence_block() { frnn_emulation::fence(frnn_emulation::Scope::block); }
static inline void __threadfence() { frnn_emulation::fence(frnn_emulation::Scope::device); }
static inline void __threadfence_system() { frnn_emulation::fence(frnn_emulation::Scope::device); }
static inline void __nanosleep(unsigned) { frnn_emulation::pause(); }
[[noreturn]] static inline void __trap() { frnn_emulation::trap("__trap()"); }

namespace frnn_emulation {
template <class T>
struct NumberOf;
template <>
struct NumberOf<int> {
  static constexpr Number value = Number::i32;
  using Bits = uint32_t;
};
template <>
struct NumberOf<unsigned> {
  static constexpr Number value = Number::u32;
  using Bits = uint32_t;
};
template <>
struct NumberOf<unsigned long long> {
  static constexpr Number value = Number::u64;
  using Bits = uint64_t;
};
template <>
struct NumberOf<float> {
  static constexpr Number value = Number::f32;
  using Bits = uint32_t;
};
template <>
struct NumberOf<double> {
  static constexpr Number value = Number::f64;
  using Bits = uint64_t;
};
template <class T>
inline T atomic_as(T* address, Atomic operation, T operand, T compare = T()) {
  using Bits = typename NumberOf<T>::Bits;
  return bit_cast<T>(static_cast<Bits>(
      atomic(address, operation, NumberOf<T>::value, bit_cast<Bits>(operand), bit_cast<Bits>(compare))));
}
}  // namespace frnn_emulation

#define FRNN_EMULATION_ATOMIC(name, operation, T)                                        \
  static inline T name(T* address, T value) {                                            \
    return frnn_emulation::atomic_as(address, frnn_emulation::Atomic::operation, value); \
  }
FRNN_EMULATION_ATOMIC(atomicAdd, add, int)
FRNN_EMULATION_ATOMIC(atomicAdd, add, unsigned)
FRNN_EMULATION_ATOMIC(atomicAdd, add, unsigned long long)
FRNN_EMULATION_ATOMIC(atomicAdd, add, float)
FRNN_EMULATION_ATOMIC(atomicAdd, add, double)
FRNN_EMULATION_ATOMIC(atomicExch, exchange, int)
FRNN_EMULATION_ATOMIC(atomicExch, exchange, unsigned)
FRNN_EMULATION_ATOMIC(atomicExch, exchange, unsigned long long)
FRNN_EMULATION_ATOMIC(atomicExch, exchange, float)
FRNN_EMULATION_ATOMIC(atomicMax, maximum, int)
FRNN_EMULATION_ATOMIC(atomicMax, maximum, unsigned)
FRNN_EMULATION_ATOMIC(atomicMax, maximum, unsigned long long)
FRNN_EMULATION_ATOMIC(atomicMin, minimum, int)
FRNN_EMULATION_ATOMIC(atomicMin, minimum, unsigned)
FRNN_EMULATION_ATOMIC(atomicMin, minimum, unsigned long long)
FRNN_EMULATION_ATOMIC(atomicAnd, bit_and, int)
FRNN_EMULATION_ATOMIC(atomicAnd, bit_and, unsigned)
FRNN_EMULATION_ATOMIC(atomicOr, bit_or, int)
FRNN_EMULATION_ATOMIC(atomicOr, bit_or, unsigned)
#undef FRNN_EMULATION_ATOMIC
template <class T>
inline T atomicCAS(T* address, T compare, T value) {
  return frnn_emulation::atomic_as(address, frnn_emulation::Atomic::compare_exchange, value, compare);
}

// Plain accesses, whatever the cache is told: the instrumentation sees them here.
template <class T>
inline T __ldg(const T* address) {
  return *address;
}
template <class T>
inline T __ldcg(const T* address) {
  return *address;
}
template <class T>
inline T __ldcs(const T* address) {
  return *address;
}
template <class T>
inline T __ldca(const T* address) {
  return *address;
}
template <class T>
inline void __stcg(T* address, T value) {
  *address = value;
}
template <class T>
inline void __stcs(T* address, T value) {
  *address = value;
}

static inline unsigned __float_as_uint(float x) { return frnn_emulation::bit_cast<unsigned>(x); }
static inline int __float_as_int(float x) { return frnn_emulation::bit_cast<int>(x); }
static inline float __uint_as_float(unsigned x) { return frnn_emulation::bit_cast<float>(x); }
static inline float __int_as_float(int x) { return frnn_emulation::bit_cast<float>(x); }
static inline long long __double_as_longlong(double x) { return frnn_emulation::bit_cast<long long>(x); }
static inline double __longlong_as_double(long long x) { return frnn_emulation::bit_cast<double>(x); }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline float __fdividef(float a, float b) { return a / b; }
// Macros, for these names are taken in some C libraries.
#define __expf(x) expf(x)
#define __logf(x) logf(x)
static inline float __frcp_rn(float x) { return 1.0f / x; }
static inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }

#define FRNN_EMULATION_MIN_MAX(T)                         \
  static inline T min(T a, T b) { return b < a ? b : a; } \
  static inline T max(T a, T b) { return a < b ? b : a; }
FRNN_EMULATION_MIN_MAX(int)
FRNN_EMULATION_MIN_MAX(unsigned)
FRNN_EMULATION_MIN_MAX(long)
FRNN_EMULATION_MIN_MAX(unsigned long)
FRNN_EMULATION_MIN_MAX(long long)
FRNN_EMULATION_MIN_MAX(unsigned long long)
#undef FRNN_EMULATION_MIN_MAX
static inline float min(float a, float b) { return fminf(a, b); }
static inline float max(float a, float b) { return fmaxf(a, b); }
static inline double min(double a, double b) { return fmin(a, b); }
static inline double max(double a, double b) { return fmax(a, b); }
