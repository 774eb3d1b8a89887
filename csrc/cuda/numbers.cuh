// Loads and stores of stored numbers as numbers to compute with, one or a whole vector at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>
#include <string.h>

#include "../dtypes.h"

namespace frnn {

__device__ __forceinline__ float to_accumulate(float x) { return x; }
__device__ __forceinline__ double to_accumulate(double x) { return x; }
__device__ __forceinline__ float to_accumulate(Half x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ __forceinline__ float to_accumulate(BFloat16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }

template <class T>
__device__ __forceinline__ T from_accumulate(Accumulate<T> x) {
  return x;
}
template <>
__device__ __forceinline__ Half from_accumulate<Half>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}
template <>
__device__ __forceinline__ BFloat16 from_accumulate<BFloat16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}

// N numbers that are moved by one instruction.
template <class T, int N>
struct alignas(sizeof(T) * N) Packed {
  T at[N];
};

template <int N, class T>
__device__ __forceinline__ void load(Accumulate<T> (&to)[N], const T* from) {
  const Packed<T, N> packed = *reinterpret_cast<const Packed<T, N>*>(from);
#pragma unroll
  for (int k = 0; k < N; ++k) to[k] = to_accumulate(packed.at[k]);
}

// An integer of so many bytes.
template <size_t bytes>
struct WordOf;
template <>
struct WordOf<2> {
  using type = uint16_t;
};
template <>
struct WordOf<4> {
  using type = uint32_t;
};
template <>
struct WordOf<8> {
  using type = uint64_t;
};
template <>
struct WordOf<16> {
  using type = unsigned __int128;
};

// Through an integer: nvcc stores a struct of numbers one by one.
template <int N, class T>
__device__ __forceinline__ void store(T* to, const Accumulate<T> (&from)[N]) {
  using Word = typename WordOf<sizeof(T) * N>::type;
  Packed<T, N> packed;
#pragma unroll
  for (int k = 0; k < N; ++k) packed.at[k] = from_accumulate<T>(from[k]);
  Word word;
  memcpy(&word, &packed, sizeof word);
  *reinterpret_cast<Word*>(to) = word;
}

// Whether N numbers from here on are one aligned vector, and so are those of every row. Null is aligned. For the host.
template <int N, class T>
bool aligned(const T* first, int64_t stride = 0) {
  return reinterpret_cast<uintptr_t>(first) % (N * sizeof(T)) == 0 && stride % N == 0;
}

}  // namespace frnn
