// One SIMD vector, Vec<float> or Vec<double>, with the same meaning on every instruction set.
//
// Arithmetic is the compiler's own vector extension; only what it cannot say (fused multiply-add, NaN-keeping
// min and max, masked access, conversions to 16 bits) is written per instruction set, in this file alone.
// The build forbids contraction, so that a * b + c rounds twice everywhere and fma(a, b, c) once where the
// hardware can: the bits of a result never depend on the function that it was inlined into.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "half.h"

namespace fastseq::FASTSEQ_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kVectorRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kVectorRegisters = 16;
#else
constexpr int kVectorBytes = 16, kVectorRegisters = 16;
#endif

// Unsigned, so that the arithmetic on a NaN's bits wraps.
template <int kBytes>
struct IntegerOf;
template <>
struct IntegerOf<4> {
  using type = uint32_t;
};
template <>
struct IntegerOf<8> {
  using type = uint64_t;
};

template <class T>
struct Vec {
  using Scalar = T;
  using Integer = typename IntegerOf<sizeof(T)>::type;
  static constexpr int kWidth = kVectorBytes / sizeof(T);
  typedef T Native __attribute__((vector_size(kVectorBytes)));
  typedef Integer NativeInteger __attribute__((vector_size(kVectorBytes)));

  Native v;

  Vec() = default;
  Vec(T x) : v(x - Native{}) {}  // x - 0 is x, -0 and NaN included, so this is a broadcast and nothing else
  static Vec of(Native v) {
    Vec r;
    r.v = v;
    return r;
  }
};

#define FASTSEQ_OPERATOR(op)                                       \
  template <class T>                                               \
  inline Vec<T> operator op(Vec<T> a, Vec<T> b) {                  \
    return Vec<T>::of(a.v op b.v);                                 \
  }                                                                \
  template <class T>                                               \
  inline Vec<T> operator op(typename Vec<T>::Scalar a, Vec<T> b) { \
    return Vec<T>(a) op b;                                         \
  }                                                                \
  template <class T>                                               \
  inline Vec<T> operator op(Vec<T> a, typename Vec<T>::Scalar b) { \
    return a op Vec<T>(b);                                         \
  }
FASTSEQ_OPERATOR(+)
FASTSEQ_OPERATOR(-)
FASTSEQ_OPERATOR(*)
FASTSEQ_OPERATOR(/)
#undef FASTSEQ_OPERATOR
template <class T>
inline Vec<T> operator-(Vec<T> a) {
  return Vec<T>::of(-a.v);
}

// fma(a, b, c) = a * b + c. min and max return x where x is NaN.
#if defined(__AVX512F__)
inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return Vec<float>::of((Vec<float>::Native)_mm512_fmadd_ps((__m512)a.v, (__m512)b.v, (__m512)c.v));
}
inline Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return Vec<double>::of((Vec<double>::Native)_mm512_fmadd_pd((__m512d)a.v, (__m512d)b.v, (__m512d)c.v));
}
inline Vec<float> min(Vec<float> bound, Vec<float> x) {
  return Vec<float>::of((Vec<float>::Native)_mm512_maskz_min_ps(__mmask16(-1), (__m512)bound.v, (__m512)x.v));
}
inline Vec<double> min(Vec<double> bound, Vec<double> x) {
  return Vec<double>::of(
      (Vec<double>::Native)_mm512_maskz_min_pd(__mmask8(-1), (__m512d)bound.v, (__m512d)x.v));
}
inline Vec<float> max(Vec<float> bound, Vec<float> x) {
  return Vec<float>::of((Vec<float>::Native)_mm512_maskz_max_ps(__mmask16(-1), (__m512)bound.v, (__m512)x.v));
}
inline Vec<double> max(Vec<double> bound, Vec<double> x) {
  return Vec<double>::of(
      (Vec<double>::Native)_mm512_maskz_max_pd(__mmask8(-1), (__m512d)bound.v, (__m512d)x.v));
}
#elif defined(__AVX2__)
inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return Vec<float>::of((Vec<float>::Native)_mm256_fmadd_ps((__m256)a.v, (__m256)b.v, (__m256)c.v));
}
inline Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return Vec<double>::of((Vec<double>::Native)_mm256_fmadd_pd((__m256d)a.v, (__m256d)b.v, (__m256d)c.v));
}
inline Vec<float> min(Vec<float> bound, Vec<float> x) {
  return Vec<float>::of((Vec<float>::Native)_mm256_min_ps((__m256)bound.v, (__m256)x.v));
}
inline Vec<double> min(Vec<double> bound, Vec<double> x) {
  return Vec<double>::of((Vec<double>::Native)_mm256_min_pd((__m256d)bound.v, (__m256d)x.v));
}
inline Vec<float> max(Vec<float> bound, Vec<float> x) {
  return Vec<float>::of((Vec<float>::Native)_mm256_max_ps((__m256)bound.v, (__m256)x.v));
}
inline Vec<double> max(Vec<double> bound, Vec<double> x) {
  return Vec<double>::of((Vec<double>::Native)_mm256_max_pd((__m256d)bound.v, (__m256d)x.v));
}
#else
template <class T>
inline Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) {
  return a * b + c;
}
template <class T>
inline Vec<T> min(Vec<T> bound, Vec<T> x) {
  return Vec<T>::of(bound.v < x.v ? bound.v : x.v);
}
template <class T>
inline Vec<T> max(Vec<T> bound, Vec<T> x) {
  return Vec<T>::of(bound.v > x.v ? bound.v : x.v);
}
#endif

