// The inner loop of a matrix product: a tile of outputs in registers, one block of the reduced dimension at a time.
//
// Packed elements.  Operands are packed before they get here.  float32, float64 and float16 are packed as float,
// double and float, one element for each k.  bfloat16 is packed as pairs: one 32-bit element holds the bits of
// k = 2j (low half) and k = 2j + 1 (high half), carried as the bits of a float.
#pragma once

#include <utility>

#include "../native/tensor.h"

namespace bicompile::matmul {

// A block of the reduced dimension: the order restarts its chain of multiply-adds here (order.py).
constexpr int kBlock = 192;

template <class T>
struct Pack {
  using Element = typename Compute<T>::Scalar;
  using Vec = typename Compute<T>::Vec;
  static constexpr int kPair = std::is_same_v<T, bf16> ? 2 : 1;   // k's in one element
  static constexpr int kDepth = kBlock / kPair;                   // elements in one block
  static constexpr int kLanes = Vec::kLanes;
  // Elements from one row of a packed left operand to the next: one line more than a block, so that rows spread
  // over the sets of the cache, and a constant, so that the rows of a tile need one address register.
  static constexpr int kRowStride = kDepth + 64 / int(sizeof(Element));
};

// Rows of the largest tile.  Two vectors a row, as many rows as leave registers for the operands.
#if defined(BICOMPILE_AVX512)
constexpr int kTileRows = 14;
constexpr int kWideRows = 6;
#elif defined(BICOMPILE_AVX2)
constexpr int kTileRows = 6;
constexpr int kWideRows = 3;
#else
constexpr int kTileRows = 4;
constexpr int kWideRows = 2;
#endif

// How pairs of bfloat16 are multiplied and added: the odd element first, then the even one, each step rounded to
// nearest and every denormal number, going in or coming out, taken as zero of its sign.  kInstruction does both in
// one vdpbf16ps; kFused writes the steps out.  bfloat16.h checks that they agree on this machine.
enum class PairBy { kInstruction, kFused };

#if defined(BICOMPILE_AVX512)
BICOMPILE_INLINE VecF even_of(VecF pair) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(pair.v), 16))};
}
BICOMPILE_INLINE VecF odd_of(VecF pair) {
  __m512i high = _mm512_set1_epi32(int(0xffff0000));
  return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(pair.v), high))};
}
#elif defined(BICOMPILE_AVX2)
BICOMPILE_INLINE VecF even_of(VecF pair) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(pair.v), 16))};
}
BICOMPILE_INLINE VecF odd_of(VecF pair) {
  return {_mm256_and_ps(pair.v, _mm256_castsi256_ps(_mm256_set1_epi32(int(0xffff0000))))};
}
#else
BICOMPILE_INLINE VecF even_of(VecF pair) {
  return VecF::each([&](int i) { return bit_cast<float>(bit_cast<uint32_t>(pair.v[i]) << 16); });
}
BICOMPILE_INLINE VecF odd_of(VecF pair) {
  return VecF::each([&](int i) { return bit_cast<float>(bit_cast<uint32_t>(pair.v[i]) & 0xffff0000u); });
}
#endif

#if defined(BICOMPILE_AVX512) || defined(BICOMPILE_AVX2)
// The vector units flush denormals by themselves; the caller sets FloatMode(true).
constexpr bool kFlushInHardware = true;
BICOMPILE_INLINE VecF flushed(VecF x) { return x; }
BICOMPILE_INLINE VecF flushing_fma(VecF a, VecF b, VecF acc) { return fma(a, b, acc); }
#else
constexpr bool kFlushInHardware = false;
BICOMPILE_INLINE float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
BICOMPILE_INLINE float flushing_fma(float a, float b, float acc) {
  a = flushed(a), b = flushed(b);  // acc is flushed already
  float r = std::fma(a, b, acc);
  // The processor flushes what is below 2**-126 when rounded to 24 bits with an unbounded exponent.  A sum just
  // below 2**-126 is rounded to fewer bits here and may have reached it: round it again, far from the limit.
  if (std::fabs(r) == 0x1p-126f) {
    float scaled = std::fma(a * 0x1p32f, b * 0x1p32f, acc * 0x1p64f);
    if (std::fabs(scaled) < 0x1p-62f) return std::copysign(0.0f, r);
  }
  return flushed(r);
}
BICOMPILE_INLINE VecF flushed(VecF x) {
  return VecF::each([&](int i) { return flushed(x.v[i]); });
}
BICOMPILE_INLINE VecF flushing_fma(VecF a, VecF b, VecF acc) {
  return VecF::each([&](int i) { return flushing_fma(a.v[i], b.v[i], acc.v[i]); });
}
#endif

