// Elementary functions from IEEE operations alone, so that a number gets the same bits in every lane, on every
// instruction set, in a vector or alone (ScalarVec<float, 1>).
//
// Every function is a template on a vector type of simd.h and returns NaN for NaN (which NaN is not said; store_as and
// canonical() make it the one).  Gradual underflow is correct.  Errors are in units of the last place of the result,
// the largest seen over all binades by tests/test_elementwise.py.
#pragma once

#include "../native/simd.h"

namespace bicompile::math {

// c0 + x * (c1 + x * (...)), coefficients from the highest power down, one fused multiply-add each.
template <class Vec, class... Rest>
BICOMPILE_INLINE Vec polynomial(Vec x, Lane<Vec> highest, Rest... rest) {
  Vec r = splat_as<Vec>(highest);
  ((r = fma(r, x, splat_as<Vec>(Lane<Vec>(rest)))), ...);
  return r;
}

template <class Vec>
constexpr bool is_float = std::is_same_v<Lane<Vec>, float>;

// One call of a libm function for each lane, of one or two arguments.  The barrier keeps the compiler from evaluating
// it itself, which may round differently from the library.
template <class Vec, class F, class... More>
BICOMPILE_INLINE Vec per_lane(const F& f, Vec x, More... more) {
  constexpr int n = Vec::kLanes;
  Lane<Vec> in[1 + sizeof...(More)][n], out[n];
  int k = 1;
  std::memcpy(in[0], &x, sizeof(x));
  ((void)std::memcpy(in[k++], &more, sizeof(more)), ...);
  asm volatile("" : "+m"(in));
  for (int i = 0; i < n; i++) {
    if constexpr (sizeof...(More) == 0) {
      out[i] = f(in[0][i]);
    } else {
      out[i] = f(in[0][i], in[1][i]);
    }
  }
  Vec r;
  std::memcpy(&r, out, sizeof(r));
  return r;
}

template <class Vec>
BICOMPILE_INLINE Vec copy_sign(Vec magnitude, Vec sign) {
  const Vec minus = splat_as<Vec>(Lane<Vec>(-0.0));
  return bit_or(abs(magnitude), bit_and(sign, minus));
}

// x = n * ln(2) + r with |r| <= ln(2) / 2.
template <class Vec>
BICOMPILE_INLINE void reduce_by_ln2(Vec x, Vec& n, Vec& r) {
  auto c = [](double v) { return splat_as<Vec>(Lane<Vec>(v)); };
  if constexpr (is_float<Vec>) {
    n = round_even(x * c(0x1.715476p+0));
    r = fma(n, c(0x1.05c61p-29), fma(n, c(-0x1.62e43p-1), x));
  } else {
    n = round_even(x * c(0x1.71547652b82fep+0));
    r = fma(n, c(-0x1.abc9e3b39803fp-56), fma(n, c(-0x1.62e42fefa39efp-1), x));
  }
}

// (e**r - 1 - r) / r**2 for |r| <= ln(2) / 2.
template <class Vec>
BICOMPILE_INLINE Vec exp_curve(Vec r) {
  if constexpr (is_float<Vec>) {
    return polynomial(r, 0x1.6db47ap-10f, 0x1.123b92p-7f, 0x1.55545ep-5f, 0x1.55548ep-3f, 0.5f);
  } else {
    return polynomial(r, 0x1.200b5cd9dae1dp-29, 0x1.af6f6eea44adap-26, 0x1.27e475839e5e3p-22, 0x1.71ddedf7e602ep-19,
                      0x1.a01a01d898c5fp-16, 0x1.a01a01b46b1b8p-13, 0x1.6c16c16c0b76dp-10, 0x1.111111110e9cdp-7,
                      0x1.5555555555574p-5, 0x1.555555555555cp-3, 0.5);
  }
}

// e**x for x that neither overflows nor is below -104 (float) or -746 (double).
template <class Vec>
BICOMPILE_INLINE Vec exp_in_range(Vec x) {
  Vec n, r;
  reduce_by_ln2(x, n, r);
  const Vec one = splat_as<Vec>(1);
  return scale(fma(fma(exp_curve(r), r, one), r, one), n);
}

// e**x.
template <class Vec>
BICOMPILE_INLINE Vec exp(Vec x) {
  constexpr double high = is_float<Vec> ? 89 : 710, low = is_float<Vec> ? -104 : -746;
  // Infinity and zero from there on; NaN passes, being the second operand.
  return exp_in_range(lesser(splat_as<Vec>(high), greater(splat_as<Vec>(low), x)));
}

// 2**x.
template <class Vec>
BICOMPILE_INLINE Vec exp2(Vec x) {
  auto c = [](double v) { return splat_as<Vec>(Lane<Vec>(v)); };
  if constexpr (is_float<Vec>) {
    x = lesser(c(129), greater(c(-151), x));
    Vec n = round_even(x), r = x - n;
    Vec slope = polynomial(r, 0x1.448d98p-13f, 0x1.5f47c8p-10f, 0x1.3b29aep-7f, 0x1.c6aed0p-5f, 0x1.ebfbe0p-3f,
                           0x1.62e430p-1f);
    return scale(fma(slope, r, c(1)), n);
  } else {
    return per_lane([](double v) { return std::exp2(v); }, x);
  }
}

// e**x - 1.
template <class Vec>
BICOMPILE_INLINE Vec expm1(Vec x) {
  auto c = [](double v) { return splat_as<Vec>(Lane<Vec>(v)); };
  if constexpr (is_float<Vec>) {
    Vec n, r;
    reduce_by_ln2(lesser(c(89), greater(c(-20), x)), n, r);
    // 2**n (1 + p) - 1, halved on the way lest 2**128 overflow.
    Vec power = add_exponent(c(0.5), n);
    Vec half = fma(power, fma(r * r, exp_curve(r), r), power - c(0.5));
    return where_less(abs(x), c(0x1p-25), x, half + half);
  } else {
    return per_lane([](double v) { return std::expm1(v); }, x);
  }
}

// 1 / (1 + e**-x), in the form that is accurate on both sides.
template <class Vec>
BICOMPILE_INLINE Vec sigmoid(Vec x) {
  auto c = [](double v) { return splat_as<Vec>(Lane<Vec>(v)); };
  Vec e = exp_in_range(greater(c(is_float<Vec> ? -104 : -746), bit_or(x, c(-0.0))));
  return where_negative(x, e, c(1)) / (c(1) + e);
}

// The hyperbolic tangent: (e**2x - 1) / (e**2x + 1).
template <class Vec>
BICOMPILE_INLINE Vec tanh(Vec x) {
  auto c = [](double v) { return splat_as<Vec>(Lane<Vec>(v)); };
  if constexpr (is_float<Vec>) {
    Vec y = lesser(c(10), abs(x)), n, r;
    reduce_by_ln2(y + y, n, r);
    Vec power = add_exponent(c(1), n);
    Vec less_one = fma(power, fma(r * r, exp_curve(r), r), power - c(1));
    return copy_sign(less_one / (less_one + c(2)), x);
  } else {
    return per_lane([](double v) { return std::tanh(v); }, x);
  }
}

// The error function.  Source: N. Juffa's two-piece minimax fit (stackoverflow.com/q/35148198).
template <class Vec>
BICOMPILE_INLINE Vec erf(Vec x) {
  auto c = [](double v) { return splat_as<Vec>(Lane<Vec>(v)); };
  if constexpr (is_float<Vec>) {
    Vec t = lesser(c(4), abs(x)), s = x * x;
    Vec far = polynomial(t, -1.72853470e-5f, 3.83197126e-4f, -3.88396438e-3f, 2.42546219e-2f, -1.06777877e-1f,
                         -6.34846687e-1f, -1.28717512e-1f);
    far = copy_sign(c(1) - exp_in_range(fma(far, t, c(0) - t)), x);
    Vec near = polynomial(s, -5.96761703e-4f, 4.99119423e-3f, -2.67681349e-2f, 1.12819925e-1f, -3.76125336e-1f,
                          1.28379166e-1f);
    return where_less(t, c(0.921875), fma(near, x, x), far);
  } else {
    return per_lane([](double v) { return std::erf(v); }, x);
  }
}

template <class Vec>
BICOMPILE_INLINE Vec erfc(Vec x) {
  return per_lane([](auto v) { return std::erfc(v); }, x);
}

// x = m * 2**e for x > 0, subnormal numbers included; m in [2/3, 4/3) for float, [sqrt(1/2), sqrt(2)) for double.
template <class Vec>
BICOMPILE_INLINE void split(Vec x, Vec& m, Vec& e) {
  using T = Lane<Vec>;
  auto c = [](double v) { return splat_as<Vec>(T(v)); };
  const Vec smallest = c(std::numeric_limits<T>::min());
  Vec normal = where_less(x, smallest, x * c(is_float<Vec> ? 0x1p24 : 0x1p53), x);
  e = exponent_field(bits_minus(normal, c(is_float<Vec> ? 0x1.555556p-1 : 0x1.6a09e667f3bcdp-1)));
  m = add_exponent(normal, c(0) - e);
  e = e - where_less(x, smallest, c(is_float<Vec> ? 24 : 53), c(0));
}

// (log(1 + f) - f) / f**2 for |f| <= 1/3.
template <class Vec>
BICOMPILE_INLINE Vec log_curve(Vec f) {
  return polynomial(f, -0x1.109f24p-3f, 0x1.1ed906p-3f, -0x1.eeb8ecp-4f, 0x1.1ebca2p-3f, -0x1.55cd0ep-3f,
                    0x1.99d212p-3f, -0x1.fffd6ap-3f, 0x1.555502p-2f, -0.5f);
}

// What a logarithm is outside its domain and at its ends: -infinity at `pole`, NaN below, infinity at infinity.
template <class Vec>
BICOMPILE_INLINE Vec log_ends(Vec x, Vec pole, Vec result) {
  const Vec infinity = splat_as<Vec>(std::numeric_limits<Lane<Vec>>::infinity());
  const Vec nan = splat_as<Vec>(std::numeric_limits<Lane<Vec>>::quiet_NaN());
  Vec outside = where_equal(x, pole, splat_as<Vec>(0) - infinity, nan);
  return where_less(pole, x, where_equal(x, infinity, x, result), outside);
}

// The natural logarithm.  Source for double: fdlibm, e_log.c.
template <class Vec>
BICOMPILE_INLINE Vec log(Vec x) {
  auto c = [](double v) { return splat_as<Vec>(Lane<Vec>(v)); };
  Vec m, e, result;
  split(x, m, e);
  Vec f = m - c(1);
  if constexpr (is_float<Vec>) {
    result = fma(e, c(0x1.62e43p-1), fma(f * f, log_curve(f), f));
  } else {
    Vec s = f / (c(2) + f), z = s * s, half = c(0.5) * f * f;
    Vec r = z * polynomial(z, 1.479819860511658591e-01, 1.531383769920937332e-01, 1.818357216161805012e-01,
                           2.222219843214978396e-01, 2.857142874366239149e-01, 3.999999999940941908e-01,
                           6.666666666666735130e-01);
    Vec low = fma(e, c(1.90821492927058770002e-10), s * (half + r));
    result = fma(e, c(6.93147180369123816490e-01), f - (half - low));
  }
  return log_ends(x, c(0), result);
}

// log(x) * (high + low) + e-multiples of the base's own log(2), for the bases 2 and 10.
template <class Vec>
BICOMPILE_INLINE Vec log_to_base(Vec x, float high, float low, float unit_high, float unit_low) {
  auto c = [](float v) { return splat_as<Vec>(v); };
  Vec m, e;
  split(x, m, e);
  Vec f = m - c(1), main = f * c(high);
  Vec rest = fma(f, c(low), fma(f, c(high), c(0) - main));  // what main lost
  rest = fma(f * f * log_curve(f), c(high), rest);
  return log_ends(x, c(0), fma(e, c(unit_high), main + fma(e, c(unit_low), rest)));
}

template <class Vec>
BICOMPILE_INLINE Vec log2(Vec x) {
  if constexpr (is_float<Vec>) {
    return log_to_base(x, 0x1.715476p+0f, 0x1.4ae0c0p-26f, 1, 0);
  } else {
    return per_lane([](double v) { return std::log2(v); }, x);
  }
}

template <class Vec>
BICOMPILE_INLINE Vec log10(Vec x) {
  if constexpr (is_float<Vec>) {
    return log_to_base(x, 0x1.bcb7b2p-2f, -0x1.5b235ep-27f, 0x1.344136p-2f, -0x1.ec10c0p-27f);
  } else {
    return per_lane([](double v) { return std::log10(v); }, x);
  }
}

// log(1 + x).
template <class Vec>
BICOMPILE_INLINE Vec log1p(Vec x) {
  auto c = [](double v) { return splat_as<Vec>(Lane<Vec>(v)); };
  if constexpr (is_float<Vec>) {
    Vec e = exponent_field(bits_minus(x + c(1), c(0x1.555556p-1)));
    // f = (1 + x) * 2**-e - 1, rounded once: x is scaled exactly, and so is 1 where it still counts.
    Vec one = add_exponent(c(1), c(0) - lesser(e, c(100)));
    Vec f = add_exponent(x, c(0) - e) + (one - c(1));
    Vec result = fma(e, c(0x1.62e43p-1), fma(f * f, log_curve(f), f));
    return where_less(abs(x), c(0x1p-25), x, log_ends(x, c(-1), result));
  } else {
    return per_lane([](double v) { return std::log1p(v); }, x);
  }
}

// sin and cos, by quadrants of pi / 2; beyond kLargestAngle lane by lane in libm.
template <bool kCosine, class Vec>
BICOMPILE_INLINE Vec sin_or_cos(Vec x) {
  auto libm = [](auto v) { return kCosine ? std::cos(v) : std::sin(v); };
  if constexpr (is_float<Vec>) {
    auto c = [](float v) { return splat_as<Vec>(v); };
    constexpr float kLargestAngle = 0x1p18f, kWhole = 0x1.8p23f;
    Vec a = abs(x);
    Vec t = fma(a, c(0x1.45f306p-1f), c(kWhole)), n = t - c(kWhole);  // the low bits of t are the whole number n
    Vec r = fma(n, c(-0x1.921fb6p+0f), a);
    r = fma(n, c(0x1.777a5cp-25f), r);
    r = fma(n, c(0x1.ee59dap-50f), r);
    Vec z = r * r;
    Vec sine = fma(polynomial(z, -0x1.988552p-13f, 0x1.1104fep-7f, -0x1.555540p-3f) * z, r, r);
    Vec cosine = polynomial(z, 0x1.9930d0p-16f, -0x1.6c098cp-10f, 0x1.555546p-5f, -0.5f, 1.0f);
    if constexpr (kCosine) t = t + c(1);  // a quarter turn ahead
    Vec result = where_negative(shift_left<31>(t), cosine, sine);
    Vec flip = bit_and(shift_left<30>(t), c(-0.0f));
    if constexpr (!kCosine) flip = bit_xor(flip, bit_and(x, c(-0.0f)));
    result = bit_xor(result, flip);
    if (any_less(c(kLargestAngle), a)) result = where_less(c(kLargestAngle), a, per_lane(libm, x), result);
    return result;
  } else {
    return per_lane(libm, x);
  }
}

template <class Vec>
BICOMPILE_INLINE Vec sin(Vec x) {
  return sin_or_cos<false>(x);
}

template <class Vec>
BICOMPILE_INLINE Vec cos(Vec x) {
  return sin_or_cos<true>(x);
}

// ---------------------------------------------------------------------------------------------------------------
// Exact operations whose NaN, signed zero or rounding differ between libraries; and libm's, lane by lane.

template <class Vec>
BICOMPILE_INLINE Vec add(Vec a, Vec b) {
  return a + b;
}
template <class Vec>
BICOMPILE_INLINE Vec mul(Vec a, Vec b) {
  return a * b;
}
template <class Vec>
BICOMPILE_INLINE Vec fused(Vec a, Vec b, Vec c) {
  return fma(a, b, c);
}

// Correctly rounded, which torch.sqrt is not where MKL computes it.
template <class Vec>
BICOMPILE_INLINE Vec sqrt(Vec x) {
  return bicompile::sqrt(x);
}
// What the roundings of the root and of the quotient left over is added to the quotient, where that is a number.
template <class Vec>
BICOMPILE_INLINE Vec rsqrt(Vec x) {
  const Vec one = splat_as<Vec>(1), root = bicompile::sqrt(x), quotient = one / root;
  const Vec of_root = fma(root, root, splat_as<Vec>(0) - x), of_quotient = fma(root, quotient, splat_as<Vec>(0) - one);
  const Vec left = fma(of_root * quotient, quotient * splat_as<Vec>(0.5), splat_as<Vec>(0) - of_quotient);
  const Vec nearer = fma(quotient, left, quotient);
  return where_nan(nearer, quotient, nearer);
}

// NaN if either is; the second of two equal ones, which settles the sign of zero.
template <class Vec>
BICOMPILE_INLINE Vec maximum(Vec a, Vec b) {
  return where_nan(a, a, greater(a, b));
}
template <class Vec>
BICOMPILE_INLINE Vec minimum(Vec a, Vec b) {
  return where_nan(a, a, lesser(a, b));
}
template <class Vec>
BICOMPILE_INLINE Vec relu(Vec x) {
  return greater(splat_as<Vec>(0), x);
}

template <class Vec>
BICOMPILE_INLINE Vec fmod(Vec x, Vec y) {
  return per_lane([](auto a, auto b) { return std::fmod(a, b); }, x, y);
}

// Python's: the sign of y.
template <class Vec>
BICOMPILE_INLINE Vec remainder(Vec x, Vec y) {
  auto one = [](auto a, auto b) {
    auto r = std::fmod(a, b);
    return r != 0 && (r < 0) != (b < 0) ? r + b : r;
  };
  return per_lane(one, x, y);
}

template <class Vec>
BICOMPILE_INLINE Vec pow(Vec x, Vec y) {
  return per_lane([](auto a, auto b) { return std::pow(a, b); }, x, y);
}

// x**n where the exponent is written as a number: multiplications for a small whole one, as Inductor writes them.
template <class Vec>
BICOMPILE_INLINE Vec pow_by_number(Vec x, Vec y) {
  auto one = [](auto a, auto b) {
    using T = decltype(a);
    if (b == T(0.5)) return std::sqrt(a);
    if (!(std::fabs(b) < 32) || b != std::nearbyint(b)) return std::pow(a, b);
    const unsigned n = unsigned(std::fabs(b));
    if (n == 0) return T(1);
    if (b < 0) a = T(1) / a;
    T r = a;
    for (int bit = 30 - __builtin_clz(n); bit >= 0; bit--) {
      r = r * r;
      if (n >> bit & 1) r = r * a;
    }
    return r;
  };
  return per_lane(one, x, y);
}

// x**y where the base is written as a number.
template <class Vec>
BICOMPILE_INLINE Vec pow_of_number(Vec x, Vec y) {
  const Vec one = splat_as<Vec>(1), two = splat_as<Vec>(2);
  return where_equal(x, two, exp2(y), where_equal(x, one, one, pow(x, y)));
}

}  // namespace bicompile::math