// ---- lanes ----

template <class T>
using Lanes = decltype(typename Vec<T>::Native{} < typename Vec<T>::Native{});  // all bits of a lane, or none

template <class T>
inline Vec<T> select(Lanes<T> lanes, Vec<T> a, Vec<T> b) {
  return Vec<T>::of(lanes ? a.v : b.v);
}
template <class T>
inline Vec<T> magnitude(Vec<T> x) {
  return Vec<T>::of((typename Vec<T>::Native)((typename Vec<T>::NativeInteger)x.v << 1 >> 1));
}
template <class T>
inline Vec<T> lane_numbers() {
  Vec<T> r;
  for (int i = 0; i < Vec<T>::kWidth; ++i) r.v[i] = T(i);
  return r;
}
template <class T>
inline T sum_of_lanes(Vec<T> x) {
  T lanes[Vec<T>::kWidth];
  std::memcpy(lanes, &x.v, sizeof lanes);
  for (int n = Vec<T>::kWidth / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) lanes[i] += lanes[i + n];
  }
  return lanes[0];
}

// a * b + c, but -inf where c is that, whatever the product.
template <class T>
inline Vec<T> fma_or_lowest(Vec<T> a, Vec<T> b, Vec<T> c) {
  const Vec<T> lowest(-__builtin_inf());
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    const __mmask16 others = _mm512_cmp_ps_mask((__m512)c.v, (__m512)lowest.v, _CMP_NEQ_UQ);
    return Vec<T>::of(
        (typename Vec<T>::Native)_mm512_mask3_fmadd_ps((__m512)a.v, (__m512)b.v, (__m512)c.v, others));
  }
#endif
  return select<T>(c.v == lowest.v, lowest, fma(a, b, c));
}

// ---- memory: load and store of kWidth elements, or of the first n only (the rest reads as zero) ----

template <class V>
inline V load(const typename V::Scalar* p) {
  V r;
  std::memcpy(&r.v, p, sizeof r.v);
  return r;
}
template <class T>
inline void store(T* p, Vec<T> x) {
  std::memcpy(p, &x.v, sizeof x.v);
}

#if defined(__AVX512F__)
inline Vec<float> load_first(const float* p, int64_t n) {
  return Vec<float>::of((Vec<float>::Native)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p));
}
inline Vec<double> load_first(const double* p, int64_t n) {
  return Vec<double>::of((Vec<double>::Native)_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p));
}
inline void store_first(float* p, Vec<float> x, int64_t n) {
  _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)x.v);
}
inline void store_first(double* p, Vec<double> x, int64_t n) {
  _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), (__m512d)x.v);
}
#else
template <class T>
inline Vec<T> load_first(const T* p, int64_t n) {
  T buffer[Vec<T>::kWidth] = {};
  std::memcpy(buffer, p, size_t(n) * sizeof(T));
  return load<Vec<T>>(buffer);
}
template <class T>
inline void store_first(T* p, Vec<T> x, int64_t n) {
  T buffer[Vec<T>::kWidth];
  store(buffer, x);
  std::memcpy(p, buffer, size_t(n) * sizeof(T));
}
#endif

