// Vectors of floats and doubles whose every operation is one correctly rounded IEEE 754 operation per lane.
//
// A kernel written on these types gives the same bits on AVX-512, AVX2 and plain scalar code, whatever the vector
// length, as long as it never adds across lanes of a vector except through an order that it writes out itself.
// No libm, no fast-math, no contraction: fused multiply-adds are explicit.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

// BICOMPILE_NO_AVX512 keeps to AVX2 where the compiler could do more.
#if !defined(BICOMPILE_SCALAR) && !defined(BICOMPILE_NO_AVX512) && defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define BICOMPILE_AVX512 1
#include <immintrin.h>
#elif !defined(BICOMPILE_SCALAR) && defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define BICOMPILE_AVX2 1
#include <immintrin.h>
#elif defined(__SSE2__)
#include <immintrin.h>
#endif

// Without optimisation, inlining by force would only make the compiler write every function again at every call.
#ifdef __OPTIMIZE__
#define BICOMPILE_INLINE inline __attribute__((always_inline))
#define BICOMPILE_LAMBDA __attribute__((always_inline))
#else
#define BICOMPILE_INLINE inline
#define BICOMPILE_LAMBDA
#endif

namespace bicompile {

// Storage types of the half precisions; arithmetic happens in float.
struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

template <class To, class From>
BICOMPILE_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

BICOMPILE_INLINE float canonical(float x) { return x != x ? bit_cast<float>(0x7fc00000u) : x; }
BICOMPILE_INLINE double canonical(double x) {
  return x != x ? bit_cast<double>(uint64_t(0x7ff8000000000000)) : x;
}

BICOMPILE_INLINE float widen(float x) { return x; }
BICOMPILE_INLINE double widen(double x) { return x; }
BICOMPILE_INLINE float widen(bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
inline float widen(fp16 x) {
  uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return bit_cast<float>(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  if (magnitude >= 0x0400) return bit_cast<float>(sign | ((magnitude << 13) + 0x38000000));
  float subnormal = float(magnitude) * 0x1p-24f;  // exact
  return bit_cast<float>(bit_cast<uint32_t>(subnormal) | sign);
}

// Round to nearest even, once; every NaN becomes the canonical one of its type.
template <class T>
T narrow(float x);
template <class T>
T narrow(double x);
template <>
BICOMPILE_INLINE float narrow<float>(float x) { return canonical(x); }
template <>
BICOMPILE_INLINE double narrow<double>(double x) { return canonical(x); }
template <>
BICOMPILE_INLINE bf16 narrow<bf16>(float x) {
  uint32_t u = bit_cast<uint32_t>(x);
  if (x != x) return {0x7fc0};
  return {uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}
template <>
inline fp16 narrow<fp16>(float x) {
  uint32_t u = bit_cast<uint32_t>(x), sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
  if (magnitude > 0x7f800000) return {0x7e00};
  if (magnitude >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // rounds to infinity from 65520 on
  if (magnitude < 0x38800000) {  // subnormal: adding 0.5 aligns the significand, and the hardware rounds
    uint32_t r = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
    return {uint16_t(sign | r)};
  }
  uint32_t r = magnitude + 0xfff + ((magnitude >> 13) & 1);
  return {uint16_t(sign | ((r - 0x38000000) >> 13))};
}

// ---------------------------------------------------------------------------------------------------------------
// ScalarVec<T, N>: N lanes by plain code, on every instruction set.  ScalarVec<float, 1> lets a function template on a
// vector type be called for one number and give that number the bits that it has in a vector.  Plain loops that the
// compiler may vectorise, since no lane ever meets another.
template <class T, int N>
struct ScalarVec {
  static constexpr int kLanes = N;
  T v[N];
  template <class F>
  static BICOMPILE_INLINE ScalarVec each(F f) {
    ScalarVec r;
    for (int i = 0; i < N; i++) r.v[i] = f(i);
    return r;
  }
};
template <class T>
using BitsOf = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
template <class T, int N>
BICOMPILE_INLINE void store(T* p, ScalarVec<T, N> a) { std::memcpy(p, a.v, sizeof(a.v)); }
#define BICOMPILE_EACH(name, expression)                                    \
  template <class T, int N>                                                 \
  BICOMPILE_INLINE ScalarVec<T, N> name {                                   \
    return ScalarVec<T, N>::each([&](int i) { return expression; });        \
  }
BICOMPILE_EACH(operator+(ScalarVec<T, N> a, ScalarVec<T, N> b), a.v[i] + b.v[i])
BICOMPILE_EACH(operator-(ScalarVec<T, N> a, ScalarVec<T, N> b), a.v[i] - b.v[i])
BICOMPILE_EACH(operator*(ScalarVec<T, N> a, ScalarVec<T, N> b), a.v[i] * b.v[i])
BICOMPILE_EACH(operator/(ScalarVec<T, N> a, ScalarVec<T, N> b), a.v[i] / b.v[i])
BICOMPILE_EACH(fma(ScalarVec<T, N> a, ScalarVec<T, N> b, ScalarVec<T, N> c), std::fma(a.v[i], b.v[i], c.v[i]))
BICOMPILE_EACH(sqrt(ScalarVec<T, N> a), std::sqrt(a.v[i]))
BICOMPILE_EACH(round_even(ScalarVec<T, N> a), std::nearbyint(a.v[i]))
BICOMPILE_EACH(abs(ScalarVec<T, N> a), std::fabs(a.v[i]))
BICOMPILE_EACH(bit_and(ScalarVec<T, N> a, ScalarVec<T, N> b),
               bit_cast<T>(bit_cast<BitsOf<T>>(a.v[i]) & bit_cast<BitsOf<T>>(b.v[i])))
BICOMPILE_EACH(bit_or(ScalarVec<T, N> a, ScalarVec<T, N> b),
               bit_cast<T>(bit_cast<BitsOf<T>>(a.v[i]) | bit_cast<BitsOf<T>>(b.v[i])))
BICOMPILE_EACH(where_less(ScalarVec<T, N> a, ScalarVec<T, N> b, ScalarVec<T, N> x, ScalarVec<T, N> y),
               a.v[i] < b.v[i] ? x.v[i] : y.v[i])
BICOMPILE_EACH(where_equal(ScalarVec<T, N> a, ScalarVec<T, N> b, ScalarVec<T, N> x, ScalarVec<T, N> y),
               a.v[i] == b.v[i] ? x.v[i] : y.v[i])
BICOMPILE_EACH(where_nan(ScalarVec<T, N> a, ScalarVec<T, N> x, ScalarVec<T, N> y),
               a.v[i] != a.v[i] ? x.v[i] : y.v[i])
BICOMPILE_EACH(lesser(ScalarVec<T, N> a, ScalarVec<T, N> b), a.v[i] < b.v[i] ? a.v[i] : b.v[i])
BICOMPILE_EACH(greater(ScalarVec<T, N> a, ScalarVec<T, N> b), a.v[i] > b.v[i] ? a.v[i] : b.v[i])
BICOMPILE_EACH(bit_xor(ScalarVec<T, N> a, ScalarVec<T, N> b),
               bit_cast<T>(bit_cast<BitsOf<T>>(a.v[i]) ^ bit_cast<BitsOf<T>>(b.v[i])))
// The difference of the two bit patterns as integers.
BICOMPILE_EACH(bits_minus(ScalarVec<T, N> a, ScalarVec<T, N> b),
               bit_cast<T>(BitsOf<T>(bit_cast<BitsOf<T>>(a.v[i]) - bit_cast<BitsOf<T>>(b.v[i]))))
#undef BICOMPILE_EACH
template <int kBits, class T, int N>
BICOMPILE_INLINE ScalarVec<T, N> shift_left(ScalarVec<T, N> a) {
  return ScalarVec<T, N>::each([&](int i) { return bit_cast<T>(BitsOf<T>(bit_cast<BitsOf<T>>(a.v[i]) << kBits)); });
}
template <class T, int N>
BICOMPILE_INLINE ScalarVec<T, N> where_negative(ScalarVec<T, N> a, ScalarVec<T, N> x, ScalarVec<T, N> y) {
  return ScalarVec<T, N>::each([&](int i) { return std::signbit(a.v[i]) ? x.v[i] : y.v[i]; });
}
template <class T, int N>
BICOMPILE_INLINE bool any_less(ScalarVec<T, N> a, ScalarVec<T, N> b) {
  bool any = false;
  for (int i = 0; i < N; i++) any |= a.v[i] < b.v[i];
  return any;
}
template <class T, int N>
BICOMPILE_INLINE bool any_nan(ScalarVec<T, N> a) {
  bool any = false;
  for (int i = 0; i < N; i++) any |= a.v[i] != a.v[i];
  return any;
}
// Lane i gets lane i + H, for i < H; what the other lanes get is not said.
template <int H, class T, int N>
BICOMPILE_INLINE ScalarVec<T, N> shift_down(ScalarVec<T, N> a) {
  return ScalarVec<T, N>::each([&](int i) { return a.v[i + H < N ? i + H : i]; });
}
template <class T, int N>
BICOMPILE_INLINE T first_lane(ScalarVec<T, N> a) { return a.v[0]; }
template <int N>
BICOMPILE_INLINE ScalarVec<float, N> add_exponent(ScalarVec<float, N> x, ScalarVec<float, N> n) {
  return ScalarVec<float, N>::each([&](int i) {
    return bit_cast<float>(bit_cast<uint32_t>(x.v[i]) + (uint32_t(int32_t(n.v[i])) << 23));
  });
}
template <int N>
BICOMPILE_INLINE ScalarVec<double, N> add_exponent(ScalarVec<double, N> x, ScalarVec<double, N> n) {
  return ScalarVec<double, N>::each([&](int i) {
    return bit_cast<double>(bit_cast<uint64_t>(x.v[i]) + (uint64_t(int64_t(n.v[i])) << 52));
  });
}
// The exponent field of the bit pattern, arithmetically shifted down to a whole number: floor(log2(x)) + bias for x > 0.
template <int N>
BICOMPILE_INLINE ScalarVec<float, N> exponent_field(ScalarVec<float, N> x) {
  return ScalarVec<float, N>::each([&](int i) { return float(bit_cast<int32_t>(x.v[i]) >> 23); });
}
template <int N>
BICOMPILE_INLINE ScalarVec<double, N> exponent_field(ScalarVec<double, N> x) {
  return ScalarVec<double, N>::each([&](int i) { return double(bit_cast<int64_t>(x.v[i]) >> 52); });
}

// ---------------------------------------------------------------------------------------------------------------
// VecF: kLanes floats.  Masks are whole vectors of all-ones or all-zeros only in select(); see where().

#if defined(BICOMPILE_AVX512)
#define BICOMPILE_ISA "avx512"
struct VecF {
  static constexpr int kLanes = 16;
  __m512 v;
};
BICOMPILE_INLINE VecF splat(float x) { return {_mm512_set1_ps(x)}; }
BICOMPILE_INLINE float first_lane(VecF a) { return _mm512_cvtss_f32(a.v); }
template <int H>
BICOMPILE_INLINE VecF shift_down(VecF a) {
  if constexpr (H >= 4) return {_mm512_shuffle_f32x4(a.v, a.v, H == 8 ? 0x0e : 0x01)};
  return {_mm512_shuffle_ps(a.v, a.v, H == 2 ? 0x0e : 0x01)};
}
BICOMPILE_INLINE VecF load(const float* p) { return {_mm512_loadu_ps(p)}; }
BICOMPILE_INLINE VecF load(const bf16* p) {
  __m512i i = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(i, 16))};
}
BICOMPILE_INLINE VecF load(const fp16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
BICOMPILE_INLINE void store(float* p, VecF a) { _mm512_storeu_ps(p, a.v); }
BICOMPILE_INLINE VecF operator+(VecF a, VecF b) { return {_mm512_add_ps(a.v, b.v)}; }
BICOMPILE_INLINE VecF operator-(VecF a, VecF b) { return {_mm512_sub_ps(a.v, b.v)}; }
BICOMPILE_INLINE VecF operator*(VecF a, VecF b) { return {_mm512_mul_ps(a.v, b.v)}; }
BICOMPILE_INLINE VecF operator/(VecF a, VecF b) { return {_mm512_div_ps(a.v, b.v)}; }
BICOMPILE_INLINE VecF fma(VecF a, VecF b, VecF c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
BICOMPILE_INLINE VecF sqrt(VecF a) { return {_mm512_sqrt_ps(a.v)}; }
BICOMPILE_INLINE VecF round_even(VecF a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
BICOMPILE_INLINE VecF bit_and(VecF a, VecF b) { return {_mm512_and_ps(a.v, b.v)}; }
BICOMPILE_INLINE VecF bit_or(VecF a, VecF b) { return {_mm512_or_ps(a.v, b.v)}; }
BICOMPILE_INLINE VecF bit_xor(VecF a, VecF b) { return {_mm512_xor_ps(a.v, b.v)}; }
BICOMPILE_INLINE VecF bits_minus(VecF a, VecF b) {
  return {_mm512_castsi512_ps(_mm512_sub_epi32(_mm512_castps_si512(a.v), _mm512_castps_si512(b.v)))};
}
BICOMPILE_INLINE VecF exponent_field(VecF x) {
  return {_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_castps_si512(x.v), 23))};
}
// a < b ? a : b and a > b ? a : b: the second where either is NaN.
BICOMPILE_INLINE VecF lesser(VecF a, VecF b) { return {_mm512_min_ps(a.v, b.v)}; }
BICOMPILE_INLINE VecF greater(VecF a, VecF b) { return {_mm512_max_ps(a.v, b.v)}; }
// The bit pattern shifted; x where a's sign bit is set, else y; whether a < b in any lane.
template <int kBits>
BICOMPILE_INLINE VecF shift_left(VecF a) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a.v), kBits))};
}
BICOMPILE_INLINE VecF where_negative(VecF a, VecF x, VecF y) {
  return {_mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(a.v)), y.v, x.v)};
}
BICOMPILE_INLINE bool any_less(VecF a, VecF b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ) != 0; }
BICOMPILE_INLINE bool any_nan(VecF a) { return _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q) != 0; }
BICOMPILE_INLINE VecF abs(VecF a) { return {_mm512_abs_ps(a.v)}; }
// a < b ? x : y, lane by lane; false where either is NaN.
BICOMPILE_INLINE VecF where_less(VecF a, VecF b, VecF x, VecF y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}
BICOMPILE_INLINE VecF where_equal(VecF a, VecF b, VecF x, VecF y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ), y.v, x.v)};
}
BICOMPILE_INLINE VecF where_nan(VecF a, VecF x, VecF y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), y.v, x.v)};
}
// x * 2**n for whole n whose result is a normal number, by adding to the exponent field.
BICOMPILE_INLINE VecF add_exponent(VecF x, VecF n) {
  __m512i i = _mm512_slli_epi32(_mm512_cvtps_epi32(n.v), 23);
  return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(x.v), i))};
}
BICOMPILE_INLINE VecF load_first(const float* p, int n, float rest) {
  return {_mm512_mask_loadu_ps(_mm512_set1_ps(rest), __mmask16((1u << n) - 1), p)};
}
BICOMPILE_INLINE void store_first(float* p, VecF a, int n) {
  _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), a.v);
}

