// Packing: copy a piece of an operand, whatever its strides, into the layout that the inner loop reads.
//
// Both operands are seen as `lines` (rows of the left one, columns of the right one) times k.  A vector of packed
// elements is loaded along k of one line, or across the lines of one k; then stored as it is or transposed.
#pragma once

#include "micro.h"
#include "windows/image.h"

namespace bicompile::matmul {

// One operand: element (line, k) lies at data[line * line_stride + k * k_stride].  Without strides it is a right one that
// is made of an image's windows: element k of window `line`, or, by position, element `line` of window k.
template <class T>
struct Operand {
  const T* data;
  int64_t line_stride;
  int64_t k_stride;
  const windows::Image* image = nullptr;
  const T* end = nullptr;  // of the image
  bool by_position = false;
  const T* at(int64_t line, int64_t k) const { return data + line * line_stride + k * k_stride; }
};

// -- transposing kLanes vectors of kLanes elements ---------------------------------------------------------------

#if defined(BICOMPILE_AVX512)
BICOMPILE_INLINE void transpose(VecF (&x)[16]) {
  __m512 t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(x[i].v, x[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(x[i].v, x[i + 1].v);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
    x[i].v = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[i + 2])));
    x[i + 1].v = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[i + 2])));
    x[i + 2].v = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[i + 1]), _mm512_castps_pd(t[i + 3])));
    x[i + 3].v = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[i + 1]), _mm512_castps_pd(t[i + 3])));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_f32x4(x[i].v, x[i + 4].v, 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(x[i].v, x[i + 4].v, 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(x[i + 8].v, x[i + 12].v, 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(x[i + 8].v, x[i + 12].v, 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    x[i].v = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    x[i + 8].v = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    x[i + 4].v = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
    x[i + 12].v = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
  }
}
BICOMPILE_INLINE void transpose(VecD (&x)[8]) {
  __m512d t[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm512_unpacklo_pd(x[i].v, x[i + 1].v);
    t[i + 1] = _mm512_unpackhi_pd(x[i].v, x[i + 1].v);
  }
  __m512d u[8];
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) {
    u[i] = _mm512_shuffle_f64x2(t[i], t[i + 2], 0x88);
    u[i + 2] = _mm512_shuffle_f64x2(t[i], t[i + 2], 0xdd);
    u[i + 4] = _mm512_shuffle_f64x2(t[i + 4], t[i + 6], 0x88);
    u[i + 6] = _mm512_shuffle_f64x2(t[i + 4], t[i + 6], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    x[i].v = _mm512_shuffle_f64x2(u[i], u[i + 4], 0x88);
    x[i + 4].v = _mm512_shuffle_f64x2(u[i], u[i + 4], 0xdd);
  }
}
#elif defined(BICOMPILE_AVX2)
BICOMPILE_INLINE void transpose(VecF (&x)[8]) {
  __m256 t[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(x[i].v, x[i + 1].v);
    t[i + 1] = _mm256_unpackhi_ps(x[i].v, x[i + 1].v);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    x[i].v = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    x[i + 1].v = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    x[i + 2].v = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    x[i + 3].v = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    __m256 low = x[i].v, high = x[i + 4].v;
    x[i].v = _mm256_permute2f128_ps(low, high, 0x20);
    x[i + 4].v = _mm256_permute2f128_ps(low, high, 0x31);
  }
}
BICOMPILE_INLINE void transpose(VecD (&x)[4]) {
  __m256d a = _mm256_unpacklo_pd(x[0].v, x[1].v), b = _mm256_unpackhi_pd(x[0].v, x[1].v);
  __m256d c = _mm256_unpacklo_pd(x[2].v, x[3].v), d = _mm256_unpackhi_pd(x[2].v, x[3].v);
  x[0].v = _mm256_permute2f128_pd(a, c, 0x20);
  x[1].v = _mm256_permute2f128_pd(b, d, 0x20);
  x[2].v = _mm256_permute2f128_pd(a, c, 0x31);
  x[3].v = _mm256_permute2f128_pd(b, d, 0x31);
}
#else
template <class T, int N>
BICOMPILE_INLINE void transpose(ScalarVec<T, N> (&x)[N]) {
  for (int i = 0; i < N; i++)
    for (int j = 0; j < i; j++) std::swap(x[i].v[j], x[j].v[i]);
}
#endif

// -- loading vectors of packed elements --------------------------------------------------------------------------

BICOMPILE_INLINE float pair_bits(bf16 even, bf16 odd) {
  return bit_cast<float>(uint32_t(even.bits) | uint32_t(odd.bits) << 16);
}

// kLanes elements along k, all of them there.
template <class T>
BICOMPILE_INLINE typename Pack<T>::Vec load_along(const T* p) {
  if constexpr (std::is_same_v<T, bf16>) {
    return load(reinterpret_cast<const float*>(p));
  } else {
    return load(p);
  }
}

// Up to kLanes elements along k, covering k's [0, count) only; zero beyond.
template <class T>
inline typename Pack<T>::Vec load_along(const T* p, int count) {
  if constexpr (std::is_same_v<T, bf16>) {
    float lanes[VecF::kLanes];
    for (int i = 0; i < VecF::kLanes; i++) {
      bf16 even = 2 * i < count ? p[2 * i] : bf16{0}, odd = 2 * i + 1 < count ? p[2 * i + 1] : bf16{0};
      lanes[i] = pair_bits(even, odd);
    }
    return load(lanes);
  } else {
    return load_first(p, count < Pack<T>::kLanes ? count : Pack<T>::kLanes, typename Pack<T>::Element(0));
  }
}

// One element of each of kLanes adjacent lines (line_stride 1); `odd` says whether a second k is there.
template <class T>
BICOMPILE_INLINE typename Pack<T>::Vec load_across(const T* p, int64_t k_stride, bool odd) {
  if constexpr (std::is_same_v<T, bf16>) {
    // load() of bfloat16 puts the bits into the high half: exactly where the odd one goes.
    const VecF even = load(p), high = odd ? load(p + k_stride) : splat(0.0f);
#if defined(BICOMPILE_AVX512)
    return {_mm512_or_ps(high.v, _mm512_castsi512_ps(_mm512_srli_epi32(_mm512_castps_si512(even.v), 16)))};
#elif defined(BICOMPILE_AVX2)
    return {_mm256_or_ps(high.v, _mm256_castsi256_ps(_mm256_srli_epi32(_mm256_castps_si256(even.v), 16)))};
#else
    return VecF::each([&](int i) {
      return bit_cast<float>(bit_cast<uint32_t>(high.v[i]) | bit_cast<uint32_t>(even.v[i]) >> 16);
    });
#endif
  } else {
    return load(p);
  }
}

// One element of each of the first `count` lines, any strides; zero for the lines beyond.
template <class T>
inline typename Pack<T>::Vec gather_across(const T* p, int64_t line_stride, int count, int64_t k_stride, bool odd) {
  typename Pack<T>::Element lanes[Pack<T>::kLanes];
  for (int i = 0; i < Pack<T>::kLanes; i++, p += line_stride) {
    if (i >= count) {
      lanes[i] = 0;
    } else if constexpr (std::is_same_v<T, bf16>) {
      lanes[i] = pair_bits(*p, odd ? p[k_stride] : bf16{0});
    } else {
      lanes[i] = widen(*p);
    }
  }
  return load(lanes);
}

// Elements in `depth_k` k's.
template <class T>
constexpr int elements(int depth_k) {
  return (depth_k + Pack<T>::kPair - 1) / Pack<T>::kPair;
}

// -- the two layouts ---------------------------------------------------------------------------------------------

// Lines [line, line + count), k's [k, k + depth_k), as rows: to[i * kRowStride + element].
template <class T>
void pack_rows(const Operand<T>& x, int64_t line, int count, int64_t k, int depth_k, typename Pack<T>::Element* to) {
  using P = Pack<T>;
  constexpr int kStep = P::kLanes * P::kPair;
  if (x.k_stride == 1) {
    for (int i = 0; i < count; i++, to += P::kRowStride) {
      const T* from = x.at(line + i, k);
      int done = 0;
      for (; done + kStep <= depth_k; done += kStep) store(to + done / P::kPair, load_along(from + done));
      if (done < depth_k) store(to + done / P::kPair, load_along(from + done, depth_k - done));
    }
    return;
  }
  // All lines for a few k's at a time: lines that are neighbours lie along, the k's far apart.
  for (int done = 0; done < depth_k; done += kStep) {
    for (int i = 0; i < count; i += P::kLanes) {
      const int lanes = count - i < P::kLanes ? count - i : P::kLanes;
      const T* from = x.at(line + i, k + done);
      typename P::Vec v[P::kLanes];
      if (x.line_stride == 1 && lanes == P::kLanes && done + kStep <= depth_k) {
#pragma GCC unroll 16
        for (int e = 0; e < P::kLanes; e++) v[e] = load_across(from + e * P::kPair * x.k_stride, x.k_stride, true);
      } else {
        for (int e = 0; e < P::kLanes; e++, from += P::kPair * x.k_stride) {
          const int left = depth_k - done - e * P::kPair;
          v[e] = left > 0 ? gather_across(from, x.line_stride, lanes, x.k_stride, left > 1)
                          : splat(typename P::Element(0));
        }
      }
      transpose(v);
      auto* row = to + i * P::kRowStride + done / P::kPair;
      if (lanes == P::kLanes) {
#pragma GCC unroll 16
        for (int j = 0; j < P::kLanes; j++) store(row + j * P::kRowStride, v[j]);
      } else {
        for (int j = 0; j < lanes; j++) store(row + j * P::kRowStride, v[j]);
      }
    }
  }
}

template <class T>
void pack_windows(const Operand<T>& x, int64_t line, int64_t count, int64_t k, int depth_k, int width,
                  int64_t panel_stride, typename Pack<T>::Element* __restrict to);

// Lines [line, line + count), k's [k, k + depth_k), as columns in panels of `width`, a multiple of kLanes:
// to[i / width * panel_stride + element * width + i % width].  Columns beyond `count` hold anything.
template <class T>
void pack_columns(const Operand<T>& x, int64_t line, int64_t count, int64_t k, int depth_k, int width,
                  int64_t panel_stride, typename Pack<T>::Element* __restrict to) {
  using P = Pack<T>;
  constexpr int kStep = P::kLanes * P::kPair;
  if (x.image != nullptr) return pack_windows(x, line, count, k, depth_k, width, panel_stride, to);
  if (x.k_stride == 1) {
    for (int64_t i = 0; i < count; i += P::kLanes) {
      auto* column = to + i / width * panel_stride + i % width;
      const T* from[P::kLanes];
      for (int j = 0; j < P::kLanes; j++) from[j] = x.at(line + (i + j < count ? i + j : count - 1), k);
      int done = 0;
      for (; done + kStep <= depth_k; done += kStep) {
        typename P::Vec v[P::kLanes];
#pragma GCC unroll 16
        for (int j = 0; j < P::kLanes; j++) v[j] = load_along(from[j] + done);
        transpose(v);
#pragma GCC unroll 16
        for (int e = 0; e < P::kLanes; e++) store(column + (done / P::kPair + e) * width, v[e]);
      }
      if (done < depth_k) {
        typename P::Vec v[P::kLanes];
        for (int j = 0; j < P::kLanes; j++) v[j] = load_along(from[j] + done, depth_k - done);
        transpose(v);
        for (int e = 0; e < P::kLanes; e++) store(column + (done / P::kPair + e) * width, v[e]);
      }
    }
    return;
  }
  for (int done = 0; done < depth_k; done += P::kPair) {
    const bool odd = done + 1 < depth_k;
    for (int64_t i = 0; i < count; i += P::kLanes) {
      auto* column = to + i / width * panel_stride + done / P::kPair * width + i % width;
      const int lanes = int(count - i < P::kLanes ? count - i : P::kLanes);
      const T* from = x.at(line + i, k + done);
      if (x.line_stride == 1 && lanes == P::kLanes) {
        store(column, load_across(from, x.k_stride, odd));
      } else {
        store(column, gather_across(from, x.line_stride, lanes, x.k_stride, odd));
      }
    }
  }
}

// The same of an image's windows: a few rows of them at a time are written out, and are still in L1 when they are packed.
template <class T>
void pack_windows(const Operand<T>& x, int64_t line, int64_t count, int64_t k, int depth_k, int width,
                  int64_t panel_stride, typename Pack<T>::Element* __restrict to) {
  using P = Pack<T>;
  struct RowTag;
  constexpr int kRows = 8;
  const windows::Loosely<T> by_pieces{x.end};
  if (x.by_position) {
    T* rows = scratch<RowTag, T>(P::kLanes * depth_k + by_pieces.kPiece);
    for (int64_t i = 0; i < count; i += P::kLanes) {
      const int64_t here = std::min<int64_t>(P::kLanes, count - i);
      x.image->copy(x.data, line + i, here, k, depth_k, rows, depth_k, by_pieces);
      pack_columns(Operand<T>{rows, depth_k, 1}, 0, here, 0, depth_k, width, panel_stride,
                   to + i / width * panel_stride + i % width);
    }
    return;
  }
  const int64_t whole = (count + P::kLanes - 1) / P::kLanes * P::kLanes;
  T* rows = scratch<RowTag, T>(kRows * whole + by_pieces.kPiece);
  for (int done = 0; done < depth_k; done += kRows) {
    const int here = std::min(kRows, depth_k - done);
    x.image->copy(x.data, k + done, here, line, count, rows, whole, by_pieces);
    pack_columns(Operand<T>{rows, 1, whole}, 0, whole, 0, here, width, panel_stride, to + done / P::kPair * width);
  }
}

}  // namespace bicompile::matmul
