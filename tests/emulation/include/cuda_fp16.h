// __half as far as csrc/cuda uses it. See cuda_runtime.h.
#pragma once

#include "emulation/sixteen_bits.h"

// NOLINTBEGIN: the names are CUDA's
FRNN_EMULATION_SIXTEEN(__half, __half2, float_to_half, half_to_float)
typedef __half half;
typedef __half2 half2;

inline __half __float2half(float x) { return __half(x); }
inline __half __float2half_rn(float x) { return __half(x); }
inline float __half2float(__half x) { return float(x); }
inline unsigned short __half_as_ushort(__half x) { return x.bits_; }
inline __half __ushort_as_half(unsigned short x) { return __half(__half_raw{x}); }
inline __half2 __halves2half2(__half low, __half high) { return __half2{low, high}; }
inline __half2 make_half2(__half low, __half high) { return __half2{low, high}; }
inline __half2 __floats2half2_rn(float low, float high) { return __half2{__half(low), __half(high)}; }
inline __half2 __float22half2_rn(float2 v) { return __floats2half2_rn(v.x, v.y); }
inline float2 __half22float2(__half2 v) { return float2{float(v.x), float(v.y)}; }
inline __half __low2half(__half2 v) { return v.x; }
inline __half __high2half(__half2 v) { return v.y; }
inline float __low2float(__half2 v) { return float(v.x); }
inline float __high2float(__half2 v) { return float(v.y); }
// NOLINTEND
