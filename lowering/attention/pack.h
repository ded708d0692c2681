// Operands of the attention kernels as they want them: panels of keys transposed, tiles of rows interleaved.
#pragma once

#include "../native/tensor.h"

namespace bicompile::attention {

constexpr int64_t kBlock = 192;  // order.py: AttentionOrder.block

template <class S>
using VecOf = std::conditional_t<std::is_same_v<S, double>, VecD, VecF>;

// Keys that one panel holds.
template <class S>
constexpr int kPanel = 2 * VecOf<S>::kLanes;

// Rows of one call of the score kernel and of the weighted-sum kernel, and the vectors that these may add up at a time:
// as many as there are registers.
#if defined(BICOMPILE_AVX512)
constexpr int kScoreRows = 8, kSumRows = 4, kAccumulators = 16;
#elif defined(BICOMPILE_AVX2)
constexpr int kScoreRows = 6, kSumRows = 6, kAccumulators = 12;
#else
constexpr int kScoreRows = 4, kSumRows = 2, kAccumulators = 8;
#endif

BICOMPILE_INLINE int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// A matrix of storage type T in memory; strides in elements.
template <class T>
struct Matrix {
  const T* data;
  int64_t row, column;
  const T* at(int64_t i) const { return data + i * row; }
};

// Lane i of out[u] is 32-bit unit u of row i, for kLanes rows of four units; rows lie `stride` bytes apart.
// store_unit widens the elements in such a vector into rows of a panel: one row of float, two of a half precision.
#if defined(BICOMPILE_AVX512)
using Units = __m512i;

BICOMPILE_INLINE void transpose_units(const char* p, int64_t stride, Units out[4]) {
  auto lane = [&](int i) { return _mm_loadu_si128((const __m128i*)(p + i * stride)); };
  auto every_fourth = [&](int i) {
    __m512i r = _mm512_castsi128_si512(lane(i));
    r = _mm512_inserti32x4(r, lane(i + 4), 1);
    r = _mm512_inserti32x4(r, lane(i + 8), 2);
    return _mm512_inserti32x4(r, lane(i + 12), 3);
  };
  __m512i a = every_fourth(0), b = every_fourth(1), c = every_fourth(2), d = every_fourth(3);
  __m512i ab = _mm512_unpacklo_epi32(a, b), cd = _mm512_unpacklo_epi32(c, d);
  out[0] = _mm512_unpacklo_epi64(ab, cd);
  out[1] = _mm512_unpackhi_epi64(ab, cd);
  ab = _mm512_unpackhi_epi32(a, b), cd = _mm512_unpackhi_epi32(c, d);
  out[2] = _mm512_unpacklo_epi64(ab, cd);
  out[3] = _mm512_unpackhi_epi64(ab, cd);
}

BICOMPILE_INLINE void store_unit(float, __m512i unit, float* panel) {
  _mm512_storeu_ps(panel, _mm512_castsi512_ps(unit));
}
BICOMPILE_INLINE void store_unit(bf16, __m512i unit, float* panel) {
  _mm512_storeu_ps(panel, _mm512_castsi512_ps(_mm512_slli_epi32(unit, 16)));
  __m512i high = _mm512_and_si512(unit, _mm512_set1_epi32(int(0xffff0000u)));
  _mm512_storeu_ps(panel + kPanel<float>, _mm512_castsi512_ps(high));
}
BICOMPILE_INLINE void store_unit(fp16, __m512i unit, float* panel) {
  _mm512_storeu_ps(panel, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(unit)));
  _mm512_storeu_ps(panel + kPanel<float>, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(unit, 16))));
}
#elif defined(BICOMPILE_AVX2)
using Units = __m256i;

BICOMPILE_INLINE void transpose_units(const char* p, int64_t stride, Units out[4]) {
  auto lane = [&](int i) { return _mm_loadu_si128((const __m128i*)(p + i * stride)); };
  auto every_fourth = [&](int i) { return _mm256_set_m128i(lane(i + 4), lane(i)); };
  __m256i a = every_fourth(0), b = every_fourth(1), c = every_fourth(2), d = every_fourth(3);
  __m256i ab = _mm256_unpacklo_epi32(a, b), cd = _mm256_unpacklo_epi32(c, d);
  out[0] = _mm256_unpacklo_epi64(ab, cd);
  out[1] = _mm256_unpackhi_epi64(ab, cd);
  ab = _mm256_unpackhi_epi32(a, b), cd = _mm256_unpackhi_epi32(c, d);
  out[2] = _mm256_unpacklo_epi64(ab, cd);
  out[3] = _mm256_unpackhi_epi64(ab, cd);
}

