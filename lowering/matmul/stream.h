// The inner loop for a few rows: columns that lie along k are read from their place, kLanes at a time over the whole
// of k, and transposed in registers.  One pass over the right operand in the order in which memory likes to be read.
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
      for (int j = 0; j < P::kLanes; j++) v[j] = load_along(from[j] + k + done);
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

template <class T>
using StreamKernel = void (*)(const Operand<T>&, int64_t, int, int64_t, const typename Pack<T>::Element*,
                              typename Pack<T>::Element*);

namespace detail {
template <class T, PairBy by, int... Rows>
StreamKernel<T> pick_stream(int rows, std::integer_sequence<int, Rows...>) {
  static constexpr StreamKernel<T> kernels[] = {&stream_columns<T, by, Rows + 1>...};
  return kernels[rows - 1];
}
}  // namespace detail

template <class T, PairBy by>
StreamKernel<T> stream_kernel(int rows) {
  return detail::pick_stream<T, by>(rows, std::make_integer_sequence<int, kStreamRows>());
}

}  // namespace bicompile::matmul
