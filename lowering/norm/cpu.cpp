// Layer norm and group norm, forward and backward: statistics in the order of reduction/block.h, the rest pointwise.
// No product is fused with an addition: kernels that compute the same pieces one by one get the same bits.
#include "rows.h"

#include <cmath>
#include <optional>

namespace bicompile {
namespace {

template <class S>
struct Moments {
  Block<S> mean, rstd;
};

// Two passes: the mean, then the squared distances to it.  One over their root is taken in double, once for each row:
// the rounding of rstd is one of every element's.
template <class S, class X>
BICOMPILE_INLINE Moments<S> moments(const AlongRow& walk, const X& x, double eps) {
  const Block<S> n = block_of(S(walk.n));
  const Block<S> mean = walk.fold(Add{}, S(0), x) / n;
  auto square = [&](int64_t k, int count) BICOMPILE_LAMBDA {
    Block<S> d = x(k, count) - mean;
    return d * d;
  };
  const double var = double(first_lane(walk.fold(Add{}, S(0), square).v[0])) / double(walk.n);
  return {mean, block_of(S(1 / std::sqrt(var + eps)))};
}

// y = ((x - mean) * rstd) * weight + bias, element by element; weight and bias may be absent.
template <class S, class X>
BICOMPILE_INLINE void normalise(const AlongRow& walk, const X& x, const Moments<S>& m, const AnyInput<S>& weight,
                                const AnyInput<S>& bias, const AnyOutput<S>& y) {
  walk.each([&](int64_t k, int count) BICOMPILE_LAMBDA {
    Block<S> v = (x(k, count) - m.mean) * m.rstd;
    if (weight) v = v * weight(k, count);
    if (bias) v = v + bias(k, count);
    y(k, v, count);
  });
}

// (g - (sum(g) / n + xhat * (sum(g * xhat) / n))) * rstd with xhat = (x - mean) * rstd and g already times the weight.
// The two means are small beside g: they are added to each other first, so that g is rounded once.
template <class S, class G, class X>
BICOMPILE_INLINE void normalise_backward(const AlongRow& walk, const G& g, const X& x, S mean, S rstd,
                                         const AnyOutput<S>& dx) {
  const Block<S> n = block_of(S(walk.n)), center = block_of(mean), scale = block_of(rstd);
  auto xhat = [&](int64_t k, int count) BICOMPILE_LAMBDA { return (x(k, count) - center) * scale; };
  auto product = [&](int64_t k, int count) BICOMPILE_LAMBDA { return g(k, count) * xhat(k, count); };
  const Block<S> g_mean = walk.fold(Add{}, S(0), g) / n, product_mean = walk.fold(Add{}, S(0), product) / n;
  walk.each([&](int64_t k, int count) BICOMPILE_LAMBDA {
    dx(k, (g(k, count) - (g_mean + xhat(k, count) * product_mean)) * scale, count);
  });
}

const void* data_of(const std::optional<Tensor>& t) { return t ? t->data_ptr() : nullptr; }
ScalarType dtype_of(const std::optional<Tensor>& t) { return t ? t->scalar_type() : ScalarType::Float; }

ScalarType compute_dtype(ScalarType t) { return computes_in_double(t) ? t : ScalarType::Float; }

void check_parameter(const char* op, const char* name, const std::optional<Tensor>& t, int64_t count) {
  if (!t) return;
  check_floating(op, name, t->scalar_type());
  STD_TORCH_CHECK(t->numel() == count, "bicompile::", op, ": expected ", name, " with ", count, " elements, got ",
                  t->numel(), "; pass one number for each normalized element or channel");
}

void check_same_shape(const char* op, const Tensor& grad, const Tensor& x) {
  check_floating(op, "grad", grad.scalar_type());
  check_floating(op, "x", x.scalar_type());
  STD_TORCH_CHECK(sizes_of(grad) == sizes_of(x), "bicompile::", op,
                  ": expected grad and x of one shape, got others; expand grad first");
}

void check_rows(const char* op, const char* name, const Tensor& t, int64_t rows) {
  check_floating(op, name, t.scalar_type());
  STD_TORCH_CHECK(t.numel() == rows, "bicompile::", op, ": expected ", name, " with one number for each of ", rows,
                  " rows, got ", t.numel(), "; pass what the forward returned");
}

// ---------------------------------------------------------------------------------------------------------------
// Layer norm: a row is the last `normalized_dims` dims.

int64_t checked_normalized_dims(const char* op, const Tensor& x, int64_t dims) {
  STD_TORCH_CHECK(dims >= 1 && dims <= x.dim(), "bicompile::", op, ": expected normalized_dims in [1, ", x.dim(),
                  "], got ", dims, "; pass how many trailing dims of x one row has");
  return x.dim() - dims;
}

std::tuple<Tensor, Tensor, Tensor> layer_norm(const Tensor& x, int64_t normalized_dims, std::optional<Tensor> weight,
                                              std::optional<Tensor> bias, double eps) {
  check_floating("layer_norm", "x", x.scalar_type());
  const int64_t first = checked_normalized_dims("layer_norm", x, normalized_dims);
  const RowDims at = trailing_rows(x, first);
  const int64_t n = at.row.numel;
  check_parameter("layer_norm", "weight", weight, n);
  check_parameter("layer_norm", "bias", bias, n);
  weight = dense(weight);
  bias = dense(bias);
  const ScalarType dtype = x.scalar_type();
  std::vector<int64_t> sizes = sizes_of(x);
  Tensor y = new_tensor(sizes, dtype);
  std::fill(sizes.begin() + first, sizes.end(), 1);
  Tensor mean = new_tensor(sizes, compute_dtype(dtype)), rstd = new_tensor(sizes, compute_dtype(dtype));
  const Output mean_out(mean), rstd_out(rstd);
  void* y_data = y.data_ptr();
  const void *w = data_of(weight), *b = data_of(bias);
  const ScalarType w_dtype = dtype_of(weight), b_dtype = dtype_of(bias);
  for_each_row<1>("layer_norm", {x}, {at}, 5, [&]<class S>(S, int64_t row, const auto& in) {
    const AlongRow walk{n};
    const Moments<S> m = moments<S>(walk, in[0], eps);
    mean_out.put(row, first_lane(m.mean.v[0]));
    rstd_out.put(row, first_lane(m.rstd.v[0]));
    normalise<S>(walk, in[0], m, {w, w_dtype}, {b, b_dtype}, {y_data, dtype, row * n});
  });
  return {y, mean, rstd};
}

Tensor layer_norm_backward(const Tensor& grad, const Tensor& x, int64_t normalized_dims, const Tensor& mean,
                           const Tensor& rstd, std::optional<Tensor> weight) {
  constexpr const char* op = "layer_norm_backward";
  check_same_shape(op, grad, x);
  const int64_t first = checked_normalized_dims(op, x, normalized_dims);
  const RowDims at = trailing_rows(x, first);
  const int64_t n = at.row.numel;
  check_rows(op, "mean", mean, at.rows.numel);
  check_rows(op, "rstd", rstd, at.rows.numel);
  check_parameter(op, "weight", weight, n);
  weight = dense(weight);
  Tensor dx = new_tensor(sizes_of(x), x.scalar_type());
  void* dx_data = dx.data_ptr();
  const void* w = data_of(weight);
  const ScalarType w_dtype = dtype_of(weight);
  const std::vector<double> means = numbers_of(mean), rstds = numbers_of(rstd);
  for_each_row<2>(op, {grad, x}, {trailing_rows(grad, first), at}, 8, [&]<class S>(S, int64_t row, const auto& in) {
    const AnyInput<S> weights{w, w_dtype};
    auto g = [&](int64_t k, int count) BICOMPILE_LAMBDA {
      Block<S> v = in[0](k, count);
      return weights ? v * weights(k, count) : v;
    };
    const AnyOutput<S> out{dx_data, dx.scalar_type(), row * n};
    normalise_backward<S>(AlongRow{n}, g, in[1], S(means[row]), S(rstds[row]), out);
  });
  return dx;
}

// Sums over rows, of 32 columns at a time.
std::tuple<Tensor, Tensor> layer_norm_backward_params(const Tensor& grad, const Tensor& x, int64_t normalized_dims,
                                                      const Tensor& mean, const Tensor& rstd, ScalarType dtype) {
  constexpr const char* op = "layer_norm_backward_params";
  check_same_shape(op, grad, x);
  check_floating(op, "dtype", dtype);
  const int64_t first = checked_normalized_dims(op, x, normalized_dims);
  const std::vector<int64_t> sizes = sizes_of(x);
  Tensor dweight = new_tensor({sizes.begin() + first, sizes.end()}, dtype);
  Tensor dbias = new_tensor({sizes.begin() + first, sizes.end()}, dtype);
  const int64_t n = dweight.numel(), rows = trailing_rows(x, first).rows.numel;
  check_rows(op, "mean", mean, rows);
  check_rows(op, "rstd", rstd, rows);
  const Tensor g = dense(grad), dense_x = dense(x);
  const void *g_data = g.data_ptr(), *x_data = dense_x.data_ptr();
  void *dw = dweight.data_ptr(), *db = dbias.data_ptr();
  const std::vector<double> means = numbers_of(mean), rstds = numbers_of(rstd);
  in_compute_type(x.scalar_type(), [&]<class S>(S) {
    parallel_tasks((n + kBlock - 1) / kBlock, rows * n * 4, [&](int64_t task) {
      const int64_t column = task * kBlock;
      const AcrossRows walk{rows, int(std::min<int64_t>(kBlock, n - column))};
      const AnyInput<S> gs{g_data, g.scalar_type()}, xs{x_data, x.scalar_type()};
      auto element = [&](int64_t k, int count) BICOMPILE_LAMBDA { return gs(k * n + column, count); };
      auto product = [&](int64_t k, int count) BICOMPILE_LAMBDA {
        return element(k, count) * ((xs(k * n + column, count) - block_of(S(means[k]))) * block_of(S(rstds[k])));
      };
      AnyOutput<S>{dw, dtype}(column, walk.fold(Add{}, S(0), product), walk.rows);
      AnyOutput<S>{db, dtype}(column, walk.fold(Add{}, S(0), element), walk.rows);
    });
  });
  return {dweight, dbias};
}

// ---------------------------------------------------------------------------------------------------------------
// Group norm: a row is one group of channels of one sample, with all that follows the channel dim.

struct Groups {
  int64_t batch, groups, channels, inner;  // channels of one group, elements of one channel
  RowDims at;