BICOMPILE_INLINE void store_unit(float, __m256i unit, float* panel) {
  _mm256_storeu_ps(panel, _mm256_castsi256_ps(unit));
}
BICOMPILE_INLINE void store_unit(bf16, __m256i unit, float* panel) {
  _mm256_storeu_ps(panel, _mm256_castsi256_ps(_mm256_slli_epi32(unit, 16)));
  __m256i high = _mm256_and_si256(unit, _mm256_set1_epi32(int(0xffff0000u)));
  _mm256_storeu_ps(panel + kPanel<float>, _mm256_castsi256_ps(high));
}
BICOMPILE_INLINE void store_unit(fp16, __m256i unit, float* panel) {
  auto widened = [](__m256i low_halves) {  // of units whose high halves are zero
    return _mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(low_halves), _mm256_extracti128_si256(low_halves, 1)));
  };
  _mm256_storeu_ps(panel, widened(_mm256_and_si256(unit, _mm256_set1_epi32(0xffff))));
  _mm256_storeu_ps(panel + kPanel<float>, widened(_mm256_srli_epi32(unit, 16)));
}
#endif

// panel[d * kPanel + j] = element d of row `first + j`, for j in [0, count); rows up to kPanel are zero.
template <class T, class S = typename Compute<T>::Scalar>
void pack_panel(Matrix<T> m, int64_t first, int64_t count, int64_t depth, S* panel) {
  constexpr int width = kPanel<S>;
  int64_t done = 0;  // rows packed over their whole depth
#if defined(BICOMPILE_AVX512) || defined(BICOMPILE_AVX2)
  if constexpr (sizeof(T) <= 4) {
    constexpr int rows = VecF::kLanes, per_unit = 4 / sizeof(T);
    const int64_t whole = depth / (4 * per_unit) * (4 * per_unit);
    for (; m.column == 1 && done + rows <= count; done += rows) {
      const T* p = m.at(first + done);
      for (int64_t d = 0; d < whole; d += 4 * per_unit) {
        Units units[4];
        transpose_units((const char*)(p + d), m.row * int64_t(sizeof(T)), units);
        for (int u = 0; u < 4; u++) store_unit(T(), units[u], panel + (d + u * per_unit) * width + done);
      }
      for (int64_t j = 0; j < rows; j++)
        for (int64_t d = whole; d < depth; d++) panel[d * width + done + j] = widen(p[j * m.row + d]);
    }
  }
#endif
  for (int64_t j = done; j < count; j++) {
    const T* p = m.at(first + j);
    for (int64_t d = 0; d < depth; d++) panel[d * width + j] = widen(p[d * m.column]);
  }
  if (count == width) return;
  for (int64_t d = 0; d < depth; d++)
    for (int64_t j = count; j < width; j++) panel[d * width + j] = 0;
}

// Groups of kScoreRows rows, each laid out [depth][rows of the group]; row r begins at row_at(r).
template <class T, class RowAt, class S = typename Compute<T>::Scalar>
void pack_rows(const RowAt& row_at, int64_t column, int64_t rows, int64_t depth, S* packed) {
  for (int64_t group = 0; group < rows; group += kScoreRows) {
    const int64_t count = std::min<int64_t>(kScoreRows, rows - group);
    S* to = packed + group * depth;
    for (int64_t r = 0; r < count; r++) {
      const T* from = row_at(group + r);
      for (int64_t d = 0; d < depth; d++) to[d * count + r] = widen(from[d * column]);
    }
  }
}

// to[j][0..round_up(width, kLanes)) = row `first + j` widened, zeros past `width`.
template <class T, class S = typename Compute<T>::Scalar>
void widen_rows(Matrix<T> m, int64_t first, int64_t count, int64_t width, S* to) {
  using Vec = VecOf<S>;
  const int64_t padded = round_up(width, Vec::kLanes);
  for (int64_t j = 0; j < count; j++, to += padded) {
    const T* from = m.at(first + j);
    int64_t d = 0;
    if (m.column == 1)
      for (; d + Vec::kLanes <= width; d += Vec::kLanes) store(to + d, load(from + d));
    for (; d < width; d++) to[d] = widen(from[d * m.column]);
    for (; d < padded; d++) to[d] = 0;
  }
}

}  // namespace bicompile::attention
