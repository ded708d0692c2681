// Scatters on the CPU.  A task owns whole destinations, never contributions: no atomics, and nothing to see of who
// ran what.  Two kernels: add_rows for slices that share one index, scatter_columns for an index of its own for each
// element.  Both take a destination's contributions in ascending order of their position in the source.

#include <algorithm>

#include "tensor.h"

namespace bicompile {
namespace {

// The indices as int64 side by side, every one checked to lie in [0, count).
Tensor checked_indices(const char* op, const Tensor& given, int64_t count) {
  ScalarType dtype = given.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Long || dtype == ScalarType::Int, "bicompile::", op,
                  ": expected int64 or int32 indices; convert them with .long()");
  Tensor wide = dtype == ScalarType::Long ? given : torch::stable::to(given, ScalarType::Long);
  Tensor index = torch::stable::contiguous(wide);
  const int64_t* at = static_cast<const int64_t*>(index.data_ptr());
  int64_t least = 0, most = -1;
  for (int64_t i = 0, n = index.numel(); i < n; i++) {
    least = std::min(least, at[i]);
    most = std::max(most, at[i]);
  }
  STD_TORCH_CHECK(least >= 0 && most < count, "bicompile::", op, ": expected indices in [0, ", count, "), got ",
                  least < 0 ? least : most);
  return index;
}

int64_t checked_dim(const char* op, const Tensor& self, int64_t dim) {
  int64_t rank = std::max<int64_t>(self.dim(), 1);
  STD_TORCH_CHECK(dim >= -rank && dim < rank, "bicompile::", op, ": expected a dim in [", -rank, ", ", rank, "), got ",
                  dim);
  return dim < 0 ? dim + rank : dim;
}

void check_same_dtype(const char* op, const Tensor& self, const Tensor& source) {
  STD_TORCH_CHECK(self.scalar_type() == source.scalar_type(), "bicompile::", op, ": expected a source of dtype ",
                  name_of(self.scalar_type()), " as self, got ", name_of(source.scalar_type()));
}

// Applies f to vectors of `from`, the last one partial, and rounds the results into `to`.
template <class T, class F>
void map(const T* from, T* to, int64_t count, const F& f) {
  constexpr int64_t kShare = 1 << 15;
  constexpr int kLanes = Compute<T>::Vec::kLanes;
  parallel_tasks((count + kShare - 1) / kShare, count, [&](int64_t task) {
    int64_t i = task * kShare, end = std::min(count, i + kShare);
    for (; i + kLanes <= end; i += kLanes) store_as(to + i, f(load(from + i)));
    if (i < end) store_as(to + i, f(load_first(from + i, int(end - i), typename Compute<T>::Scalar(0))), int(end - i));
  });
}

// ---------------------------------------------------------------------------------------------------------------
// Slices that share one index.

// The positions that go to destination d, ascending: position[start[d]] to position[start[d + 1]].
struct Segments {
  std::vector<int64_t> start, position;