// ---- transposition ----

// Swaps the off-diagonal blocks of the 2 x 2 blocks of kDistance lanes that a and b make.
template <int kDistance, class T>
inline void exchange_blocks(Vec<T>& a, Vec<T>& b) {
  constexpr int kWidth = Vec<T>::kWidth;
  typename Vec<T>::NativeInteger low, high;
  for (int i = 0; i < kWidth; ++i) {
    low[i] = (i & kDistance) == 0 ? i : i - kDistance + kWidth;
    high[i] = (i & kDistance) == 0 ? i + kDistance : i + kWidth;
  }
#if defined(__clang__)
  Vec<T> first, second;
  for (int i = 0; i < kWidth; ++i) {
    first.v[i] = low[i] < kWidth ? a.v[low[i]] : b.v[low[i] - kWidth];
    second.v[i] = high[i] < kWidth ? a.v[high[i]] : b.v[high[i] - kWidth];
  }
  a = first;
  b = second;
#else
  const typename Vec<T>::Native first = __builtin_shuffle(a.v, b.v, low),
                                second = __builtin_shuffle(a.v, b.v, high);
  a.v = first;
  b.v = second;
#endif
}

template <int kDistance, class T>
inline void transpose_from(Vec<T>* rows) {
  if constexpr (kDistance < Vec<T>::kWidth) {
#pragma GCC unroll 16
    for (int i = 0; i < Vec<T>::kWidth; ++i) {
      if ((i & kDistance) == 0) exchange_blocks<kDistance>(rows[i], rows[i + kDistance]);
    }
    transpose_from<kDistance * 2>(rows);
  }
}

// rows[i] lane j <-> rows[j] lane i
template <class T>
inline void transpose(Vec<T> (&rows)[Vec<T>::kWidth]) {
  transpose_from<1>(rows);
}

// Sums and maxima of the lanes of each of kWidth vectors: lane i is that of rows[i]. The rows are lost.
template <class T>
inline Vec<T> sums_of_rows(Vec<T> (&rows)[Vec<T>::kWidth]) {
  transpose(rows);
#pragma GCC unroll 4
  for (int n = Vec<T>::kWidth / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) rows[i] = rows[i] + rows[i + n];
  }
  return rows[0];
}
template <class T>
inline Vec<T> maxima_of_rows(Vec<T> (&rows)[Vec<T>::kWidth]) {
  transpose(rows);
#pragma GCC unroll 4
  for (int n = Vec<T>::kWidth / 2; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) rows[i] = max(rows[i], rows[i + n]);
  }
  return rows[0];
}

// ---- 16-bit storage ----

constexpr int kFloats = Vec<float>::kWidth;
typedef uint16_t Half16 __attribute__((vector_size(kFloats * 2)));
typedef uint32_t Word32 __attribute__((vector_size(kFloats * 4)));

template <class V>
inline V load(const bfloat16* p) {
  Half16 h;
  std::memcpy(&h, p, sizeof h);
  return V::of((typename V::Native)(__builtin_convertvector(h, Word32) << 16));
}
inline void store(bfloat16* p, Vec<float> x) {
  const Word32 u = (Word32)x.v;
  const Word32 rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16, nan = u >> 16 | 0x40;
  const Half16 h = __builtin_convertvector(x.v == x.v ? rounded : nan, Half16);
  std::memcpy(p, &h, sizeof h);
}

// As the left side of a product, whose multiplication takes numbers below the normal ones as zero anyway.
inline void store_operand(float* p, Vec<float> x) { store(p, x); }
inline void store_operand(double* p, Vec<double> x) { store(p, x); }
inline void store_operand(bfloat16* p, Vec<float> x) {
#if defined(__AVX512BF16__)
  const __m256bh h = _mm512_cvtneps_pbh((__m512)x.v);
  std::memcpy(p, &h, sizeof h);
#else
  store(p, x);
#endif
}

