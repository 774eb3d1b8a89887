// A vector of units in one register, with the elementary functions that the cells ask for. Written with the
// compilers' vector extension, so that AVX-512, AVX2, SSE2 and NEON come from the same lines; FRNN_VECTOR_BYTES and
// FRNN_ISA are set by the file that includes the kernels.
#pragma once

#include <stdint.h>
#include <string.h>

#include <utility>

#include "../args.h"
#include "../cells/math.h"

namespace frnn {
inline namespace FRNN_ISA {

template <class T>
struct Real;

// e^kExpMax is finite, and its inverse below the smallest normal number: sigmoid ends in exact zero.
// kShift is 1.5 * 2^mantissa bits: adding it rounds to an integer and leaves that integer in the lowest bits.
// The polynomials, lowest coefficient first, have the smallest largest relative error on their range (Remez):
//   e^r = 1 + r + r^2 kExp(r), |r| <= ln2/2:               2^-28.3 and 2^-57.9
//   tanh x = x + x^3 kTanh(x^2), |x| <= kTanhSmall:        2^-29.8 and 2^-65.7
// From kTanhSmall on tanh is above a half, where 1 - 2 / (e^2x + 1) loses nothing.
template <>
struct Real<float> {
  typedef float Native __attribute__((vector_size(FRNN_VECTOR_BYTES)));
  typedef int32_t NativeInt __attribute__((vector_size(FRNN_VECTOR_BYTES)));
  static constexpr float kShift = 12582912.0f, kLog2e = 1.44269504f;
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr float kExpMax = 88.0f, kTanhMax = 10.0f, kTanhSmall = 0.55f;
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr float kExp[] = {0.4999999341f, 0.1666652011f, 0.04166839412f, 0.008368779965f,
                                   0.001381447104f};
  static constexpr float kTanh[] = {-0.3333331743f, 0.1333258113f, -0.05385174202f, 0.02106917527f,
                                    -0.006270478f};
};
template <>
struct Real<double> {
  typedef double Native __attribute__((vector_size(FRNN_VECTOR_BYTES)));
  typedef int64_t NativeInt __attribute__((vector_size(FRNN_VECTOR_BYTES)));
  static constexpr double kShift = 6755399441055744.0, kLog2e = 1.4426950408889634;
  static constexpr double kLn2High = 6.93147180369123816490e-01, kLn2Low = 1.90821492927058770002e-10;
  static constexpr double kExpMax = 709.0, kTanhMax = 20.0, kTanhSmall = 0.55;
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr double kExp[] = {
      0.500000000000001072,    0.1666666666666641024,   0.04166666666652919309,   0.008333333333495626749,
      0.001388888894392145402, 1.984126950475163725e-4, 2.480149276497395539e-05, 2.755758735753165398e-6,
      2.763037822818674268e-7, 2.499996020833641821e-8};
  static constexpr double kTanh[] = {
      -0.3333333333333333213,   0.1333333333333306203,   -0.05396825396804044746,  0.02186948852771428821,
      -0.008863235333973872917, 0.003592125133723870861, -0.00145580560511620536,  5.898316813419143776e-4,
      -2.382090479011609727e-4, 9.395525997705698001e-5, -3.294967253722925512e-5, 7.439173506132322995e-6};
};

template <class T>
struct Vec {
  static constexpr int kSize = FRNN_VECTOR_BYTES / sizeof(T);
  using Native = typename Real<T>::Native;
  using NativeInt = typename Real<T>::NativeInt;

  Native v;

  FRNN_HD Vec() {}
  FRNN_HD Vec(Native n) : v(n) {}
  explicit FRNN_HD Vec(T x) : v(x - Native{}) {}  // a difference keeps the sign of -0.0, a sum does not

  friend FRNN_HD Vec operator+(Vec a, Vec b) { return a.v + b.v; }
  friend FRNN_HD Vec operator-(Vec a, Vec b) { return a.v - b.v; }
  friend FRNN_HD Vec operator*(Vec a, Vec b) { return a.v * b.v; }
  friend FRNN_HD Vec operator/(Vec a, Vec b) { return a.v / b.v; }
};

// What a product of stored numbers S is made of: kDepth numbers of k, side by side, for each unit of a vector.
// bfloat16.h has the one that is not plain.
template <class S>
constexpr int kDepth = 1;
template <>
constexpr int kDepth<BFloat16> = 2;

// The k of a packed panel are filled up with zeros to a multiple of this.
template <class S>
constexpr int kPanelDepth = kDepth<S>;
#ifdef FRNN_AMX
template <>
constexpr int kPanelDepth<BFloat16> = 32;  // a tile's
#endif

template <class T>
FRNN_HD Vec<T> load(const T* p) {
  Vec<T> x;
  memcpy(&x.v, p, sizeof x.v);
  return x;
}
template <class T>
FRNN_HD void store(T* p, Vec<T> x) {
  memcpy(p, &x.v, sizeof x.v);
}

// The first n values only, for the last vector of a row. The rest is read as zero.
template <class T>
FRNN_HD Vec<T> load(const T* p, int n) {
  if (n >= Vec<T>::kSize) return load(p);
  Vec<T> x(T(0));
  for (int k = 0; k < n; ++k) x.v[k] = p[k];
  return x;
}
template <class T>
FRNN_HD void store(T* p, Vec<T> x, int n) {
  if (n >= Vec<T>::kSize) return store(p, x);
  for (int k = 0; k < n; ++k) p[k] = x.v[k];
}

// A whole vector, in place of a number of values that is known only at run time.
struct Whole {};
template <class T>
FRNN_HD auto load(const T* p, Whole) {
  return load(p);
}
template <class T, class V>
FRNN_HD void store(T* p, V x, Whole) {
  store(p, x);
}
// f(n) for the first n values of a vector at most: all but the last of a row are whole, and their code knows it.
template <int kSize, class F>
FRNN_HD void with_count(int64_t n, F&& f) {
  if (n >= kSize)
    f(Whole{});
  else if (n > 0)
    f(static_cast<int>(n));
}

// Brings kVectors vectors at p into the cache, to be read or, by the second form, written. p may lie outside of any array.
// Whatever only fetches must be inlined: GCC takes a call without another effect for one without any, and drops it.
template <int kVectors, class T>
FRNN_HD void fetch(const T* p) {
#pragma GCC unroll 8
  for (int byte = 0; byte < kVectors * FRNN_VECTOR_BYTES; byte += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(p) + byte);
}
template <int kVectors, class T>
FRNN_HD void fetch(T* p) {
#pragma GCC unroll 8
  for (int byte = 0; byte < kVectors * FRNN_VECTOR_BYTES; byte += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(p) + byte, 1);
}

// Sums of neighbours: those of a in the lower half of the result, those of b in the upper.
template <class T, class I, I... k>
FRNN_HD Vec<T> pair_sums(Vec<T> a, Vec<T> b, std::integer_sequence<I, k...>) {
  using NativeInt =
      typename Vec<T>::NativeInt;  // written out, the indices become constants of the instruction
  return __builtin_shuffle(a.v, b.v, NativeInt{(2 * k)...}) +
         __builtin_shuffle(a.v, b.v, NativeInt{(2 * k + 1)...});
}

// kCount vectors -> one vector of their sums, kSize / kCount partial sums of each side by side, in a fixed order of
// additions: kCount times as many of those make whole sums, in the same order.
template <int kCount, class T>
FRNN_HD Vec<T> sums_of(Vec<T>* x) {
#pragma GCC unroll 4
  for (int count = kCount / 2; count > 0; count /= 2)
#pragma GCC unroll 8
    for (int k = 0; k < count; ++k)
      x[k] = pair_sums(x[2 * k], x[2 * k + 1], std::make_integer_sequence<int, Vec<T>::kSize>());
  return x[0];
}

// One exchange of a transposition: the blocks of kDistance values that stand across the diagonal of a and b.
template <int kDistance, class T, class I, I... k>
FRNN_HD void exchange(Vec<T>& a, Vec<T>& b, std::integer_sequence<I, k...>) {
  using NativeInt = typename Vec<T>::NativeInt;
  constexpr int kSize = Vec<T>::kSize;
  const auto upper = __builtin_shuffle(a.v, b.v, NativeInt{(k & kDistance ? kSize + k - kDistance : k)...});
  b.v = __builtin_shuffle(a.v, b.v, NativeInt{(k & kDistance ? kSize + k : k + kDistance)...});
  a.v = upper;
}

// A square of values, one vector a row, mirrored at its diagonal.
template <class T, int kDistance = 1>
FRNN_HD void transpose(Vec<T>* rows) {
  constexpr int kSize = Vec<T>::kSize;
#pragma GCC unroll 16
  for (int i = 0; i < kSize; ++i)
    if (!(i & kDistance))
      exchange<kDistance>(rows[i], rows[i + kDistance], std::make_integer_sequence<int, kSize>());
  if constexpr (2 * kDistance < kSize) transpose<T, 2 * kDistance>(rows);
}

template <class T, int kTerms>
FRNN_HD Vec<T> polynomial(const T (&coefficients)[kTerms], Vec<T> x) {
  Vec<T> sum(coefficients[kTerms - 1]);
#pragma GCC unroll 16
  for (int k = kTerms - 2; k >= 0; --k) sum = sum * x + Vec<T>(coefficients[k]);
  return sum;
}

// e^x = 2^n e^r with r in [-ln2/2, ln2/2]. Returns 2^n and e^r - 1 apart: their sum would round.
template <class T>
FRNN_HD void exp_parts(Vec<T> x, Vec<T>& two_n, Vec<T>& expm1_r) {
  using R = Real<T>;
  using V = Vec<T>;
  const V shifted = x * V(R::kLog2e) + V(R::kShift);
  const V n = shifted - V(R::kShift);
  const V r = (x - n * V(R::kLn2High)) - n * V(R::kLn2Low);
  expm1_r = r + r * r * polynomial(R::kExp, r);
  const auto bits = (typename V::NativeInt)shifted.v;
  two_n = V((typename V::Native)((bits + R::kBias) << R::kMantissa));
}

template <class T>
FRNN_HD Vec<T> sigmoid(Vec<T> x) {
  using V = Vec<T>;
  const T limit = Real<T>::kExpMax;
  V y(V(T(0)) - x);
  y.v = y.v > limit ? V(limit).v : y.v;  // in this order NaN stays NaN
  y.v = y.v < -limit ? V(-limit).v : y.v;
  V two_n, expm1_r;
  exp_parts(y, two_n, expm1_r);
  // 1 / (1 + 2^n e^r). What its two sums lose would cost half an ulp: the quotient is corrected by it.
  const V one_and_two_n = V(T(1)) + two_n, rest = two_n * expm1_r;
  const V d = one_and_two_n + rest;
  const V lost = (rest - (d - one_and_two_n)) + (V(T(1)) - (one_and_two_n - two_n));
  const V inverse = V(T(1)) / d;
  return inverse - inverse * (inverse * lost);
}

template <class T>
FRNN_HD Vec<T> tanh_(Vec<T> x) {
  using R = Real<T>;
  using V = Vec<T>;
  using NativeInt = typename V::NativeInt;
  const NativeInt sign = (NativeInt)x.v & (NativeInt)V(T(-0.0)).v;
  const V a((typename V::Native)((NativeInt)x.v ^ sign));
  const V square = a * a;
  const V small = a + a * square * polynomial(R::kTanh, square);
  const V limited(a.v > R::kTanhMax ? V(R::kTanhMax).v : a.v);
  V two_n, expm1_r;
  exp_parts(limited + limited, two_n, expm1_r);
  const V large = V(T(1)) - V(T(2)) / (V(T(1)) + two_n + two_n * expm1_r);
  const V y(a.v < R::kTanhSmall ? small.v : large.v);
  return V((typename V::Native)((NativeInt)y.v | sign));
}

template <class T>
FRNN_HD Vec<T> relu(Vec<T> x) {
  return Vec<T>(x.v < T(0) ? Vec<T>(T(0)).v : x.v);
}

template <class T>
FRNN_HD Vec<T> step_function(Vec<T> x) {
  return Vec<T>(x.v <= T(0) ? Vec<T>(T(0)).v : Vec<T>(T(1)).v);
}

}  // namespace FRNN_ISA
}  // namespace frnn