  Groups(const char* op, const Tensor& x, int64_t num_groups) : groups(num_groups) {
    STD_TORCH_CHECK(x.dim() >= 2, "bicompile::", op, ": expected x of rank 2 or more, [N, C, ...], got rank ", x.dim(),
                    "; add the missing dims");
    STD_TORCH_CHECK(num_groups > 0 && x.size(1) % num_groups == 0, "bicompile::", op, ": expected groups to divide the ",
                    x.size(1), " channels of x, got ", num_groups, "; choose a divisor");
    batch = x.size(0);
    channels = x.size(1) / num_groups;
    at = group_rows(x, num_groups);
    inner = channels > 0 ? at.row.numel / channels : 0;
  }
};

std::tuple<Tensor, Tensor, Tensor> group_norm(const Tensor& x, int64_t groups, std::optional<Tensor> weight,
                                              std::optional<Tensor> bias, double eps) {
  check_floating("group_norm", "x", x.scalar_type());
  const Groups shape("group_norm", x, groups);
  check_parameter("group_norm", "weight", weight, groups * shape.channels);
  check_parameter("group_norm", "bias", bias, groups * shape.channels);
  weight = dense(weight);
  bias = dense(bias);
  const ScalarType dtype = x.scalar_type();
  Tensor y = new_tensor(sizes_of(x), dtype);
  Tensor mean = new_tensor({shape.batch, groups}, compute_dtype(dtype));
  Tensor rstd = new_tensor({shape.batch, groups}, compute_dtype(dtype));
  const Output mean_out(mean), rstd_out(rstd);
  void* y_data = y.data_ptr();
  const std::vector<double> w = numbers_of(weight), b = numbers_of(bias);
  const void *w_data = data_of(weight), *b_data = data_of(bias);
  const ScalarType w_dtype = dtype_of(weight), b_dtype = dtype_of(bias);
  for_each_row<1>("group_norm", {x}, {shape.at}, 5, [&]<class S>(S, int64_t row, const auto& in) {
    const int64_t n = shape.at.row.numel, first = row % groups * shape.channels;
    const Moments<S> m = moments<S>(AlongRow{n}, in[0], eps);
    mean_out.put(row, first_lane(m.mean.v[0]));
    rstd_out.put(row, first_lane(m.rstd.v[0]));
    if (shape.inner == 1) {  // one element for each channel, as in a layer norm
      normalise<S>(AlongRow{n}, in[0], m, {w_data, w_dtype, first}, {b_data, b_dtype, first}, {y_data, dtype, row * n});
      return;
    }
    for (int64_t c = 0; c < shape.channels; c++) {
      auto x_of_channel = in[0];
      x_of_channel.p += c * shape.inner;
      const AnyOutput<S> out{y_data, dtype, row * n + c * shape.inner};
      const Block<S> scale = block_of(S(w.empty() ? 1 : w[first + c])), shift = block_of(S(b.empty() ? 0 : b[first + c]));
      AlongRow{shape.inner}.each([&](int64_t k, int count) BICOMPILE_LAMBDA {
        Block<S> v = (x_of_channel(k, count) - m.mean) * m.rstd;
        if (!w.empty()) v = v * scale;
        if (!b.empty()) v = v + shift;
        out(k, v, count);
      });
    }
  });
  return {y, mean, rstd};
}

Tensor group_norm_backward(const Tensor& grad, const Tensor& x, int64_t groups, const Tensor& mean, const Tensor& rstd,
                           std::optional<Tensor> weight) {
  constexpr const char* op = "group_norm_backward";
  check_same_shape(op, grad, x);
  const Groups shape(op, x, groups);
  check_rows(op, "mean", mean, shape.batch * groups);
  check_rows(op, "rstd", rstd, shape.batch * groups);
  check_parameter(op, "weight", weight, groups * shape.channels);
  weight = dense(weight);
  Tensor dx = new_tensor(sizes_of(x), x.scalar_type());
  void* dx_data = dx.data_ptr();
  const std::vector<double> w = numbers_of(weight), means = numbers_of(mean), rstds = numbers_of(rstd);
  const std::array<RowDims, 2> at{Groups(op, grad, groups).at, shape.at};
  for_each_row<2>(op, {grad, x}, at, 8, [&]<class S>(S, int64_t row, const auto& in) {
    const int64_t n = shape.at.row.numel, first = row % groups * shape.channels;
    struct Weighted;
    const Kept<S> weighted{scratch<Weighted, S>(size_t(n + kBlock)), 1};
    // In ascending order: what a channel writes past its end, the next one overwrites.
    for (int64_t c = 0; c < shape.channels; c++) {
      const Block<S> scale = block_of(S(w.empty() ? 1 : w[first + c]));
      for (int64_t k = c * shape.inner; k < (c + 1) * shape.inner; k += kBlock) {
        const int count = int(std::min<int64_t>(kBlock, (c + 1) * shape.inner - k));
        weighted.put(k, in[0](k, count) * scale);
      }
    }
    auto g = [&](int64_t k, int) BICOMPILE_LAMBDA { return weighted.get(k); };
    const AnyOutput<S> out{dx_data, dx.scalar_type(), row * n};
    normalise_backward<S>(AlongRow{n}, g, in[1], S(means[row]), S(rstds[row]), out);
  });
  return dx;
}

// For each channel, sums over the samples and the channel's elements, k counting both in row-major order, in double.
std::tuple<Tensor, Tensor> group_norm_backward_params(const Tensor& grad, const Tensor& x, int64_t groups,
                                                      const Tensor& mean, const Tensor& rstd, ScalarType dtype) {
  constexpr const char* op = "group_norm_backward_params";
  check_same_shape(op, grad, x);
  check_floating(op, "dtype", dtype);
  const Groups shape(op, x, groups);
  check_rows(op, "mean", mean, shape.batch * groups);
  check_rows(op, "rstd", rstd, shape.batch * groups);
  const int64_t channels = groups * shape.channels, n = shape.batch * shape.inner;
  Tensor dweight = new_tensor({channels}, dtype), dbias = new_tensor({channels}, dtype);
  const Output dweight_out(dweight), dbias_out(dbias);
  const Tensor g = dense(grad), dense_x = dense(x);
  const void *g_data = g.data_ptr(), *x_data = dense_x.data_ptr();
  const std::vector<double> means = numbers_of(mean), rstds = numbers_of(rstd);
  in_compute_type(x.scalar_type(), [&]<class S>(S) {
    parallel_tasks(channels, channels * n * 4, [&](int64_t channel) {
      struct Gradients;
      struct Normalised;
      const Kept<S> gs{scratch<Gradients, S>(size_t(n + kBlock)), 1};
      const Kept<S> products{scratch<Normalised, S>(size_t(n + kBlock)), 1};
      for (int64_t sample = 0; sample < shape.batch; sample++) {
        const int64_t from = (sample * channels + channel) * shape.inner, to = sample * shape.inner;
        const int64_t row = sample * groups + channel / shape.channels;
        const Block<S> center = block_of(S(means[row])), scale = block_of(S(rstds[row]));
        AlongRow{shape.inner}.each([&](int64_t k, int count) {
          const Block<S> v = AnyInput<S>{g_data, g.scalar_type()}(from + k, count);
          gs.put(to + k, v);
          products.put(to + k, v * ((AnyInput<S>{x_data, x.scalar_type()}(from + k, count) - center) * scale));
        });
      }
      auto sum = [&](const Kept<S>& values) {
        auto element = [&](int64_t k, int) BICOMPILE_LAMBDA { return in_double(values.get(k)); };
        return first_lane(AlongRow{n}.fold(Add{}, 0.0, element).v[0]);
      };
      dweight_out.put(channel, sum(products));
      dbias_out.put(channel, sum(gs));
    });
  });
  return {dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bicompile, CPU, m) {
  m.impl("layer_norm", TORCH_BOX(&layer_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
  m.impl("layer_norm_backward_params", TORCH_BOX(&layer_norm_backward_params));
  m.impl("group_norm", TORCH_BOX(&group_norm));
  m.impl("group_norm_backward", TORCH_BOX(&group_norm_backward));
  m.impl("group_norm_backward_params", TORCH_BOX(&group_norm_backward_params));
}

}  // namespace bicompile