template <PairBy by>
BICOMPILE_INLINE VecF step_pair(VecF a, VecF b, VecF acc) {
#if defined(BICOMPILE_AVX512) && defined(__AVX512BF16__)
  if constexpr (by == PairBy::kInstruction) {
    return {_mm512_dpbf16_ps(acc.v, bit_cast<__m512bh>(a.v), bit_cast<__m512bh>(b.v))};
  }
#endif
  acc = flushing_fma(odd_of(a), odd_of(b), acc);
  return flushing_fma(even_of(a), even_of(b), acc);
}

// One step of T's order on packed elements.
template <class T, PairBy by, class Vec>
BICOMPILE_INLINE Vec step_of(Vec a, Vec b, Vec acc) {
  if constexpr (std::is_same_v<T, bf16>) {
    return step_pair<by>(a, b, acc);
  } else {
    return fma(a, b, acc);
  }
}

// The sum of two blocks' sums in T's order.
template <class T, class Vec>
BICOMPILE_INLINE Vec sum_of(Vec a, Vec b) {
  if constexpr (std::is_same_v<T, bf16>) {
    return flushed(a + b);
  } else {
    return a + b;
  }
}

// to = sum + a @ b over one block, for `Rows` rows and `Vecs` vectors of columns.
//
// a: packed rows, Pack<T>::kRowStride apart.  b: for each of `depth` elements, Vecs vectors, b_stride apart.
// sum: Rows x Vecs vectors, rows sum_stride apart; null for zero.  to: the same, to_stride apart; it may be `sum`, or
// be where the product ends, with canonical NaNs.
template <class T, PairBy by, int Rows, int Vecs>
void multiply_tile(int depth, const typename Pack<T>::Element* __restrict a,
                   const typename Pack<T>::Element* __restrict b, int64_t b_stride,
                   const typename Pack<T>::Element* sum, int64_t sum_stride, typename Pack<T>::Element* to,
                   int64_t to_stride) {
  using Vec = typename Pack<T>::Vec;
  using Element = typename Pack<T>::Element;
  constexpr int kLanes = Pack<T>::kLanes;
  Vec acc[Rows][Vecs];
#pragma GCC unroll 16
  for (int i = 0; i < Rows; i++)
#pragma GCC unroll 4
    for (int v = 0; v < Vecs; v++) acc[i][v] = splat(Element(0));
  // Asked for now: the sums, which are read last, and the rows of the next tile.
  constexpr int kLine = 64 / int(sizeof(Element));
#pragma GCC unroll 16
  for (int i = 0; i < Rows; i++) {
    if (sum != nullptr) __builtin_prefetch(sum + i * sum_stride);
    __builtin_prefetch(a + (Rows + i) * Pack<T>::kRowStride);
    __builtin_prefetch(a + (Rows + i) * Pack<T>::kRowStride + kLine);
  }
  for (int k = 0; k < depth; k++, b += b_stride) {
    Vec right[Vecs];
#pragma GCC unroll 4
    for (int v = 0; v < Vecs; v++) right[v] = load(b + v * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; i++) {
      Vec left = splat(a[i * Pack<T>::kRowStride + k]);
#pragma GCC unroll 4
      for (int v = 0; v < Vecs; v++) acc[i][v] = step_of<T, by>(left, right[v], acc[i][v]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < Rows; i++)
#pragma GCC unroll 4
    for (int v = 0; v < Vecs; v++) {
      const int lane = v * kLanes;
      Vec y = sum ? sum_of<T>(load(sum + i * sum_stride + lane), acc[i][v]) : acc[i][v];
      store(to + i * to_stride + lane, to == sum ? y : canonical(y));
    }
}

template <class T>
using TileKernel = void (*)(int, const typename Pack<T>::Element*, const typename Pack<T>::Element*, int64_t,
                            const typename Pack<T>::Element*, int64_t, typename Pack<T>::Element*, int64_t);

namespace detail {
template <class T, PairBy by, int Vecs, int... Rows>
TileKernel<T> pick(int rows, std::integer_sequence<int, Rows...>) {
  static constexpr TileKernel<T> kernels[] = {&multiply_tile<T, by, Rows + 1, Vecs>...};
  return kernels[rows - 1];
}
}  // namespace detail

// The kernel for a tile of `rows` rows: 4 vectors a row where the rows are few (`wide`), else 2.
template <class T, PairBy by>
TileKernel<T> tile_kernel(int rows, bool wide) {
  if (wide) return detail::pick<T, by, 4>(rows, std::make_integer_sequence<int, kWideRows>());
  return detail::pick<T, by, 2>(rows, std::make_integer_sequence<int, kTileRows>());
}

}  // namespace bicompile::matmul
