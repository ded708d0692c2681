// Scans on the CPU.  Lanes are rows: every row has one running value, which goes from its first element to its last.
// A vector therefore holds as many rows, and no row knows of its neighbours.

#include <algorithm>

#include "elementwise/math.h"
#include "tensor.h"

namespace bicompile {
namespace {

// The vector of running values: twice the precision of float, float for the half precisions (order.py).
template <class T>
using Running = std::conditional_t<(sizeof(T) >= 4), VecD, VecF>;
template <class T>
using RunningScalar = std::conditional_t<(sizeof(T) >= 4), double, float>;

template <class T>
BICOMPILE_INLINE Running<T> load_running(const T* p) {
  if constexpr (std::is_same_v<T, float>) {
    double lanes[VecD::kLanes];
    for (int i = 0; i < VecD::kLanes; i++) lanes[i] = p[i];
    return load(lanes);
  } else {
    return load(p);
  }
}

template <class T>
BICOMPILE_INLINE T round_to(RunningScalar<T> x) {
  if constexpr (std::is_same_v<T, float>) return canonical(float(x));
  else return narrow<T>(x);
}

template <class T>
BICOMPILE_INLINE void store_rounded(T* p, Running<T> a) {
  if constexpr (std::is_same_v<T, float>) {
    double lanes[VecD::kLanes];
    store(lanes, a);
    for (int i = 0; i < VecD::kLanes; i++) p[i] = canonical(float(lanes[i]));
  } else {
    store_as(p, a);
  }
}

struct Sum {
  static constexpr double kStart = 0;
  static constexpr bool kArithmetic = true;  // one instruction: plain numbers are as good as vectors
  template <class V>
  static BICOMPILE_INLINE V step(V running, V x) { return running + x; }
};

struct Product {
  static constexpr double kStart = 1;
  static constexpr bool kArithmetic = true;
  template <class V>
  static BICOMPILE_INLINE V step(V running, V x) { return running * x; }
};

// log(1 + x) for x in [0, 1]: what 1 + x loses is put back.
template <class V>
BICOMPILE_INLINE V log_one_plus(V x) {
  V one = splat_as<V>(1), sum = one + x;
  return math::log(sum) + (x - (sum - one)) / sum;
}

struct LogSumExp {
  static constexpr double kStart = -std::numeric_limits<double>::infinity();
  static constexpr bool kArithmetic = false;
  template <class V>
  static BICOMPILE_INLINE V step(V running, V x) {
    V high = max_of(running, x), low = min_of(running, x);
    V infinity = splat_as<V>(std::numeric_limits<Lane<V>>::infinity());
    return where_equal(abs(high), infinity, high, high + log_one_plus(math::exp(low - high)));
  }
};

// A tensor seen as rows along one dim, numbered in the order of the other dims.
struct Rows {
  int64_t count = 1, length = 1, inner = 1, step = 1;  // step: from one element of a row to the next in x
  std::vector<int64_t> sizes, strides;                 // of the other dims

