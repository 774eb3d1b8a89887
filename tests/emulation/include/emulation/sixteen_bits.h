// Conversions between float and the 16-bit types, rounding to nearest even as the GPU's instructions do. Part of the
// emulation's cuda_fp16.h and cuda_bf16.h.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "types.h"

namespace frnn_emulation {

inline uint16_t float_to_bfloat16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if (value != value) return 0x7fff;  // the GPU's own NaN
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float bfloat16_to_float(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

inline uint16_t float_to_half(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7fff;
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 rounds to infinity
  if (magnitude < 0x38800000) {  // below the smallest normal, 2^-14
    // Adding 0.5 leaves the last place at 2^-24, a subnormal's: the addition rounds.
    float small;
    memcpy(&small, &magnitude, 4);
    small += 0.5f;
    memcpy(&bits, &small, 4);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000));
  }
  const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000) >> 13));
}

inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, exponent = (half >> 10) & 31;
  const uint32_t mantissa = half & 0x3ff;
  if (exponent == 0) {
    const float value = ldexpf(static_cast<float>(mantissa), -24);
    return sign ? -value : value;
  }
  const uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | (mantissa << 13);
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

}  // namespace frnn_emulation

// A 16-bit type and its pair, with the operators that CUDA gives them. Arithmetic rounds once, from float.
#define FRNN_EMULATION_SIXTEEN(Type, Pair, FROM_FLOAT, TO_FLOAT)              \
  struct Type##_raw {                                                         \
    unsigned short x;                                                         \
  };                                                                          \
  struct alignas(2) Type {                                                    \
    unsigned short bits_;                                                     \
    Type() = default;                                                         \
    Type(float value) : bits_(frnn_emulation::FROM_FLOAT(value)) {}           \
    Type(double value) : Type(static_cast<float>(value)) {}                   \
    Type(int value) : Type(static_cast<float>(value)) {}                      \
    Type(Type##_raw raw) : bits_(raw.x) {}                                    \
    operator float() const { return frnn_emulation::TO_FLOAT(bits_); }        \
    operator Type##_raw() const { return Type##_raw{bits_}; }                 \
  };                                                                          \
  inline Type operator+(Type a, Type b) { return Type(float(a) + float(b)); } \
  inline Type operator-(Type a, Type b) { return Type(float(a) - float(b)); } \
  inline Type operator*(Type a, Type b) { return Type(float(a) * float(b)); } \
  inline Type operator/(Type a, Type b) { return Type(float(a) / float(b)); } \
  inline Type operator-(Type a) { return Type(-float(a)); }                   \
  inline Type& operator+=(Type& a, Type b) { return a = a + b; }              \
  inline Type& operator-=(Type& a, Type b) { return a = a - b; }              \
  inline Type& operator*=(Type& a, Type b) { return a = a * b; }              \
  inline bool operator==(Type a, Type b) { return float(a) == float(b); }     \
  inline bool operator!=(Type a, Type b) { return float(a) != float(b); }     \
  inline bool operator<(Type a, Type b) { return float(a) < float(b); }       \
  inline bool operator>(Type a, Type b) { return float(a) > float(b); }       \
  inline bool operator<=(Type a, Type b) { return float(a) <= float(b); }     \
  inline bool operator>=(Type a, Type b) { return float(a) >= float(b); }     \
  struct alignas(4) Pair {                                                    \
    Type x, y;                                                                \
  };