// The same of two rows, interleaved: even[0], odd[0], even[1], ...
inline void store_operand_pairs(bfloat16* p, Vec<float> even, Vec<float> odd) {
#if defined(__AVX512BF16__)
  constexpr uint64_t kFirst = 0x0011'0001'0010'0000, kStep = 0x0002'0002'0002'0002;
  const __m512i order =
      _mm512_set_epi64(kFirst + 7 * kStep, kFirst + 6 * kStep, kFirst + 5 * kStep, kFirst + 4 * kStep,
                       kFirst + 3 * kStep, kFirst + 2 * kStep, kFirst + kStep, kFirst);
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd.v, (__m512)even.v);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi16(order, both));
#else
  bfloat16 rows[2][kFloats];
  store(rows[0], even);
  store(rows[1], odd);
  for (int i = 0; i < kFloats; ++i) p[2 * i] = rows[0][i], p[2 * i + 1] = rows[1][i];
#endif
}

#if defined(__AVX512F__)
template <class V>
inline V load(const float16* p) {
  return V::of(
      (typename V::Native)_mm512_maskz_cvtph_ps(__mmask16(-1), _mm256_loadu_si256((const __m256i*)p)));
}
inline void store(float16* p, Vec<float> x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_maskz_cvtps_ph(__mmask16(-1), (__m512)x.v,
                                                         _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__AVX2__)
template <class V>
inline V load(const float16* p) {
  return V::of((typename V::Native)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)));
}
inline void store(float16* p, Vec<float> x) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
template <class V>
inline V load(const float16* p) {
  float buffer[kFloats];
  for (int i = 0; i < kFloats; ++i) buffer[i] = widen(p[i]);
  return load<V>(buffer);
}
inline void store(float16* p, Vec<float> x) {
  float buffer[kFloats];
  store(buffer, x);
  for (int i = 0; i < kFloats; ++i) narrow(buffer[i], p[i]);
}
#endif

template <class S>
inline Vec<float> load_first_half(const S* p, int64_t n) {
  S buffer[kFloats] = {};
  std::memcpy(buffer, p, size_t(n) * sizeof(S));
  return load<Vec<float>>(buffer);
}
template <class S>
inline void store_first_half(S* p, Vec<float> x, int64_t n) {
  S buffer[kFloats];
  store(buffer, x);
  std::memcpy(p, buffer, size_t(n) * sizeof(S));
}
inline Vec<float> load_first(const bfloat16* p, int64_t n) { return load_first_half(p, n); }
inline Vec<float> load_first(const float16* p, int64_t n) { return load_first_half(p, n); }
inline void store_first(bfloat16* p, Vec<float> x, int64_t n) { store_first_half(p, x, n); }
inline void store_first(float16* p, Vec<float> x, int64_t n) { store_first_half(p, x, n); }

// Which of kWidth bytes are not zero.
template <class T>
inline Lanes<T> load_lanes(const uint8_t* p) {
  typedef uint8_t Bytes __attribute__((vector_size(Vec<T>::kWidth)));
  Bytes bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(bytes, typename Vec<T>::NativeInteger) != 0;
}

// x where the byte of its lane is not zero, else `other`; of kWidth bytes only the first n may be read.
template <class T>
inline Vec<T> select_by_bytes(const uint8_t* p, int64_t n, Vec<T> x, Vec<T> other) {
  uint8_t some[kVectorBytes] = {};
  if (n < Vec<T>::kWidth) {
    std::memcpy(some, p, size_t(n < 0 ? 0 : n));
    p = some;
  }
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    const __m128i bytes = _mm_loadu_si128((const __m128i*)p);
    const __mmask16 lanes = _mm_test_epi8_mask(bytes, bytes);
    return Vec<T>::of((typename Vec<T>::Native)_mm512_mask_blend_ps(lanes, (__m512)other.v, (__m512)x.v));
  }
#endif
  return select<T>(load_lanes<T>(p), x, other);
}

