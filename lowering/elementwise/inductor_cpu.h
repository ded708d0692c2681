// The functions that codegen_cpu.py makes Inductor's C++ kernels call: one definition for a number (scalar code), for
// at::vec::Vectorized and for at::vec::VectorizedN (vector code), so that an element gets the same bits from each.
//
// Included after torch/csrc/inductor/cpp_prefix.h.  NaN results are the canonical one.
#pragma once

// Kernels compiled for no vector instruction set have no at::vec.
#define BICOMPILE_PACKED INDUCTOR_USE_VECTOR_TYPES()

// at::vec's own choice of instruction set must be simd.h's too: the compiler may be able to do more.
#if defined(CPU_CAPABILITY_AVX2) && !defined(CPU_CAPABILITY_AVX512)
#define BICOMPILE_NO_AVX512
#endif
#include "math.h"

namespace bicompile::inductor {

template <class T>
inline constexpr bool is_half = std::is_same_v<T, c10::BFloat16> || std::is_same_v<T, c10::Half>;

// ---------------------------------------------------------------------------------------------------------------
// From at::vec's registers to simd.h's vectors and back.

#if BICOMPILE_PACKED
template <class T>
using Packed = at::vec::Vectorized<T>;
template <class T, int N>
using PackedN = at::vec::VectorizedN<T, N>;

#if (defined(CPU_CAPABILITY_AVX512) && defined(BICOMPILE_AVX512)) || \
    (defined(CPU_CAPABILITY_AVX2) && defined(BICOMPILE_AVX2))
BICOMPILE_INLINE VecF unpack(const Packed<float>& x) { return {x}; }
BICOMPILE_INLINE VecD unpack(const Packed<double>& x) { return {x}; }
BICOMPILE_INLINE Packed<float> pack(VecF x) { return x.v; }
BICOMPILE_INLINE Packed<double> pack(VecD x) { return x.v; }
#else
template <class T>
BICOMPILE_INLINE auto unpack(const Packed<T>& x) {
  ScalarVec<T, Packed<T>::size()> r;
  x.store(r.v);
  return r;
}
template <class T, int N>
BICOMPILE_INLINE Packed<T> pack(ScalarVec<T, N> x) {
  return Packed<T>::loadu(x.v);
}
#endif
#endif

template <class Vec>
BICOMPILE_INLINE Vec canonical_lanes(Vec x) {
  return where_nan(x, splat_as<Vec>(std::numeric_limits<Lane<Vec>>::quiet_NaN()), x);
}

// f on every lane; f takes and returns simd.h vectors of any width.  Numbers are computed in the wider type of the
// arguments, integers in double as libm's own overloads do.
template <class F, class T, class... More>
BICOMPILE_INLINE auto apply(const F& f, T x, More... more) {
  if constexpr (is_half<T>) {
    return T(apply(f, float(x), float(more)...));
  } else {
    using Common = std::common_type_t<T, More...>;
    using Real = std::conditional_t<std::is_same_v<Common, float>, float, double>;
    return canonical_lanes(f(ScalarVec<Real, 1>{{Real(x)}}, ScalarVec<Real, 1>{{Real(more)}}...)).v[0];
  }
}
#if BICOMPILE_PACKED
template <class F, class T, class... More>
BICOMPILE_INLINE Packed<T> apply(const F& f, Packed<T> x, More... more) {
  return pack(canonical_lanes(f(unpack(x), unpack(more)...)));
}
template <class F, class T, int N, class... More>
BICOMPILE_INLINE PackedN<T, N> apply(const F& f, PackedN<T, N> x, More... more) {
  PackedN<T, N> r;
  for (int i = 0; i < N; i++) r[i] = apply(f, x[i], more[i]...);
  return r;
}
#endif

// A function of numbers, lane by lane: the scalar code that Inductor would have written, in vector code too.
template <class F, class... X>
BICOMPILE_INLINE auto each(const F& f, X... x) {
  return apply([&](auto... v) { return math::per_lane(f, v...); }, x...);
}

#define BICOMPILE_FUNCTION(name)                                      \
  template <class... X>                                               \
  BICOMPILE_INLINE auto name(X... x) {                                \
    return apply([](auto... v) { return math::name(v...); }, x...);   \
  }
BICOMPILE_FUNCTION(add)
BICOMPILE_FUNCTION(mul)
BICOMPILE_FUNCTION(fused)
BICOMPILE_FUNCTION(exp)
BICOMPILE_FUNCTION(exp2)
BICOMPILE_FUNCTION(expm1)
BICOMPILE_FUNCTION(log)
BICOMPILE_FUNCTION(log2)
BICOMPILE_FUNCTION(log10)
BICOMPILE_FUNCTION(log1p)
BICOMPILE_FUNCTION(sigmoid)
BICOMPILE_FUNCTION(tanh)
BICOMPILE_FUNCTION(erf)
BICOMPILE_FUNCTION(sin)
BICOMPILE_FUNCTION(cos)
BICOMPILE_FUNCTION(rsqrt)
BICOMPILE_FUNCTION(sqrt)
BICOMPILE_FUNCTION(maximum)
BICOMPILE_FUNCTION(minimum)
BICOMPILE_FUNCTION(relu)
BICOMPILE_FUNCTION(fmod)
BICOMPILE_FUNCTION(remainder)
BICOMPILE_FUNCTION(pow)
#undef BICOMPILE_FUNCTION

// ---------------------------------------------------------------------------------------------------------------
// Casts from float or double to a half precision, `to` being the library's own result: at::vec writes another NaN than
// c10 does, and neither the canonical one.

template <class Half>
inline constexpr uint16_t kNaN = std::is_same_v<Half, c10::Half> ? 0x7e00 : 0x7fc0;

template <class Half, class Real>
BICOMPILE_INLINE Half narrowed(Real from, Half to) {
  return from != from ? Half(kNaN<Half>, Half::from_bits()) : to;
}

#if BICOMPILE_PACKED
template <class Half, class Real, class From, class To>
__attribute__((noinline, cold)) To with_our_nan(From from, To to) {
  Real in[From::size()];
  Half out[To::size()];
  from.store(in);
  to.store(out);
  for (int i = 0; i < std::min(int(From::size()), int(To::size())); i++) out[i] = narrowed(in[i], out[i]);
  return To::loadu(out);
}
template <class Half, class Real>
BICOMPILE_INLINE Packed<Half> narrowed(Packed<Real> from, Packed<Half> to) {
  return any_nan(unpack(from)) ? with_our_nan<Half, Real>(from, to) : to;
}
template <class Half, class Real, int N>
BICOMPILE_INLINE Packed<Half> narrowed(PackedN<Real, N> from, Packed<Half> to) {
  bool any = false;
  for (int i = 0; i < N; i++) any |= any_nan(unpack(from[i]));
  return any ? with_our_nan<Half, Real>(from, to) : to;
}
template <class Half, class Real, int N, int M>
BICOMPILE_INLINE PackedN<Half, M> narrowed(PackedN<Real, N> from, PackedN<Half, M> to) {
  bool any = false;
  for (int i = 0; i < N; i++) any |= any_nan(unpack(from[i]));
  return any ? with_our_nan<Half, Real>(from, to) : to;
}
// The frequent cast, in full.
#if defined(CPU_CAPABILITY_AVX512) && defined(BICOMPILE_AVX512)
BICOMPILE_INLINE __m256i to_bfloat16(VecF a) {
  __m512i u = _mm512_castps_si512(a.v), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(r, nan, _mm512_set1_epi32(0x7fc0)));
}
BICOMPILE_INLINE Packed<c10::BFloat16> narrowed(Packed<float> from, Packed<c10::BFloat16>) {
  return _mm512_castsi256_si512(to_bfloat16(unpack(from)));
}
BICOMPILE_INLINE Packed<c10::BFloat16> narrowed(PackedN<float, 2> from, Packed<c10::BFloat16>) {
  __m512i low = _mm512_castsi256_si512(to_bfloat16(unpack(from[0])));
  return _mm512_inserti64x4(low, to_bfloat16(unpack(from[1])), 1);
}
#endif
#endif

