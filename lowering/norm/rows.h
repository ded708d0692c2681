// Rows of one or more tensors, handed to a kernel as densely packed numbers.
#pragma once

#include <algorithm>
#include <optional>

#include "../reduction/any.h"
#include "../reduction/programs.h"
#include "../reduction/slices.h"

namespace bicompile {

// Where the rows of a tensor lie: one row of `row` for each element of `rows`.
struct RowDims {
  Dims rows, row;
};

// Rows of the dims from `first` on.
inline RowDims trailing_rows(const Tensor& x, int64_t first) {
  RowDims at;
  auto sizes = x.sizes();
  auto strides = x.strides();
  for (int64_t d = 0; d < int64_t(sizes.size()); d++) (d < first ? at.rows : at.row).add(sizes[d], strides[d]);
  return at;
}

// Rows of x: [N, C, ...] that hold one of `groups` groups of channels each.
inline RowDims group_rows(const Tensor& x, int64_t groups) {
  RowDims at;
  auto sizes = x.sizes();
  auto strides = x.strides();
  const int64_t channels = sizes[1] / groups;
  at.rows.add(sizes[0], strides[0]);
  at.rows.add(groups, channels * strides[1]);
  at.row.add(channels, strides[1]);
  for (int64_t d = 2; d < int64_t(sizes.size()); d++) at.row.add(sizes[d], strides[d]);
  return at;
}

// t itself if its elements are densely packed in row-major order, else a copy that is.
inline Tensor dense(const Tensor& t) {
  if (t.is_contiguous()) return t;
  Tensor copy = new_tensor(sizes_of(t), t.scalar_type());
  const RowDims at = trailing_rows(t, 0);
  auto copy_as = [&](auto element) {
    using T = decltype(element);
    T* to = static_cast<T*>(copy.data_ptr());
    const T* from = static_cast<const T*>(t.data_ptr());
    Walk walk(at.row, 0);
    for (int64_t i = 0; i < at.row.numel; i++, walk.next()) to[i] = from[walk.offset];
  };
  dispatch("norm", t.scalar_type(), copy_as);
  return copy;
}
inline std::optional<Tensor> dense(const std::optional<Tensor>& t) {
  if (!t) return t;
  return dense(*t);
}

// The elements of a small tensor in row-major order, exactly.
inline std::vector<double> numbers_of(const Tensor& t) {
  std::vector<double> numbers(size_t(t.numel()));
  const RowDims at = trailing_rows(t, 0);
  dispatch("norm", t.scalar_type(), [&](auto element) {
    gather(static_cast<const decltype(element)*>(t.data_ptr()), at.row, numbers.data());
  });
  return numbers;
}
inline std::vector<double> numbers_of(const std::optional<Tensor>& t) {
  return t ? numbers_of(*t) : std::vector<double>();
}

// f(float()) or f(double()): the type that numbers of `dtype` are computed in.
template <class F>
void in_compute_type(ScalarType dtype, const F& f) {
  if (computes_in_double(dtype)) return f(double());
  f(float());
}

// f(S(), row, inputs) for every row of the tensors, whose rows are equally many and long.  S is what the last tensor's
// dtype computes in; inputs[i](k, count) reads elements of the i-th tensor's row.  `cost`: operations an element.
template <size_t N, class F>
void for_each_row(const char* op, const std::array<Tensor, N>& x, const std::array<RowDims, N>& at, int64_t cost,
                  const F& f) {
  const int64_t rows = at[N - 1].rows.numel, n = at[N - 1].row.numel;
  if (rows == 0) return;
  const ScalarType dtype = x[N - 1].scalar_type();
  const int64_t rows_per_task = std::max<int64_t>(1, kSliceTaskElements / std::max<int64_t>(n, 1));
  auto run = [&](const auto& one_row) {
    parallel_tasks((rows + rows_per_task - 1) / rows_per_task, rows * n * cost, [&](int64_t task) {
      const int64_t last = std::min(rows, (task + 1) * rows_per_task);
      for (int64_t row = task * rows_per_task; row < last; row++) one_row(row);
    });
  };
  std::array<const void*, N> data;
  std::array<ScalarType, N> dtypes;
  bool direct = true;
  for (size_t i = 0; i < N; i++) {
    data[i] = x[i].data_ptr();
    dtypes[i] = x[i].scalar_type();
    direct &= dtypes[i] == dtype && at[i].row.is_dense();
  }
  if (direct) {
    dispatch(op, dtype, [&](auto t) {
      using T = decltype(t);
      using S = typename Compute<T>::Scalar;
      run([&](int64_t row) {
        std::array<RowInput<T, S>, N> in;
        for (size_t i = 0; i < N; i++) in[i] = {static_cast<const T*>(data[i]) + Walk(at[i].rows, row).offset};
        f(S(), row, in);
      });
    });
    return;
  }
  in_compute_type(dtype, [&]<class S>(S) {
    run([&](int64_t row) {
      struct CopiedRow;
      S* buffer = scratch<CopiedRow, S>(size_t(n) * N);
      std::array<RowInput<S, S>, N> in;
      for (size_t i = 0; i < N; i++) {
        in[i] = {buffer + n * int64_t(i)};
        dispatch(op, dtypes[i], [&](auto t) {
          const auto* from = static_cast<const decltype(t)*>(data[i]) + Walk(at[i].rows, row).offset;
          gather(from, at[i].row, buffer + n * int64_t(i));
        });
      }
      f(S(), row, in);
    });
  });
}

}  // namespace bicompile