  Rows(const Tensor& x, int64_t dim) {
    for (int64_t d = 0; d < x.dim(); d++) {
      if (d == dim) {
        length = x.size(d);
        step = x.stride(d);
        continue;
      }
      count *= x.size(d);
      if (d > dim) inner *= x.size(d);
      sizes.push_back(x.size(d));
      strides.push_back(x.stride(d));
    }
  }
  int64_t start_in_x(int64_t row) const {
    int64_t offset = 0;
    for (size_t d = sizes.size(); d-- > 0; row /= sizes[d]) offset += row % sizes[d] * strides[d];
    return offset;
  }
  int64_t start_in_out(int64_t row) const { return row / inner * length * inner + row % inner; }
};

// kVecs vectors of rows that lie side by side in x and out.
template <class Op, int kVecs, class T>
void scan_adjacent(const T* x, T* out, const Rows& rows) {
  constexpr int kLanes = Running<T>::kLanes;
  Running<T> running[kVecs];
  for (auto& r : running) r = splat(RunningScalar<T>(Op::kStart));
  for (int64_t i = 0; i < rows.length; i++, x += rows.step, out += rows.inner) {
    for (int v = 0; v < kVecs; v++) {
      running[v] = Op::step(running[v], load_running(x + v * kLanes));
      store_rounded(out + v * kLanes, running[v]);
    }
  }
}

// At most four rows anywhere, one number at a time, interleaved because each waits for its own last step.
template <class Op, class T>
void scan_few(const T* x, const int64_t* in, T* out, const int64_t* to, int n, const Rows& rows) {
  using S = RunningScalar<T>;
  auto run = [&](auto width) {
    S running[width];
    for (S& r : running) r = S(Op::kStart);
    for (int64_t i = 0; i < rows.length; i++) {
      for (int row = 0; row < width; row++) {
        running[row] = Op::step(running[row], S(widen(x[in[row] + i * rows.step])));
        out[to[row] + i * rows.inner] = round_to<T>(running[row]);
      }
    }
  };
  switch (n) {
    case 1: return run(std::integral_constant<int, 1>());
    case 2: return run(std::integral_constant<int, 2>());
    case 3: return run(std::integral_constant<int, 3>());
    default: return run(std::integral_constant<int, 4>());
  }
}

// At most a vector of rows anywhere; lanes without a row repeat the start value and are dropped.
template <class Op, class T>
void scan_gathered(const T* x, const int64_t* in, T* out, const int64_t* to, int n, const Rows& rows) {
  constexpr int kLanes = Running<T>::kLanes;
  using S = RunningScalar<T>;
  S lanes[kLanes];
  std::fill(lanes, lanes + kLanes, S(0));
  Running<T> running = splat(S(Op::kStart));
  for (int64_t i = 0; i < rows.length; i++) {
    for (int row = 0; row < n; row++) lanes[row] = widen(x[in[row] + i * rows.step]);
    running = Op::step(running, load(lanes));
    S results[kLanes];
    store(results, running);
    for (int row = 0; row < n; row++) out[to[row] + i * rows.inner] = round_to<T>(results[row]);
  }
}

// Rows [begin, end), by the fastest way that their places in memory allow.
template <class Op, class T>
void scan_rows(const T* x, T* out, int64_t begin, int64_t end, const Rows& rows) {
  constexpr int kLanes = Running<T>::kLanes, kVecs = Op::kArithmetic ? 4 : 1, kMost = kLanes * kVecs;
  while (begin < end) {
    int64_t in[kMost], to[kMost];
    int n = int(std::min<int64_t>(kMost, end - begin)), adjacent = 0;
    for (int row = 0; row < n; row++) {
      in[row] = rows.start_in_x(begin + row);
      to[row] = rows.start_in_out(begin + row);
      adjacent += adjacent == row && in[row] == in[0] + row && to[row] == to[0] + row;
    }
    if (adjacent == kMost) {
      scan_adjacent<Op, kVecs>(x + in[0], out + to[0], rows);
    } else if (adjacent >= kLanes) {
      scan_adjacent<Op, 1>(x + in[0], out + to[0], rows);
      n = kLanes;
    } else if constexpr (Op::kArithmetic) {
      n = std::min(n, 4);
      scan_few<Op>(x, in, out, to, n, rows);
    } else {
      n = std::min(n, kLanes);
      scan_gathered<Op>(x, in, out, to, n, rows);
    }
    begin += n;
  }
}

template <class Op>
Tensor scan(const char* op, const Tensor& given, int64_t dim, ScalarType dtype) {
  int64_t rank = std::max<int64_t>(given.dim(), 1);
  STD_TORCH_CHECK(dim >= -rank && dim < rank, "bicompile::", op, ": expected a dim in [", -rank, ", ", rank, "), got ",
                  dim);
  Tensor x = given.scalar_type() == dtype ? given : torch::stable::to(given, dtype);
  Tensor out = new_tensor(sizes_of(x), dtype);
  Rows rows(x, dim < 0 ? dim + rank : dim);
  dispatch(op, dtype, [&](auto element) {
    using T = decltype(element);
    if (rows.count == 0 || rows.length == 0) return;
    const T* from = static_cast<const T*>(x.data_ptr());
    T* to = static_cast<T*>(out.data_ptr());
    // Enough rows for one cache line of each storage type, and for a task to be worth its handing out.
    int64_t share = std::max<int64_t>(64, 16384 / rows.length / 64 * 64);
    if (rows.count < 2 * share) share = std::max<int64_t>(4, (rows.count / 2 + 3) / 4 * 4);
    int64_t work = rows.count * rows.length * (Op::kArithmetic ? 2 : 50);
    parallel_tasks((rows.count + share - 1) / share, work, [&](int64_t task) {
      scan_rows<Op>(from, to, task * share, std::min(rows.count, (task + 1) * share), rows);
    });
  });
  return out;
}

Tensor cumsum(Tensor x, int64_t dim, ScalarType dtype) { return scan<Sum>("cumsum", x, dim, dtype); }
Tensor cumprod(Tensor x, int64_t dim, ScalarType dtype) { return scan<Product>("cumprod", x, dim, dtype); }
Tensor logcumsumexp(Tensor x, int64_t dim) { return scan<LogSumExp>("logcumsumexp", x, dim, x.scalar_type()); }

}  // namespace
}  // namespace bicompile

STABLE_TORCH_LIBRARY_IMPL(bicompile, CPU, m) {
  m.impl("cumsum", TORCH_BOX(&bicompile::cumsum));
  m.impl("cumprod", TORCH_BOX(&bicompile::cumprod));
  m.impl("logcumsumexp", TORCH_BOX(&bicompile::logcumsumexp));
}