// ---------------------------------------------------------------------------------------------------------------
// Casts to 8 bits: at::vec saturates, scalar code takes the low bits.  The low bits it is.

template <class Byte, class From>
BICOMPILE_INLINE Byte low_bits(From from, Byte) {
  if constexpr (std::is_integral_v<From>) return Byte(from);
  return Byte(int32_t(from));
}
#if BICOMPILE_PACKED
template <class Element, class Byte, class From, class To>
BICOMPILE_INLINE To low_bits_of_each(From from, To to) {
  Element in[From::size()];
  Byte out[To::size()];
  from.store(in);
  to.store(out);
  for (int i = 0; i < std::min(int(From::size()), int(To::size())); i++) out[i] = low_bits(in[i], out[i]);
  return To::loadu(out);
}
template <class T, class Byte>
BICOMPILE_INLINE Packed<Byte> low_bits(Packed<T> from, Packed<Byte> to) {
  return low_bits_of_each<T, Byte>(from, to);
}
template <class T, int N, class Byte>
BICOMPILE_INLINE Packed<Byte> low_bits(PackedN<T, N> from, Packed<Byte> to) {
  return low_bits_of_each<T, Byte>(from, to);
}
template <class T, int N, class Byte, int M>
BICOMPILE_INLINE PackedN<Byte, M> low_bits(PackedN<T, N> from, PackedN<Byte, M> to) {
  return low_bits_of_each<T, Byte>(from, to);
}
#endif

}  // namespace bicompile::inductor
