// Runs a kernel that turns rows along one dim into rows of the same length: softmax and its kin.
#pragma once

#include <algorithm>

#include "layout.h"

namespace bicompile {

// Where a kernel writes element k of one row, or of 32 rows side by side; step is 1 or the distance between elements.
template <class Out, class S>
struct Writer {
  Out* p;
  int64_t step;
  BICOMPILE_INLINE void operator()(int64_t k, Block<S> value, int count) const {
    store_block(p + k * step, value, count);
  }
};

// Full-precision blocks that a kernel keeps between its passes, in scratch memory: one for each (k, count) of a walk.
template <class S>
struct Kept {
  S* p;
  int64_t step;  // 1 along a row, kBlock across rows
  BICOMPILE_INLINE void put(int64_t k, Block<S> value) const {
    for (int i = 0; i < Block<S>::kVecs; i++) store(p + k * step + i * Block<S>::Vec::kLanes, value.v[i]);
  }
  BICOMPILE_INLINE Block<S> get(int64_t k) const { return load_block<S>(p + k * step, kBlock); }
};

// A tensor seen as [outer, n, inner] around one dim, `outer` and `inner` in any strides.
struct Slices {
  int64_t outer = 1, n = 1, inner = 1;

  Slices(const Tensor& t, int64_t dim) {
    auto sizes = t.sizes();
    for (int64_t d = 0; d < int64_t(sizes.size()); d++) (d < dim ? outer : d == dim ? n : inner) *= sizes[d];
  }
  int64_t numel() const { return outer * n * inner; }
};

// The strides of one tensor around `dim`.
struct SliceStrides {
  Dims rows, row;  // all dims but `dim`; `dim`

  SliceStrides(const Tensor& t, int64_t dim) {
    auto sizes = t.sizes();
    auto strides = t.strides();
    for (int64_t d = 0; d < int64_t(sizes.size()); d++) (d == dim ? row : rows).add(sizes[d], strides[d]);
  }
};

constexpr int64_t kSliceTaskElements = 4096;

template <class T, size_t N, class Kernel>
void slices_along_rows(const Slices& shape, const std::array<const T*, N>& x, const std::array<SliceStrides, N>& at,
                       T* y, const Kernel& kernel) {
  using S = typename Compute<T>::Scalar;
  const int64_t n = shape.n, rows = shape.outer;
  const int64_t rows_per_task = std::max<int64_t>(1, kSliceTaskElements / n);
  parallel_tasks((rows + rows_per_task - 1) / rows_per_task, rows * n * Kernel::kCost, [&](int64_t task) {
    struct KeptBlocks;
    S* kept = scratch<KeptBlocks, S>(size_t(n + kBlock));
    const int64_t last = std::min(rows, (task + 1) * rows_per_task);
    for (int64_t row = task * rows_per_task; row < last; row++) {
      std::array<RowInput<T, S>, N> in;
      for (size_t i = 0; i < N; i++) in[i] = {x[i] + Walk(at[i].rows, row).offset};
      kernel(AlongRow{n}, in, Writer<T, S>{y + row * n, 1}, Kept<S>{kept, 1});
    }
  });
}

template <class T, size_t N, class Kernel>
void slices_across_rows(const Slices& shape, const std::array<const T*, N>& x, T* y, const Kernel& kernel) {
  using S = typename Compute<T>::Scalar;
  const int64_t blocks = (shape.inner + kBlock - 1) / kBlock;
  parallel_tasks(shape.outer * blocks, shape.numel() * Kernel::kCost, [&](int64_t task) {
    struct KeptBlocks;
    S* kept = scratch<KeptBlocks, S>(size_t(shape.n * kBlock));
    const int64_t column = task % blocks * kBlock;
    const int64_t at = task / blocks * shape.n * shape.inner + column;
    std::array<RowsInput<T, S>, N> in;
    for (size_t i = 0; i < N; i++) in[i] = {x[i] + at, shape.inner};
    const AcrossRows walk{shape.n, int(std::min<int64_t>(kBlock, shape.inner - column))};
    kernel(walk, in, Writer<T, S>{y + at, shape.inner}, Kept<S>{kept, kBlock});
  });
}

// Any strides and any mix of dtypes: each row is copied, computed and copied back.
template <class S, size_t N, class Kernel>
void slices_by_copy(const char* op, const Slices& shape, const std::array<Tensor, N>& x,
                    const std::array<SliceStrides, N>& at, const Output& y, const Kernel& kernel) {
  const int64_t n = shape.n, padded = (n + kBlock - 1) / kBlock * kBlock;
  std::array<const void*, N> data;
  std::array<ScalarType, N> dtypes;
  for (size_t i = 0; i < N; i++) data[i] = x[i].data_ptr(), dtypes[i] = x[i].scalar_type();
  parallel_tasks(shape.outer * shape.inner, shape.numel() * Kernel::kCost, [&](int64_t row) {
    struct CopiedRows;
    S* buffer = scratch<CopiedRows, S>(size_t(padded) * (N + 2));
    std::array<RowInput<S, S>, N> in;
    for (size_t i = 0; i < N; i++) {
      S* to = buffer + padded * int64_t(i);
      dispatch(op, dtypes[i], [&](auto t) {
        gather(static_cast<const decltype(t)*>(data[i]) + Walk(at[i].rows, row).offset, at[i].row, to);
      });
      in[i] = {to};
    }
    S* result = buffer + padded * int64_t(N);
    kernel(AlongRow{n}, in, Writer<S, S>{result, 1}, Kept<S>{result + padded, 1});
    const int64_t first = row / shape.inner * n * shape.inner + row % shape.inner;
    for (int64_t k = 0; k < n; k++) y.put(first + k * shape.inner, result[k]);
  });
}

// `kernel` over every row of the inputs along `dim`, into a new contiguous tensor of `dtype`.  All inputs have one
// shape.  Computes in float64 if `in_double`, else in float32.
template <size_t N, class Kernel>
Tensor map_slices(const char* op, const std::array<Tensor, N>& x, int64_t dim, ScalarType dtype, bool in_double,
                  const Kernel& kernel) {
  Tensor result = new_tensor(sizes_of(x[0]), dtype);
  const Slices shape(x[0], dim);
  if (shape.numel() == 0) return result;
  bool same_dtype = true, dense_rows = shape.inner == 1, contiguous = true;
  const auto at = [&]<size_t... I>(std::index_sequence<I...>) {
    return std::array<SliceStrides, N>{SliceStrides(x[I], dim)...};
  }(std::make_index_sequence<N>());
  for (size_t i = 0; i < N; i++) {
    same_dtype &= x[i].scalar_type() == dtype && computes_in_double(dtype) == in_double;
    dense_rows &= at[i].row.is_dense();
    contiguous &= x[i].is_contiguous();
  }
  if (same_dtype && (dense_rows || contiguous)) {
    dispatch(op, dtype, [&](auto t) {
      using T = decltype(t);
      std::array<const T*, N> data;
      for (size_t i = 0; i < N; i++) data[i] = static_cast<const T*>(x[i].data_ptr());
      T* y = static_cast<T*>(result.data_ptr());
      if (dense_rows) return slices_along_rows(shape, data, at, y, kernel);
      slices_across_rows(shape, data, y, kernel);
    });
  } else if (in_double) {
    slices_by_copy<double>(op, shape, x, at, Output(result), kernel);
  } else {
    slices_by_copy<float>(op, shape, x, at, Output(result), kernel);
  }
  return result;
}

}  // namespace bicompile