  Segments(const Tensor& index, int64_t destinations, int64_t skipped) : start(destinations + 2) {
    const int64_t* at = static_cast<const int64_t*>(index.data_ptr());
    int64_t n = index.numel();
    for (int64_t i = 0; i < n; i++) start[at[i] + 2] += at[i] != skipped;
    for (int64_t d = 0; d < destinations; d++) start[d + 2] += start[d + 1];
    position.resize(start.back());
    for (int64_t i = 0; i < n; i++)
      if (at[i] != skipped) position[start[at[i] + 1]++] = i;
  }
};

struct Slices {
  int64_t outer, destinations, contributions, width;
  bool divide;  // the sum by the number of its contributions
};

// The contributions to one destination, and where its row begins in each tensor; self may be null, for zeros.
template <class T>
struct Destination {
  const T* self;
  const T* values;
  T* out;
  const int64_t *first, *last;
  int64_t width;
};

// kVecs vectors of columns, from column c on.
template <int kVecs, class T>
void add_vectors(const Destination<T>& d, int64_t c, bool divide) {
  using Vec = typename Compute<T>::Vec;
  using S = typename Compute<T>::Scalar;
  Vec sum[kVecs];
  for (int v = 0; v < kVecs; v++) sum[v] = d.self ? load(d.self + c + v * Vec::kLanes) : splat(S(0));
  for (const int64_t* p = d.first; p < d.last; p++)
    for (int v = 0; v < kVecs; v++) sum[v] = sum[v] + load(d.values + *p * d.width + c + v * Vec::kLanes);
  for (int v = 0; v < kVecs; v++) {
    if (divide) sum[v] = sum[v] / splat(S(d.last - d.first));
    store_as(d.out + c + v * Vec::kLanes, sum[v]);
  }
}

template <class T>
void add_one(const Destination<T>& d, int64_t c, bool divide) {
  using S = typename Compute<T>::Scalar;
  S sum = d.self ? widen(d.self[c]) : S(0);
  for (const int64_t* p = d.first; p < d.last; p++) sum += widen(d.values[*p * d.width + c]);
  d.out[c] = narrow<T>(divide ? sum / S(d.last - d.first) : sum);
}

// out[o, d, :] = self[o, d, :] + the values[o, p, :] of d's positions p; all contiguous.
template <class T>
void add_rows(const T* self, const T* values, T* out, const Slices& s, const Segments& segments) {
  constexpr int kLanes = Compute<T>::Vec::kLanes, kVecs = 4;
  constexpr int64_t kColumns = 512, kTask = 1 << 15;
  const int64_t* start = segments.start.data();
  int64_t total = int64_t(segments.position.size()) + s.destinations;  // rows to read, about
  int64_t blocks = (s.width + kColumns - 1) / kColumns;
  int64_t ranges = std::clamp<int64_t>(total * std::min(s.width, kColumns) / kTask, 1, 256);
  // The first destination of a range: destinations are shared out by the rows to read up to there.
  auto bound = [&](int64_t range) {
    int64_t low = 0, high = s.destinations;
    while (low < high) {
      int64_t middle = (low + high) / 2;
      if ((start[middle] + middle) * ranges < range * total) low = middle + 1;
      else high = middle;
    }
    return range == ranges ? s.destinations : low;
  };
  parallel_tasks(s.outer * ranges * blocks, s.outer * total * s.width, [&](int64_t task) {
    int64_t o = task / (ranges * blocks), range = task / blocks % ranges, begin = task % blocks * kColumns;
    int64_t end = std::min(s.width, begin + kColumns);
    for (int64_t i = bound(range), stop = bound(range + 1); i < stop; i++) {
      int64_t row = (o * s.destinations + i) * s.width;
      const int64_t* position = segments.position.data();
      Destination<T> d{self ? self + row : nullptr, values + o * s.contributions * s.width, out + row,
                       position + start[i], position + start[i + 1], s.width};
      bool divide = s.divide && d.first < d.last;
      int64_t c = begin;
      for (; c + kVecs * kLanes <= end; c += kVecs * kLanes) add_vectors<kVecs>(d, c, divide);
      for (; c + kLanes <= end; c += kLanes) add_vectors<1>(d, c, divide);
      for (; c < end; c++) add_one(d, c, divide);
    }
  });
}

Tensor add_slices(const char* op, const std::optional<Tensor>& self, const Tensor& values, const Tensor& index,
                  const std::vector<int64_t>& sizes, const Slices& slices, int64_t skipped = -1) {
  Tensor out = new_tensor(sizes, values.scalar_type());
  Segments segments(index, slices.destinations, skipped);
  Tensor from = torch::stable::contiguous(values);
  std::optional<Tensor> initial;
  if (self) initial = torch::stable::contiguous(*self);
  dispatch(op, values.scalar_type(), [&](auto element) {
    using T = decltype(element);
    if (out.numel() == 0) return;
    add_rows(initial ? static_cast<const T*>(initial->data_ptr()) : nullptr, static_cast<const T*>(from.data_ptr()),
             static_cast<T*>(out.data_ptr()), slices, segments);
  });
  return out;
}

// self seen as [outer, destinations, width] around `dim`, with n contributions to each slice.
Slices slices_around(const Tensor& self, int64_t dim, int64_t n) {
  Slices s{1, 1, n, 1, false};
  for (int64_t d = 0; d < self.dim(); d++) (d < dim ? s.outer : d > dim ? s.width : s.destinations) *= self.size(d);
  return s;
}

Tensor times(const char* op, const Tensor& source, double alpha) {
  Tensor from = torch::stable::contiguous(source), out = new_tensor(sizes_of(source), source.scalar_type());
  dispatch(op, source.scalar_type(), [&](auto element) {
    using T = decltype(element);
    auto factor = splat(typename Compute<T>::Scalar(alpha));
    map(static_cast<const T*>(from.data_ptr()), static_cast<T*>(out.data_ptr()), out.numel(),
        [=](auto x) { return x * factor; });
  });
  return out;
}

Tensor index_add(Tensor self, int64_t dim, Tensor index, Tensor source, double alpha) {
  const char* op = "index_add";
  dim = checked_dim(op, self, dim);
  check_same_dtype(op, self, source);
  STD_TORCH_CHECK(index.dim() <= 1, "bicompile::index_add: expected a 1-D index, got ", index.dim(), " dims");
  STD_TORCH_CHECK(self.dim() == source.dim(), "bicompile::index_add: expected a source of ", self.dim(),
                  " dims as self, got ", source.dim());
  for (int64_t d = 0; d < self.dim(); d++) {
    int64_t wanted = d == dim ? index.numel() : self.size(d);
    STD_TORCH_CHECK(source.size(d) == wanted, "bicompile::index_add: expected size ", wanted, " in dim ", d,
                    " of source, got ", source.size(d));
  }
  STD_TORCH_CHECK(self.dim() > 0 || index.numel() == 1, "bicompile::index_add: expected one index for a 0-d self, got ",
                  index.numel());
  Slices slices = slices_around(self, dim, index.numel());
  Tensor at = checked_indices(op, index, slices.destinations);
  return add_slices(op, self, alpha == 1 ? source : times(op, source, alpha), at, sizes_of(self), slices);
}

// The core of index_put_accumulate: self [outer, m, width] += values [outer, n, width] at index [n].
Tensor segment_add(Tensor self, Tensor index, Tensor values) {
  const char* op = "segment_add";
  check_same_dtype(op, self, values);
  STD_TORCH_CHECK(self.dim() == 3 && values.dim() == 3 && index.dim() == 1 && values.size(0) == self.size(0) &&
                      values.size(1) == index.size(0) && values.size(2) == self.size(2),
                  "bicompile::segment_add: expected self [outer, m, width], index [n] and values [outer, n, width]");
  Tensor at = checked_indices(op, index, self.size(1));
  return add_slices(op, self, values, at, sizes_of(self), slices_around(self, 1, index.numel()));
}

Tensor embedding_dense_backward(Tensor grad, Tensor indices, int64_t num_weights, int64_t padding_idx,
                                bool scale_grad_by_freq) {
  const char* op = "embedding_dense_backward";
  int64_t rank = indices.dim();
  bool fits = grad.dim() == rank + 1;
  for (int64_t d = 0; fits && d < rank; d++) fits = grad.size(d) == indices.size(d);
  STD_TORCH_CHECK(fits,
                  "bicompile::embedding_dense_backward: expected a grad of the shape of indices and one dim more");
  STD_TORCH_CHECK(num_weights >= 0, "bicompile::embedding_dense_backward: expected num_weights >= 0, got ",
                  num_weights);
  Tensor at = checked_indices(op, indices, num_weights);
  Slices slices{1, num_weights, indices.numel(), grad.size(rank), scale_grad_by_freq};
  return add_slices(op, std::nullopt, grad, at, {num_weights, slices.width}, slices, padding_idx);
}

// ---------------------------------------------------------------------------------------------------------------
// An index of its own for each element.

struct Add {
  static constexpr double kStart = 0;
  template <class S>
  static S step(S a, S b) { return a + b; }
};
struct Multiply {
  static constexpr double kStart = 1;
  template <class S>
  static S step(S a, S b) { return a * b; }
};
struct Max {
  static constexpr double kStart = -std::numeric_limits<double>::infinity();
  template <class S>
  static S step(S a, S b) { return max_of(ScalarVec<S, 1>{{a}}, ScalarVec<S, 1>{{b}}).v[0]; }
};
struct Min {
  static constexpr double kStart = std::numeric_limits<double>::infinity();
  template <class S>
  static S step(S a, S b) { return min_of(ScalarVec<S, 1>{{a}}, ScalarVec<S, 1>{{b}}).v[0]; }
};

// The columns of an index along `dim`, numbered in the order of its other dims, and their steps in each tensor.
struct Columns {
  int64_t count = 1, length = 1, inner = 1;
  int64_t src_step = 0, index_step = 0, out_step = 0;
  std::vector<int64_t> sizes, src_strides, index_strides, out_strides;