// The first min(n, kWidth) elements.
template <class V, class S>
inline V load_upto(const S* p, int64_t n) {
  return n >= V::kWidth ? load<V>(p) : load_first(p, n);
}
template <class V, class S>
inline void store_upto(S* p, V x, int64_t n) {
  if (n >= V::kWidth) {
    store(p, x);
  } else {
    store_first(p, x, n);
  }
}

// ---- integers ----

typedef uint64_t Word64 __attribute__((vector_size(kVectorBytes)));

// a m in full, of the even lanes of a.
inline Word64 multiply_even(Word32 a, uint32_t m) {
#if defined(__AVX512F__)
  return (Word64)_mm512_maskz_mul_epu32(__mmask8(-1), (__m512i)a, _mm512_set1_epi64(m));
#elif defined(__AVX2__)
  return (Word64)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(m));
#else
  return ((Word64)a & 0xffffffff) * m;
#endif
}
// The upper and the lower half of a m.
inline void multiply_wide(Word32 a, uint32_t m, Word32& high, Word32& low) {
  const Word64 even = multiply_even(a, m), odd = multiply_even((Word32)((Word64)a >> 32), m);
  high = (Word32)(even >> 32 | (odd & 0xffffffff00000000));
  low = (Word32)((even & 0xffffffff) | odd << 32);
}

// ---- elementary functions ----
//
// expm1(r) = r + r^2 q(r) on |r| <= ln(2)/2, q a minimax polynomial of relative error 1.3e-8 (float), 1.8e-17
// (double); exp and expm1 of x follow from x = n ln(2) + r. Errors are a few ulp. NaN stays NaN; results
// below the normal numbers are zero.

template <class T>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr float kRound = 0x1.8p23f, kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;
  static constexpr float kMin = -88.0f, kMax = 89.0f, kTanhMax = 20.0f;
  static constexpr int kBias = 127, kMantissa = 23;
  static constexpr float kQ[] = {0.500000006208f, 0.166665427941f, 0.04166628141f, 0.00836661058722f,
                                 0.00139464962401f};
};
template <>
struct ExpConstants<double> {
  static constexpr double kRound = 0x1.8p52, kLn2High = 0x1.62e42fefa3800p-1, kLn2Low = 0x1.ef35793c76730p-45;
  static constexpr double kMin = -708.9, kMax = 710.0, kTanhMax = 40.0;
  static constexpr int kBias = 1023, kMantissa = 52;
  static constexpr double kQ[] = {0.50000000000000055724,     0.16666666666666686064,
                                  0.041666666666573324528,    0.0083333333333145404543,
                                  0.0013888888932483948916,   0.00019841269903157933883,
                                  0.000024801504312532130965, 2.7557227827830376799e-6,
                                  2.7626382056674594256e-7,   2.5114516347128540552e-8};
};

template <class T>
struct ReducedExp {
  Vec<T> expm1;  // of the remainder r
  Vec<T> power;  // 2^n; zero below the normal numbers, infinite above
};

template <class T>
inline ReducedExp<T> reduce_exp(Vec<T> x, T least, T most) {
  using V = Vec<T>;
  using K = ExpConstants<T>;
  x = max(V(least), min(V(most), x));
  const V shifted = fma(x, V(T(1.4426950408889634)), V(K::kRound));  // its low bits are n
  const V n = shifted - V(K::kRound);
  V r = fma(n, V(-K::kLn2High), x);
  r = fma(n, V(-K::kLn2Low), r);
  constexpr int kDegree = int(sizeof(K::kQ) / sizeof(T)) - 1;
  V q(K::kQ[kDegree]);
#pragma GCC unroll 16
  for (int i = kDegree - 1; i >= 0; --i) q = fma(q, r, V(K::kQ[i]));
  const auto exponent = ((typename V::NativeInteger)shifted.v + K::kBias) << K::kMantissa;
  return {fma(r * r, q, r), V::of((typename V::Native)exponent)};
}

template <class T>
inline Vec<T> exp(Vec<T> x) {
  const ReducedExp<T> e = reduce_exp(x, ExpConstants<T>::kMin, ExpConstants<T>::kMax);
  return (1 + e.expm1) * e.power;
}