struct VecD {
  static constexpr int kLanes = 8;
  __m512d v;
};
BICOMPILE_INLINE VecD splat(double x) { return {_mm512_set1_pd(x)}; }
BICOMPILE_INLINE double first_lane(VecD a) { return _mm512_cvtsd_f64(a.v); }
template <int H>
BICOMPILE_INLINE VecD shift_down(VecD a) {
  if constexpr (H >= 2) return {_mm512_shuffle_f64x2(a.v, a.v, H == 4 ? 0x0e : 0x01)};
  return {_mm512_permute_pd(a.v, 0x01)};
}
BICOMPILE_INLINE VecD load(const double* p) { return {_mm512_loadu_pd(p)}; }
// The lower (0) or upper (1) half of the lanes, exactly.
template <int kHalf>
BICOMPILE_INLINE VecD half_in_double(VecF a) {
  return {_mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a.v), kHalf)))};
}
BICOMPILE_INLINE void store(double* p, VecD a) { _mm512_storeu_pd(p, a.v); }
BICOMPILE_INLINE VecD operator+(VecD a, VecD b) { return {_mm512_add_pd(a.v, b.v)}; }
BICOMPILE_INLINE VecD operator-(VecD a, VecD b) { return {_mm512_sub_pd(a.v, b.v)}; }
BICOMPILE_INLINE VecD operator*(VecD a, VecD b) { return {_mm512_mul_pd(a.v, b.v)}; }
BICOMPILE_INLINE VecD operator/(VecD a, VecD b) { return {_mm512_div_pd(a.v, b.v)}; }
BICOMPILE_INLINE VecD fma(VecD a, VecD b, VecD c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
BICOMPILE_INLINE VecD sqrt(VecD a) { return {_mm512_sqrt_pd(a.v)}; }
BICOMPILE_INLINE VecD round_even(VecD a) {
  return {_mm512_roundscale_pd(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
BICOMPILE_INLINE VecD bit_and(VecD a, VecD b) { return {_mm512_and_pd(a.v, b.v)}; }
BICOMPILE_INLINE VecD bit_or(VecD a, VecD b) { return {_mm512_or_pd(a.v, b.v)}; }
BICOMPILE_INLINE VecD bit_xor(VecD a, VecD b) { return {_mm512_xor_pd(a.v, b.v)}; }
BICOMPILE_INLINE VecD bits_minus(VecD a, VecD b) {
  return {_mm512_castsi512_pd(_mm512_sub_epi64(_mm512_castpd_si512(a.v), _mm512_castpd_si512(b.v)))};
}
BICOMPILE_INLINE VecD exponent_field(VecD x) {
  return {_mm512_cvtepi64_pd(_mm512_srai_epi64(_mm512_castpd_si512(x.v), 52))};
}
BICOMPILE_INLINE VecD lesser(VecD a, VecD b) { return {_mm512_min_pd(a.v, b.v)}; }
BICOMPILE_INLINE VecD greater(VecD a, VecD b) { return {_mm512_max_pd(a.v, b.v)}; }
BICOMPILE_INLINE VecD where_negative(VecD a, VecD x, VecD y) {
  return {_mm512_mask_blend_pd(_mm512_movepi64_mask(_mm512_castpd_si512(a.v)), y.v, x.v)};
}
BICOMPILE_INLINE bool any_nan(VecD a) { return _mm512_cmp_pd_mask(a.v, a.v, _CMP_UNORD_Q) != 0; }
BICOMPILE_INLINE VecD abs(VecD a) { return {_mm512_abs_pd(a.v)}; }
BICOMPILE_INLINE VecD where_less(VecD a, VecD b, VecD x, VecD y) {
  return {_mm512_mask_blend_pd(_mm512_cmp_pd_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}
BICOMPILE_INLINE VecD where_equal(VecD a, VecD b, VecD x, VecD y) {
  return {_mm512_mask_blend_pd(_mm512_cmp_pd_mask(a.v, b.v, _CMP_EQ_OQ), y.v, x.v)};
}
BICOMPILE_INLINE VecD where_nan(VecD a, VecD x, VecD y) {
  return {_mm512_mask_blend_pd(_mm512_cmp_pd_mask(a.v, a.v, _CMP_UNORD_Q), y.v, x.v)};
}
BICOMPILE_INLINE VecD add_exponent(VecD x, VecD n) {
  __m512i i = _mm512_slli_epi64(_mm512_cvtpd_epi64(n.v), 52);
  return {_mm512_castsi512_pd(_mm512_add_epi64(_mm512_castpd_si512(x.v), i))};
}
BICOMPILE_INLINE VecD load_first(const double* p, int n, double rest) {
  return {_mm512_mask_loadu_pd(_mm512_set1_pd(rest), __mmask8((1u << n) - 1), p)};
}
BICOMPILE_INLINE void store_first(double* p, VecD a, int n) {
  _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), a.v);
}

#elif defined(BICOMPILE_AVX2)
#define BICOMPILE_ISA "avx2"
struct VecF {
  static constexpr int kLanes = 8;
  __m256 v;
};
BICOMPILE_INLINE VecF splat(float x) { return {_mm256_set1_ps(x)}; }
BICOMPILE_INLINE float first_lane(VecF a) { return _mm256_cvtss_f32(a.v); }
template <int H>
BICOMPILE_INLINE VecF shift_down(VecF a) {
  if constexpr (H == 4) return {_mm256_permute2f128_ps(a.v, a.v, 0x01)};
  return {_mm256_shuffle_ps(a.v, a.v, H == 2 ? 0x0e : 0x01)};
}
BICOMPILE_INLINE VecF load(const float* p) { return {_mm256_loadu_ps(p)}; }
BICOMPILE_INLINE VecF load(const bf16* p) {
  __m256i i = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(i, 16))};
}
BICOMPILE_INLINE VecF load(const fp16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))}; }
BICOMPILE_INLINE void store(float* p, VecF a) { _mm256_storeu_ps(p, a.v); }
BICOMPILE_INLINE VecF operator+(VecF a, VecF b) { return {_mm256_add_ps(a.v, b.v)}; }
BICOMPILE_INLINE VecF operator-(VecF a, VecF b) { return {_mm256_sub_ps(a.v, b.v)}; }
BICOMPILE_INLINE VecF operator*(VecF a, VecF b) { return {_mm256_mul_ps(a.v, b.v)}; }
BICOMPILE_INLINE VecF operator/(VecF a, VecF b) { return {_mm256_div_ps(a.v, b.v)}; }
BICOMPILE_INLINE VecF fma(VecF a, VecF b, VecF c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
BICOMPILE_INLINE VecF sqrt(VecF a) { return {_mm256_sqrt_ps(a.v)}; }
BICOMPILE_INLINE VecF round_even(VecF a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
BICOMPILE_INLINE VecF bit_and(VecF a, VecF b) { return {_mm256_and_ps(a.v, b.v)}; }
BICOMPILE_INLINE VecF bit_or(VecF a, VecF b) { return {_mm256_or_ps(a.v, b.v)}; }
BICOMPILE_INLINE VecF bit_xor(VecF a, VecF b) { return {_mm256_xor_ps(a.v, b.v)}; }
BICOMPILE_INLINE VecF bits_minus(VecF a, VecF b) {
  return {_mm256_castsi256_ps(_mm256_sub_epi32(_mm256_castps_si256(a.v), _mm256_castps_si256(b.v)))};
}
BICOMPILE_INLINE VecF exponent_field(VecF x) {
  return {_mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_castps_si256(x.v), 23))};
}
BICOMPILE_INLINE VecF lesser(VecF a, VecF b) { return {_mm256_min_ps(a.v, b.v)}; }
BICOMPILE_INLINE VecF greater(VecF a, VecF b) { return {_mm256_max_ps(a.v, b.v)}; }
template <int kBits>
BICOMPILE_INLINE VecF shift_left(VecF a) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a.v), kBits))};
}
BICOMPILE_INLINE VecF where_negative(VecF a, VecF x, VecF y) { return {_mm256_blendv_ps(y.v, x.v, a.v)}; }
BICOMPILE_INLINE bool any_less(VecF a, VecF b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)) != 0;
}
BICOMPILE_INLINE bool any_nan(VecF a) { return _mm256_movemask_ps(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q)) != 0; }
BICOMPILE_INLINE VecF abs(VecF a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
BICOMPILE_INLINE VecF where_less(VecF a, VecF b, VecF x, VecF y) {
  return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}
BICOMPILE_INLINE VecF where_equal(VecF a, VecF b, VecF x, VecF y) {
  return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ))};
}
BICOMPILE_INLINE VecF where_nan(VecF a, VecF x, VecF y) {
  return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q))};
}
BICOMPILE_INLINE VecF add_exponent(VecF x, VecF n) {
  __m256i i = _mm256_slli_epi32(_mm256_cvtps_epi32(n.v), 23);
  return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x.v), i))};
}
BICOMPILE_INLINE __m256i first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
BICOMPILE_INLINE VecF load_first(const float* p, int n, float rest) {
  __m256i mask = first_lanes(n);
  return {_mm256_blendv_ps(_mm256_set1_ps(rest), _mm256_maskload_ps(p, mask), _mm256_castsi256_ps(mask))};
}
BICOMPILE_INLINE void store_first(float* p, VecF a, int n) { _mm256_maskstore_ps(p, first_lanes(n), a.v); }

