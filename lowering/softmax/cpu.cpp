// Softmax and log-softmax over any dim, and their gradients: sums in the order of reduction/block.h, the rest pointwise.
#include "../reduction/reduce.h"
#include "../reduction/slices.h"

namespace bicompile {
namespace {

// exp(x - max) / sum, the powers kept in full precision between the passes: one exp for each element.
template <bool kSafe>
struct Softmax {
  static constexpr int kCost = 12;
  template <class S, class Walk, class X, class Y>
  void operator()(const Walk& walk, const std::array<X, 1>& in, const Y& y, const Kept<S>& kept) const {
    const X& x = in[0];
    const Block<S> max = largest<S>(walk, x);
    auto power = [&](int64_t k, int count) BICOMPILE_LAMBDA {
      Block<S> e = exp(x(k, count) - max);
      kept.put(k, e);
      return e;
    };
    const Block<S> sum = walk.fold(Add{}, S(0), power);
    if constexpr (kSafe) {
      // Zeros for a row of nothing but -inf.
      const Block<S> low = block_of(-std::numeric_limits<S>::infinity()), zero = block_of(S(0));
      const Block<S> top = walk.fold(Max{}, -std::numeric_limits<S>::infinity(), x);
      walk.each([&](int64_t k, int count) BICOMPILE_LAMBDA {
        y(k, where_equal(top, low, zero, kept.get(k) / sum), count);
      });
    } else {
      walk.each([&](int64_t k, int count) BICOMPILE_LAMBDA { y(k, kept.get(k) / sum, count); });
    }
  }
};

// (x - max) - log(sum of exp(x - max)).
struct LogSoftmax {
  static constexpr int kCost = 10;
  template <class S, class Walk, class X, class Y>
  void operator()(const Walk& walk, const std::array<X, 1>& in, const Y& y, const Kept<S>&) const {
    const X& x = in[0];
    const Block<S> max = largest<S>(walk, x);
    auto power = [&](int64_t k, int count) BICOMPILE_LAMBDA { return exp(x(k, count) - max); };
    const Block<S> log_sum = log(walk.fold(Add{}, S(0), power));
    walk.each([&](int64_t k, int count) BICOMPILE_LAMBDA { y(k, (x(k, count) - max) - log_sum, count); });
  }
};

// What LogSoftmax subtracts: the largest element, or 0 for -inf, and the logarithm of the sum.
struct Statistics {
  static constexpr int kOutputs = 2, kCost = 10;
  template <class S, class Walk, class X>
  BICOMPILE_INLINE void operator()(const Walk& walk, const X& x, Block<S>* r) const {
    const Block<S> max = largest<S>(walk, x), low = block_of(-std::numeric_limits<S>::infinity());
    auto power = [&](int64_t k, int count) BICOMPILE_LAMBDA { return exp(x(k, count) - r[0]); };
    r[0] = where_equal(max, low, block_of(S(0)), max);
    r[1] = log(walk.fold(Add{}, S(0), power));
  }
};

// y * (g - sum(g * y)), the inputs being g and y.
struct SoftmaxBackward {
  static constexpr int kCost = 3;
  template <class S, class Walk, class X, class Y>
  void operator()(const Walk& walk, const std::array<X, 2>& in, const Y& dx, const Kept<S>&) const {
    const X &g = in[0], &y = in[1];
    auto product = [&](int64_t k, int count) BICOMPILE_LAMBDA { return g(k, count) * y(k, count); };
    const Block<S> sum = walk.fold(Add{}, S(0), product);
    walk.each([&](int64_t k, int count) BICOMPILE_LAMBDA { dx(k, y(k, count) * (g(k, count) - sum), count); });
  }
};

// g - exp(y) * sum(g), the inputs being g and y.
struct LogSoftmaxBackward {
  static constexpr int kCost = 8;
  template <class S, class Walk, class X, class Y>
  void operator()(const Walk& walk, const std::array<X, 2>& in, const Y& dx, const Kept<S>&) const {
    const X &g = in[0], &y = in[1];
    const Block<S> sum = walk.fold(Add{}, S(0), g);
    walk.each([&](int64_t k, int count) BICOMPILE_LAMBDA { dx(k, g(k, count) - exp(y(k, count)) * sum, count); });
  }
};

Tensor softmax(const Tensor& x, int64_t dim, bool log, ScalarType dtype, bool safe) {
  check_floating("softmax", "x", x.scalar_type());
  check_floating("softmax", "dtype", dtype);
  STD_TORCH_CHECK(!(log && safe), "bicompile::softmax: expected log or safe, got both; pass safe=False");
  dim = checked_dim("softmax", dim, x.dim());
  auto run = [&](const auto& kernel) {
    return map_slices<1>("softmax", {x}, dim, dtype, computes_in_double(dtype), kernel);
  };
  return log ? run(LogSoftmax{}) : safe ? run(Softmax<true>{}) : run(Softmax<false>{});
}

std::tuple<Tensor, Tensor> softmax_statistics(const Tensor& x, int64_t dim) {
  const char* op = "softmax_statistics";
  check_floating(op, "x", x.scalar_type());
  const bool in_double = computes_in_double(x.scalar_type());
  const Plan plan = plan_reduction(op, x, {checked_dim(op, dim, x.dim())}, false);
  auto r = reduce(op, x, plan, in_double ? ScalarType::Double : ScalarType::Float, Statistics{});
  return {r[0], r[1]};
}

Tensor softmax_backward(const Tensor& grad, const Tensor& y, int64_t dim, bool log, ScalarType dtype) {
  check_floating("softmax_backward", "grad", grad.scalar_type());
  check_floating("softmax_backward", "y", y.scalar_type());
  check_floating("softmax_backward", "dtype", dtype);
  STD_TORCH_CHECK(sizes_of(grad) == sizes_of(y),
                  "bicompile::softmax_backward: expected grad and y of one shape, got others; expand grad first");
  dim = checked_dim("softmax_backward", dim, y.dim());
  const bool in_double = computes_in_double(dtype) || computes_in_double(y.scalar_type());
  auto run = [&](const auto& kernel) {
    return map_slices<2>("softmax_backward", {grad, y}, dim, dtype, in_double, kernel);
  };
  return log ? run(LogSoftmaxBackward{}) : run(SoftmaxBackward{});
}

// Of one row's classes [first, last): (one_hot - exp((x - shift) - log_total)) * grad, `index` being the hot one.
template <class T, class S>
void gradient_of_scores(const T* x, T* dx, int64_t first, int64_t last, int64_t index, S grad, S shift, S log_total) {
  const Block<S> top = block_of(shift), log_sum = block_of(log_total), g = block_of(grad), negative = block_of(-grad);
  auto probability = [&](int64_t k, int count) BICOMPILE_LAMBDA {
    return exp((load_block<S>(x + k, count) - top) - log_sum);
  };
  for (int64_t k = first; k < last; k += kBlock) {
    const int count = int(std::min<int64_t>(kBlock, last - k));
    store_block(dx + k, probability(k, count) * negative, count);
  }
  if (index >= first && index < last) store_block(dx + index, (block_of(S(1)) - probability(index, 1)) * g, 1);
}

Tensor log_probability_backward(const Tensor& grad, const Tensor& scores, const Tensor& index, const Tensor& shift,
                                const Tensor& log_total) {
  const char* op = "log_probability_backward";
  check_floating(op, "x", scores.scalar_type());
  const ScalarType wide = computes_in_double(scores.scalar_type()) ? ScalarType::Double : ScalarType::Float;
  auto checked = [&](const char* name, const Tensor& t, ScalarType dtype) {
    STD_TORCH_CHECK(scores.dim() == 2 && t.dim() == 1 && t.size(0) == scores.size(0) && t.scalar_type() == dtype,
                    "bicompile::", op, ": expected scores [N, C] and ", name, " [N] of ",
                    torch::headeronly::toString(dtype), ", got ", scores.dim(), "-D scores and ", name, " of ",
                    t.numel(), " elements of ", torch::headeronly::toString(t.scalar_type()),
                    "; flatten the rows first");
    return torch::stable::contiguous(t);
  };
  const Tensor g = checked("grad", grad, wide), at = checked("index", index, ScalarType::Long);
  const Tensor top = checked("shift", shift, wide), log_sum = checked("log_total", log_total, wide);
  const Tensor x = torch::stable::contiguous(scores);
  const int64_t rows = x.size(0), n = x.size(1);
  Tensor out = new_tensor({rows, n}, x.scalar_type());
  dispatch(op, x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using S = typename Compute<T>::Scalar;
    auto data = [](const Tensor& t) { return static_cast<const S*>(t.data_ptr()); };
    constexpr int64_t kPiece = 4 * kSliceTaskElements;  // of a long row, which several threads may share
    const int64_t pieces = std::max<int64_t>(1, (n + kPiece - 1) / kPiece);
    const int64_t rows_per_task = std::max<int64_t>(1, kSliceTaskElements / std::max<int64_t>(1, n));
    const int64_t groups = (rows + rows_per_task - 1) / rows_per_task;
    parallel_tasks(groups * pieces, rows * n * 8, [&](int64_t task) {
      const int64_t first = task % pieces * kPiece, last = std::min(n, first + kPiece);
      const int64_t start = task / pieces * rows_per_task, end = std::min(rows, start + rows_per_task);
      for (int64_t row = start; row < end; row++) {
        gradient_of_scores<T, S>(static_cast<const T*>(x.data_ptr()) + row * n, static_cast<T*>(out.data_ptr()) + row * n,
                                 first, last, static_cast<const int64_t*>(at.data_ptr())[row], data(g)[row],
                                 data(top)[row], data(log_sum)[row]);
      }
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bicompile, CPU, m) {
  m.impl("softmax", TORCH_BOX(&softmax));
  m.impl("softmax_backward", TORCH_BOX(&softmax_backward));
  m.impl("softmax_statistics", TORCH_BOX(&softmax_statistics));
  m.impl("log_probability_backward", TORCH_BOX(&log_probability_backward));
}

}  // namespace bicompile