// 2^x: 2^n times 1 + r p(r) for x = n + r, |r| <= 1/2, p a minimax polynomial of relative error 2.6e-9 (float),
// 1.8e-17 (double). For x up to the largest exponent; far below the smallest one it is zero.
template <class T>
struct Exp2Constants;
template <>
struct Exp2Constants<float> {
  static constexpr float kMin = -127.0f;
  static constexpr float kP[] = {0.693147214967884963439f,   0.240226527828761767929f,
                                 0.0555031055120698057806f,  0.00961769297614318722907f,
                                 0.00134066438474800601745f, 0.000155946770151054105592f};
};
template <>
struct Exp2Constants<double> {
  static constexpr double kMin = -1023.0;
  static constexpr double kP[] = {
      0.693147180559945696751,     0.240226506959100980061,      0.0555041086647903945281,
      0.00961812910760700261706,   0.00133335581534399697401,    0.000154035304415718500993,
      0.0000152527273851897747799, 0.00000132154426754528551815, 1.01806476605730693426e-7,
      7.07257039454079943368e-9,   4.07807178609287041655e-10};
};

template <class T>
inline Vec<T> exp2(Vec<T> x) {
  using V = Vec<T>;
  using K = Exp2Constants<T>;
  x = max(V(K::kMin), x);
  const V shifted = x + V(ExpConstants<T>::kRound);  // its low bits are n
  const V r = x - (shifted - V(ExpConstants<T>::kRound));
  constexpr int kDegree = int(sizeof(K::kP) / sizeof(T)) - 1;
  V p(K::kP[kDegree]);
#pragma GCC unroll 16
  for (int i = kDegree - 1; i >= 0; --i) p = fma(p, r, V(K::kP[i]));
  const auto exponent = ((typename V::NativeInteger)shifted.v + ExpConstants<T>::kBias)
                        << ExpConstants<T>::kMantissa;
  return fma(p, r, V(T(1))) * V::of((typename V::Native)exponent);
}

// log2(x) = whole + the result, which is at most 1 in size, for positive normal x. Read as an integer, x is nearly
// linear in its logarithm; each step takes the logarithm of x 2^-(whole + y), which is close to one, from there.
template <class T>
inline Vec<T> log2(Vec<T> x, Vec<T>& whole) {
  using V = Vec<T>;
  constexpr T kUnit = T(typename V::Integer(1) << ExpConstants<T>::kMantissa);
  const V about = V::of(__builtin_convertvector((typename V::NativeInteger)x.v, typename V::Native)) / kUnit -
                  T(ExpConstants<T>::kBias);
  whole = about + V(ExpConstants<T>::kRound) - V(ExpConstants<T>::kRound);
  const V z = x * exp2(-whole);
  V y = about - whole;
  for (int step = 0; step < 2; ++step) {
    const V f = fma(z, exp2(-y), V(T(-1)));
    y = fma(f * fma(f, fma(f, V(T(1) / 3), V(T(-0.5))), V(T(1))), V(T(1.4426950408889634)), y);
  }
  return y;
}

template <class T>
inline Vec<T> sigmoid(Vec<T> x) {
  return 1 / (1 + exp(-x));
}

// tanh(x) = e / (e + 2) with e = expm1(2 x), accurate down to zero.
template <class T>
inline Vec<T> tanh(Vec<T> x) {
  const ReducedExp<T> e = reduce_exp(x + x, -ExpConstants<T>::kTanhMax, ExpConstants<T>::kTanhMax);
  const Vec<T> expm1 = fma(e.power, e.expm1, e.power - 1);
  return expm1 / (expm1 + 2);
}

template <class T>
inline Vec<T> relu(Vec<T> x) {
  return max(Vec<T>(T(0)), x);
}
// dh where h = relu(a) is positive or NaN, else zero.
template <class T>
inline Vec<T> relu_grad(Vec<T> h, Vec<T> dh) {
  return Vec<T>::of(h.v <= T(0) ? Vec<T>(T(0)).v : dh.v);
}

}  // namespace fastseq::FASTSEQ_ISA