struct VecD {
  static constexpr int kLanes = 4;
  __m256d v;
};
BICOMPILE_INLINE VecD splat(double x) { return {_mm256_set1_pd(x)}; }
BICOMPILE_INLINE double first_lane(VecD a) { return _mm256_cvtsd_f64(a.v); }
template <int H>
BICOMPILE_INLINE VecD shift_down(VecD a) {
  if constexpr (H == 2) return {_mm256_permute2f128_pd(a.v, a.v, 0x01)};
  return {_mm256_permute_pd(a.v, 0x01)};
}
BICOMPILE_INLINE VecD load(const double* p) { return {_mm256_loadu_pd(p)}; }
template <int kHalf>
BICOMPILE_INLINE VecD half_in_double(VecF a) { return {_mm256_cvtps_pd(_mm256_extractf128_ps(a.v, kHalf))}; }
BICOMPILE_INLINE void store(double* p, VecD a) { _mm256_storeu_pd(p, a.v); }
BICOMPILE_INLINE VecD operator+(VecD a, VecD b) { return {_mm256_add_pd(a.v, b.v)}; }
BICOMPILE_INLINE VecD operator-(VecD a, VecD b) { return {_mm256_sub_pd(a.v, b.v)}; }
BICOMPILE_INLINE VecD operator*(VecD a, VecD b) { return {_mm256_mul_pd(a.v, b.v)}; }
BICOMPILE_INLINE VecD operator/(VecD a, VecD b) { return {_mm256_div_pd(a.v, b.v)}; }
BICOMPILE_INLINE VecD fma(VecD a, VecD b, VecD c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
BICOMPILE_INLINE VecD sqrt(VecD a) { return {_mm256_sqrt_pd(a.v)}; }
BICOMPILE_INLINE VecD round_even(VecD a) {
  return {_mm256_round_pd(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
BICOMPILE_INLINE VecD bit_and(VecD a, VecD b) { return {_mm256_and_pd(a.v, b.v)}; }
BICOMPILE_INLINE VecD bit_or(VecD a, VecD b) { return {_mm256_or_pd(a.v, b.v)}; }
BICOMPILE_INLINE VecD bit_xor(VecD a, VecD b) { return {_mm256_xor_pd(a.v, b.v)}; }
BICOMPILE_INLINE VecD bits_minus(VecD a, VecD b) {
  return {_mm256_castsi256_pd(_mm256_sub_epi64(_mm256_castpd_si256(a.v), _mm256_castpd_si256(b.v)))};
}
BICOMPILE_INLINE VecD exponent_field(VecD x) {
  // Of the high words: shifted, packed into four 32-bit integers, converted.
  __m256i high = _mm256_srai_epi32(_mm256_castpd_si256(x.v), 20);
  __m256i packed = _mm256_permutevar8x32_epi32(high, _mm256_setr_epi32(1, 3, 5, 7, 1, 3, 5, 7));
  return {_mm256_cvtepi32_pd(_mm256_castsi256_si128(packed))};
}
BICOMPILE_INLINE VecD lesser(VecD a, VecD b) { return {_mm256_min_pd(a.v, b.v)}; }
BICOMPILE_INLINE VecD greater(VecD a, VecD b) { return {_mm256_max_pd(a.v, b.v)}; }
BICOMPILE_INLINE VecD where_negative(VecD a, VecD x, VecD y) { return {_mm256_blendv_pd(y.v, x.v, a.v)}; }
BICOMPILE_INLINE bool any_nan(VecD a) { return _mm256_movemask_pd(_mm256_cmp_pd(a.v, a.v, _CMP_UNORD_Q)) != 0; }
BICOMPILE_INLINE VecD abs(VecD a) { return {_mm256_andnot_pd(_mm256_set1_pd(-0.0), a.v)}; }
BICOMPILE_INLINE VecD where_less(VecD a, VecD b, VecD x, VecD y) {
  return {_mm256_blendv_pd(y.v, x.v, _mm256_cmp_pd(a.v, b.v, _CMP_LT_OQ))};
}
BICOMPILE_INLINE VecD where_equal(VecD a, VecD b, VecD x, VecD y) {
  return {_mm256_blendv_pd(y.v, x.v, _mm256_cmp_pd(a.v, b.v, _CMP_EQ_OQ))};
}
BICOMPILE_INLINE VecD where_nan(VecD a, VecD x, VecD y) {
  return {_mm256_blendv_pd(y.v, x.v, _mm256_cmp_pd(a.v, a.v, _CMP_UNORD_Q))};
}
BICOMPILE_INLINE VecD add_exponent(VecD x, VecD n) {
  __m256i i = _mm256_slli_epi64(_mm256_cvtepi32_epi64(_mm256_cvtpd_epi32(n.v)), 52);
  return {_mm256_castsi256_pd(_mm256_add_epi64(_mm256_castpd_si256(x.v), i))};
}
BICOMPILE_INLINE __m256i first_lanes_d(int n) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}
BICOMPILE_INLINE VecD load_first(const double* p, int n, double rest) {
  __m256i mask = first_lanes_d(n);
  return {_mm256_blendv_pd(_mm256_set1_pd(rest), _mm256_maskload_pd(p, mask), _mm256_castsi256_pd(mask))};
}
BICOMPILE_INLINE void store_first(double* p, VecD a, int n) { _mm256_maskstore_pd(p, first_lanes_d(n), a.v); }

#else
#define BICOMPILE_ISA "scalar"
using VecF = ScalarVec<float, 8>;
using VecD = ScalarVec<double, 4>;
template <int kHalf>
BICOMPILE_INLINE VecD half_in_double(VecF a) { return VecD::each([&](int i) { return double(a.v[kHalf * 4 + i]); }); }
BICOMPILE_INLINE VecF splat(float x) { return VecF::each([&](int) { return x; }); }
BICOMPILE_INLINE VecD splat(double x) { return VecD::each([&](int) { return x; }); }
BICOMPILE_INLINE VecD load(const double* p) { return VecD::each([&](int i) { return p[i]; }); }
template <class T>
BICOMPILE_INLINE VecF load(const T* p) { return VecF::each([&](int i) { return widen(p[i]); }); }
template <class T, class = std::enable_if_t<std::is_floating_point_v<T>>>
BICOMPILE_INLINE auto load_first(const T* p, int n, T rest) {
  using Vec = decltype(splat(rest));
  return Vec::each([&](int i) { return i < n ? p[i] : rest; });
}
template <class T, int N>
BICOMPILE_INLINE void store_first(T* p, ScalarVec<T, N> a, int n) {
  for (int i = 0; i < n; i++) p[i] = a.v[i];
}
#endif

// The number in one lane of a vector type, and a vector of that type with one number in every lane.
template <class Vec>
struct LaneOf;
template <class T, int N>
struct LaneOf<ScalarVec<T, N>> {
  using type = T;
};
#if defined(BICOMPILE_AVX512) || defined(BICOMPILE_AVX2)
template <>
struct LaneOf<VecF> {
  using type = float;
};
template <>
struct LaneOf<VecD> {
  using type = double;
};
#endif
template <class Vec>
using Lane = typename LaneOf<Vec>::type;
template <class Vec>
BICOMPILE_INLINE Vec splat_as(Lane<Vec> x) {
  if constexpr (std::is_same_v<Vec, VecF> || std::is_same_v<Vec, VecD>) {
    return splat(x);
  } else {
    return Vec::each([&](int) { return x; });
  }
}

// x * 2**n for whole n, rounded once, subnormal results included.  |x| in [0.5, 2), |n| at most twice the largest
// exponent of a normal number less one; NaN stays NaN.
template <class Vec>
BICOMPILE_INLINE Vec scale(Vec x, Vec n) {
#if defined(BICOMPILE_AVX512)
  if constexpr (std::is_same_v<Vec, VecF>) return {_mm512_scalef_ps(x.v, n.v)};
  if constexpr (std::is_same_v<Vec, VecD>) return {_mm512_scalef_pd(x.v, n.v)};
#endif
  // Two steps: the first is exact, the second rounds.
  Vec half = round_even(n * splat_as<Vec>(Lane<Vec>(0.5)));
  return add_exponent(x, half) * add_exponent(splat_as<Vec>(1), n - half);
}

// The larger and the smaller of two: NaN if either is NaN, +0 above -0, the same whichever comes first.
template <class Vec>
BICOMPILE_INLINE Vec max_of(Vec a, Vec b) {
  Vec r = where_equal(a, b, bit_and(a, b), greater(b, a));  // a, should one be NaN
  return where_nan(b, b, r);
}
template <class Vec>
BICOMPILE_INLINE Vec min_of(Vec a, Vec b) {
  Vec r = where_equal(a, b, bit_or(a, b), lesser(b, a));
  return where_nan(b, b, r);
}

// ---------------------------------------------------------------------------------------------------------------
// What holds for every instruction set.

BICOMPILE_INLINE VecF canonical(VecF a) { return where_nan(a, splat(bit_cast<float>(0x7fc00000u)), a); }
BICOMPILE_INLINE VecD canonical(VecD a) {
  return where_nan(a, splat(bit_cast<double>(uint64_t(0x7ff8000000000000))), a);
}
// store_as: round once to the element type of p (nearest even), canonical NaN, all lanes or the first n.
BICOMPILE_INLINE void store_as(float* p, VecF a) { store(p, canonical(a)); }
BICOMPILE_INLINE void store_as(double* p, VecD a) { store(p, canonical(a)); }
BICOMPILE_INLINE void store_as(float* p, VecF a, int n) { store_first(p, canonical(a), n); }
BICOMPILE_INLINE void store_as(double* p, VecD a, int n) { store_first(p, canonical(a), n); }
template <class T, class = std::enable_if_t<sizeof(T) == 2>>
BICOMPILE_INLINE void store_as(T* p, VecF a, int n) {
  float lanes[VecF::kLanes];
  store(lanes, a);
  for (int i = 0; i < n; i++) p[i] = narrow<T>(lanes[i]);
}
#if defined(BICOMPILE_AVX512)
BICOMPILE_INLINE void store_as(fp16* p, VecF a) {
  __m256i h = _mm512_cvtps_ph(canonical(a).v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256((__m256i*)p, h);
}
BICOMPILE_INLINE void store_as(bf16* p, VecF a) {
  __m512i u = _mm512_castps_si512(a.v);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  r = _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(r));
}
#elif defined(BICOMPILE_AVX2)
BICOMPILE_INLINE void store_as(fp16* p, VecF a) {
  __m128i h = _mm256_cvtps_ph(canonical(a).v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm_storeu_si128((__m128i*)p, h);
}
BICOMPILE_INLINE void store_as(bf16* p, VecF a) {
  __m256i u = _mm256_castps_si256(a.v);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  __m256i r = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  r = _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc0), _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q)));
  __m128i h = _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
  _mm_storeu_si128((__m128i*)p, h);
}
#else
template <class T, class = std::enable_if_t<sizeof(T) == 2>>
BICOMPILE_INLINE void store_as(T* p, VecF a) { store_as(p, a, VecF::kLanes); }
#endif
// The first n elements of any storage type, `rest` in the other lanes.
template <class T, class = std::enable_if_t<sizeof(T) == 2>>
BICOMPILE_INLINE VecF load_first(const T* p, int n, float rest) {
  float lanes[VecF::kLanes];
  for (int i = 0; i < VecF::kLanes; i++) lanes[i] = i < n ? widen(p[i]) : rest;
  return load(lanes);
}

}  // namespace bicompile
