// CUDA's function qualifiers and vector types, as a host compiler may see them. Part of the emulation's cuda_runtime.h.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifndef FRNN_EMULATION
#define FRNN_EMULATION 1
#endif

#define __host__
#define __device__
#define __global__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
// Blocks that run at the same time would share a static array: only dynamic shared memory is emulated.
#define __shared__ \
  static_assert(false, "emulation: use shared_memory<T>() of ptx.cuh, not static __shared__");
// A launch could not see these dimensions.
#define __cluster_dims__(...) \
  static_assert(false, "emulation: give the cluster's size as a launch attribute");

// NOLINTBEGIN: the names are CUDA's
#define FRNN_EMULATION_VECTOR1(T, name) \
  struct name##1 { T x; };              \
  static inline name##1 make_##name##1(T x) { return name##1 {x}; }
#define FRNN_EMULATION_VECTOR2(T, name, align) \
  struct alignas(align) name##2 { T x, y; };   \
  static inline name##2 make_##name##2(T x, T y) { return name##2 {x, y}; }
#define FRNN_EMULATION_VECTOR3(T, name) \
  struct name##3 { T x, y, z; };        \
  static inline name##3 make_##name##3(T x, T y, T z) { return name##3 {x, y, z}; }
#define FRNN_EMULATION_VECTOR4(T, name, align)     \
  struct alignas(align) name##4 { T x, y, z, w; }; \
  static inline name##4 make_##name##4(T x, T y, T z, T w) { return name##4 {x, y, z, w}; }
#define FRNN_EMULATION_VECTORS(T, name, align2, align4) \
  FRNN_EMULATION_VECTOR1(T, name)                       \
  FRNN_EMULATION_VECTOR2(T, name, align2)               \
  FRNN_EMULATION_VECTOR3(T, name)                       \
  FRNN_EMULATION_VECTOR4(T, name, align4)

FRNN_EMULATION_VECTORS(signed char, char, 2, 4)
FRNN_EMULATION_VECTORS(unsigned char, uchar, 2, 4)
FRNN_EMULATION_VECTORS(short, short, 4, 8)
FRNN_EMULATION_VECTORS(unsigned short, ushort, 4, 8)
FRNN_EMULATION_VECTORS(int, int, 8, 16)
FRNN_EMULATION_VECTORS(unsigned int, uint, 8, 16)
FRNN_EMULATION_VECTORS(float, float, 8, 16)
FRNN_EMULATION_VECTORS(long long, longlong, 16, 16)
FRNN_EMULATION_VECTORS(unsigned long long, ulonglong, 16, 16)
FRNN_EMULATION_VECTORS(double, double, 16, 16)

#undef FRNN_EMULATION_VECTORS
#undef FRNN_EMULATION_VECTOR1
#undef FRNN_EMULATION_VECTOR2
#undef FRNN_EMULATION_VECTOR3
#undef FRNN_EMULATION_VECTOR4

struct dim3 {
  unsigned int x, y, z;
  constexpr dim3(unsigned int x = 1, unsigned int y = 1, unsigned int z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
  operator uint3() const { return uint3{x, y, z}; }
};
// NOLINTEND