  Columns(const Tensor& index, const Tensor& src, const Tensor& out, int64_t dim) {
    for (int64_t d = 0; d < index.dim(); d++) {
      if (d == dim) {
        length = index.size(d);
        src_step = src.stride(d), index_step = index.stride(d), out_step = out.stride(d);
        continue;
      }
      count *= index.size(d);
      if (d > dim) inner *= index.size(d);
      sizes.push_back(index.size(d));
      src_strides.push_back(src.stride(d)), index_strides.push_back(index.stride(d));
      out_strides.push_back(out.stride(d));
    }
  }
  int64_t start(int64_t column, const std::vector<int64_t>& strides) const {
    int64_t offset = 0;
    for (size_t d = sizes.size(); d-- > 0; column /= sizes[d]) offset += column % sizes[d] * strides[d];
    return offset;
  }
};

struct RunningTag;
struct CountTag;

struct Reduction {
  int64_t destinations;
  bool include_self, mean;
};

// kColumns columns from `begin` on.  Running values lie in out itself where it has the precision, else in scratch
// memory: for all destinations if there are more contributions than that, else for those that the index names.
template <class Op, int kColumns, class T>
void scatter_columns(const T* src, const int64_t* index, T* out, const Columns& c, const Reduction& reduction,
                     int64_t begin) {
  using S = typename Compute<T>::Scalar;
  const T* from[kColumns];
  const int64_t* at[kColumns];
  T* to[kColumns];
  for (int i = 0; i < kColumns; i++) {
    from[i] = src + c.start(begin + i, c.src_strides);
    at[i] = index + c.start(begin + i, c.index_strides);
    to[i] = out + c.start(begin + i, c.out_strides);
  }
  // f(column, position, destination), a column's positions ascending.
  auto each = [&](const auto& f) {
    for (int64_t k = 0; k < c.length; k++)
#pragma GCC unroll 1  // unrolled, twenty instances take long to compile and gain nothing
      for (int i = 0; i < kColumns; i++) f(i, k, at[i][k * c.index_step]);
  };
  if constexpr (std::is_same_v<T, S>) {
    if (!reduction.mean) {
      if (!reduction.include_self) each([&](int i, int64_t, int64_t d) { to[i][d * c.out_step] = S(Op::kStart); });
      bool nan = false;
      each([&](int i, int64_t k, int64_t d) {
        S& running = to[i][d * c.out_step];
        running = Op::step(running, from[i][k * c.src_step]);
        nan |= running != running;
      });
      if (nan) each([&](int i, int64_t, int64_t d) { to[i][d * c.out_step] = canonical(to[i][d * c.out_step]); });
      return;
    }
  }
  S* running = scratch<RunningTag, S>(reduction.destinations * kColumns);
  int64_t* count = reduction.mean ? scratch<CountTag, int64_t>(reduction.destinations * kColumns) : nullptr;
  bool dense = reduction.include_self && c.length >= reduction.destinations;
  auto each_destination = [&](const auto& f) {
    if (!dense) return each([&](int i, int64_t, int64_t d) { f(i, d); });
    for (int64_t d = 0; d < reduction.destinations; d++)
#pragma GCC unroll 1
      for (int i = 0; i < kColumns; i++) f(i, d);
  };
  each_destination([&](int i, int64_t d) {
    running[d * kColumns + i] = reduction.include_self ? widen(to[i][d * c.out_step]) : S(Op::kStart);
    if (count) count[d * kColumns + i] = reduction.include_self;
  });
  if (count) {
    each([&](int i, int64_t k, int64_t d) {
      running[d * kColumns + i] = Op::step(running[d * kColumns + i], widen(from[i][k * c.src_step]));
      count[d * kColumns + i]++;
    });
  } else {
    each([&](int i, int64_t k, int64_t d) {
      running[d * kColumns + i] = Op::step(running[d * kColumns + i], widen(from[i][k * c.src_step]));
    });
  }
  each_destination([&](int i, int64_t d) {
    S result = running[d * kColumns + i];
    to[i][d * c.out_step] = narrow<T>(count ? result / S(count[d * kColumns + i]) : result);
  });
}

// The first elements of t in every dim, as many as `like` has.
Tensor cut(Tensor t, const Tensor& like) {
  for (int64_t d = 0; d < t.dim(); d++)
    if (t.size(d) != like.size(d)) t = torch::stable::narrow(t, d, 0, like.size(d));
  return t;
}

template <class Op>
Tensor scatter(const char* op, const Tensor& self, int64_t dim, const Tensor& given, const Tensor& src,
               bool include_self, bool mean) {
  dim = checked_dim(op, self, dim);
  check_same_dtype(op, self, src);
  bool nothing = given.numel() == 0;
  STD_TORCH_CHECK(nothing || (given.dim() == self.dim() && src.dim() == self.dim()), "bicompile::", op,
                  ": expected index and src of ", self.dim(), " dims as self, got ", given.dim(), " and ", src.dim());
  bool shared = self.dim() > 1 && !nothing;  // one index for whole slices: scatter_add of an expanded index
  for (int64_t d = 0; !nothing && d < self.dim(); d++) {
    STD_TORCH_CHECK(given.size(d) <= src.size(d) && (d == dim || given.size(d) <= self.size(d)), "bicompile::", op,
                    ": expected an index no larger than src and, but for dim ", dim, ", self; got size ", given.size(d),
                    " in dim ", d);
    shared = shared && (d == dim || (given.size(d) == self.size(d) && (given.stride(d) == 0 || given.size(d) == 1)));
  }
  if (shared && include_self && !mean && std::is_same_v<Op, Add>) {
    Tensor one = given;
    for (int64_t d = 0; d < self.dim(); d++)
      if (d != dim) one = torch::stable::narrow(one, d, 0, 1);
    Slices slices = slices_around(self, dim, given.size(dim));
    return add_slices(op, self, cut(src, given), checked_indices(op, one, slices.destinations), sizes_of(self), slices);
  }
  int64_t destinations = self.dim() ? self.size(dim) : 1;
  Tensor index = checked_indices(op, given, destinations);
  Tensor initial = torch::stable::contiguous(self), out = new_tensor(sizes_of(self), self.scalar_type());
  dispatch(op, self.scalar_type(), [&](auto element) {
    using T = decltype(element);
    T* to = static_cast<T*>(out.data_ptr());
    map(static_cast<const T*>(initial.data_ptr()), to, out.numel(), [](auto x) { return x; });
    if (nothing) return;
    const T* from = static_cast<const T*>(src.data_ptr());
    const int64_t* at = static_cast<const int64_t*>(index.data_ptr());
    Columns columns(index, src, out, dim);
    Reduction reduction{destinations, include_self, mean};
    constexpr int kSide = 16;  // columns side by side share cache lines
    int64_t share = std::max<int64_t>(kSide, 4096 / columns.length / kSide * kSide);
    if (columns.inner == 1 && columns.count < 8 * share) share = 1;
    int64_t tasks = (columns.count + share - 1) / share;
    parallel_tasks(tasks, columns.count * columns.length * 4, [&](int64_t task) {
      int64_t c = task * share, end = std::min(columns.count, c + share);
      if constexpr (std::is_same_v<Op, Add>) {  // the others are too seldom called to be compiled twice
        for (; columns.inner > 1 && c + kSide <= end; c += kSide)
          scatter_columns<Op, kSide>(from, at, to, columns, reduction, c);
      }
      for (; c < end; c++) scatter_columns<Op, 1>(from, at, to, columns, reduction, c);
    });
  });
  return out;
}

Tensor scatter_add(Tensor self, int64_t dim, Tensor index, Tensor src) {
  return scatter<Add>("scatter_add", self, dim, index, src, true, false);
}

Tensor scatter_reduce(Tensor self, int64_t dim, Tensor index, Tensor src, std::string reduce, bool include_self) {
  const char* op = "scatter_reduce";
  if (reduce == "sum") return scatter<Add>(op, self, dim, index, src, include_self, false);
  if (reduce == "mean") return scatter<Add>(op, self, dim, index, src, include_self, true);
  if (reduce == "prod") return scatter<Multiply>(op, self, dim, index, src, include_self, false);
  if (reduce == "amax") return scatter<Max>(op, self, dim, index, src, include_self, false);
  STD_TORCH_CHECK(reduce == "amin",
                  "bicompile::scatter_reduce: expected reduce to be sum, prod, mean, amax or amin, got ", reduce);
  return scatter<Min>(op, self, dim, index, src, include_self, false);
}

}  // namespace
}  // namespace bicompile

STABLE_TORCH_LIBRARY_IMPL(bicompile, CPU, m) {
  m.impl("index_add", TORCH_BOX(&bicompile::index_add));
  m.impl("segment_add", TORCH_BOX(&bicompile::segment_add));
  m.impl("scatter_add", TORCH_BOX(&bicompile::scatter_add));
  m.impl("scatter_reduce", TORCH_BOX(&bicompile::scatter_reduce));
  m.impl("embedding_dense_backward", TORCH_BOX(&bicompile::embedding_dense_backward));
}
