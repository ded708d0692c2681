// The inner loops for a few rows: the right operand is read from its place, once, in the order that memory likes.
// Columns that lie along k are read kLanes at a time over the whole of k and transposed in registers; of columns that
// lie across k, long rows are read, a few k's at a time.
#pragma once

#include "pack.h"

namespace bicompile::matmul {

#if defined(BICOMPILE_AVX512)
constexpr int kStreamRows = 6;
#else
constexpr int kStreamRows = 4;
#endif

// sums[i * kLanes + j] = row i of the packed left operand (all blocks) times column `column` + j; columns beyond
// `there` hold anything.
template <class T, PairBy by, int Rows>
void stream_columns(const Operand<T>& right, int64_t column, int there, int64_t depth_k,
                    const typename Pack<T>::Element* __restrict left, typename Pack<T>::Element* __restrict sums) {
  using P = Pack<T>;
  using Vec = typename P::Vec;
  using Element = typename P::Element;
  constexpr int kStep = P::kLanes * P::kPair;
  const T* from[P::kLanes];
  for (int j = 0; j < P::kLanes; j++) from[j] = right.at(column + (j < there ? j : there - 1), 0);
  // Short columns end before the processor's own prefetcher has understood them; the next ones are asked for meanwhile.
  const int64_t to_next = depth_k * int64_t(sizeof(T)) <= 4096 ? P::kLanes * right.line_stride : 0;
  Vec total[Rows];
  for (int i = 0; i < Rows; i++) total[i] = splat(Element(0));
  for (int64_t k = 0; k < depth_k; k += kBlock, left += Rows * P::kRowStride) {
    const int block = int(depth_k - k < kBlock ? depth_k - k : kBlock);
    Vec acc[Rows];
#pragma GCC unroll 8
    for (int i = 0; i < Rows; i++) acc[i] = splat(Element(0));
    int done = 0;
    for (; done + kStep <= block; done += kStep) {
      Vec v[P::kLanes];
#pragma GCC unroll 16
      for (int j = 0; j < P::kLanes; j++) {
        v[j] = load_along(from[j] + k + done);
        __builtin_prefetch(from[j] + to_next + k + done, 0, 2);
      }
      transpose(v);
#pragma GCC unroll 16
      for (int e = 0; e < P::kLanes; e++) {
#pragma GCC unroll 8
        for (int i = 0; i < Rows; i++) {
          acc[i] = step_of<T, by>(splat(left[i * P::kRowStride + done / P::kPair + e]), v[e], acc[i]);
        }
      }
    }
    if (done < block) {
      Vec v[P::kLanes];
      for (int j = 0; j < P::kLanes; j++) v[j] = load_along(from[j] + k + done, block - done);
      transpose(v);
      for (int e = 0; e < elements<T>(block - done); e++) {
#pragma GCC unroll 8
        for (int i = 0; i < Rows; i++) {
          acc[i] = step_of<T, by>(splat(left[i * P::kRowStride + done / P::kPair + e]), v[e], acc[i]);
        }
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < Rows; i++) total[i] = k == 0 ? acc[i] : sum_of<T>(total[i], acc[i]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < Rows; i++) store(sums + i * P::kLanes, total[i]);
}

// part (+)= the products of `Count` elements of k with `columns` columns that lie across k; from 0 where `first`.
template <class T, PairBy by, int Rows, int Count>
BICOMPILE_INLINE void add_elements(const Operand<T>& right, int64_t column, int64_t columns, int64_t k, bool odd,
                                   const typename Pack<T>::Element* __restrict left,
                                   typename Pack<T>::Element* __restrict part, bool first) {
  using P = Pack<T>;
  using Vec = typename P::Vec;
  const T* from = right.at(column, k);
  for (int64_t j = 0; j < columns; j += P::kLanes) {
    Vec acc[Rows];
#pragma GCC unroll 8
    for (int i = 0; i < Rows; i++) acc[i] = first ? splat(typename P::Element(0)) : load(part + i * columns + j);
#pragma GCC unroll 8
    for (int e = 0; e < Count; e++) {
      const Vec b = load_across(from + e * P::kPair * right.k_stride + j, right.k_stride, odd);
#pragma GCC unroll 8
      for (int i = 0; i < Rows; i++) acc[i] = step_of<T, by>(splat(left[i * P::kRowStride + e]), b, acc[i]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < Rows; i++) store(part + i * columns + j, acc[i]);
  }
}

// sums[i * columns + j] = row i of the packed left operand times column `column` + j, for columns that lie across k
// (line_stride 1).  `columns` is a multiple of kLanes.  The sums of a block are kept in `part`, in the first cache:
// holding them in registers instead would cut the rows into pieces too short for the prefetcher (half the speed).
template <class T, PairBy by, int Rows>
void stream_rows(const Operand<T>& right, int64_t column, int64_t columns, int64_t depth_k,
                 const typename Pack<T>::Element* __restrict left, typename Pack<T>::Element* __restrict part,
                 typename Pack<T>::Element* __restrict sums) {
  using P = Pack<T>;
  constexpr int kCount = 8, kStep = kCount * P::kPair;
  for (int64_t k = 0; k < depth_k; k += kBlock, left += Rows * P::kRowStride) {
    const int block = int(depth_k - k < kBlock ? depth_k - k : kBlock);
    auto* into = k == 0 ? sums : part;
    int done = 0;
    for (; done + kStep <= block; done += kStep) {
      const auto* from = left + done / P::kPair;
      add_elements<T, by, Rows, kCount>(right, column, columns, k + done, true, from, into, done == 0);
    }
    for (; done < block; done += P::kPair) {
      const bool odd = done + 1 < block;
      add_elements<T, by, Rows, 1>(right, column, columns, k + done, odd, left + done / P::kPair, into, done == 0);
    }
    if (k == 0) continue;
    for (int64_t j = 0; j < Rows * columns; j += P::kLanes) store(sums + j, sum_of<T>(load(sums + j), load(part + j)));
  }
}

template <class T>
using StreamColumns = void (*)(const Operand<T>&, int64_t, int, int64_t, const typename Pack<T>::Element*,
                               typename Pack<T>::Element*);
template <class T>
using StreamRows = void (*)(const Operand<T>&, int64_t, int64_t, int64_t, const typename Pack<T>::Element*,
                            typename Pack<T>::Element*, typename Pack<T>::Element*);

namespace detail {
template <class T, PairBy by, int... Rows>
StreamColumns<T> pick_stream_columns(int rows, std::integer_sequence<int, Rows...>) {
  static constexpr StreamColumns<T> kernels[] = {&stream_columns<T, by, Rows + 1>...};
  return kernels[rows - 1];
}
template <class T, PairBy by, int... Rows>
StreamRows<T> pick_stream_rows(int rows, std::integer_sequence<int, Rows...>) {
  static constexpr StreamRows<T> kernels[] = {&stream_rows<T, by, Rows + 1>...};
  return kernels[rows - 1];
}
}  // namespace detail

// The kernels for `rows` rows.
template <class T, PairBy by>
StreamColumns<T> stream_columns_kernel(int rows) {
  return detail::pick_stream_columns<T, by>(rows, std::make_integer_sequence<int, kStreamRows>());
}
template <class T, PairBy by>
StreamRows<T> stream_rows_kernel(int rows) {
  return detail::pick_stream_rows<T, by>(rows, std::make_integer_sequence<int, kStreamRows>());
}

}  // namespace bicompile::matmul
