// The matmul family on the CPU: mm, mm_continued, mm_windows and its transpose, bmm, addmm, baddbmm.  gemm.h computes;
// here operands are checked and described.
#include "gemm.h"

#include <torch/csrc/stable/library.h>

namespace bicompile {
namespace {

using matmul::Addend;
using matmul::Operand;
using matmul::Pack;
using matmul::Product;

std::string shape_of(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); i++) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

void check_factors(const char* op, const Tensor& a, const Tensor& b, int64_t dim) {
  STD_TORCH_CHECK(a.dim() == dim && b.dim() == dim, "bicompile::", op, ": expected two ", dim,
                  "-D tensors, got shapes ", shape_of(a), " and ", shape_of(b), "; reshape them first");
  STD_TORCH_CHECK(a.scalar_type() == b.scalar_type(), "bicompile::", op, ": expected one dtype, got ",
                  name_of(a.scalar_type()), " and ", name_of(b.scalar_type()), "; convert one of them");
  const bool fits = a.size(dim - 1) == b.size(dim - 2) && (dim == 2 || a.size(0) == b.size(0));
  STD_TORCH_CHECK(fits, "bicompile::", op, ": the shapes ", shape_of(a), " and ", shape_of(b),
                  " do not fit; expected ", dim == 2 ? "[M, K] and [K, N]" : "[B, M, K] and [B, K, N]");
}

template <class T>
Product<T> product_of(const Tensor& a, const Tensor& b, const Tensor& out) {
  const int64_t d = a.dim() - 2;  // 1 where there is a batch
  Product<T> p;
  p.batch = d ? a.size(0) : 1;
  p.rows = a.size(d), p.depth = a.size(d + 1), p.columns = b.size(d + 1);
  p.left = {static_cast<const T*>(a.data_ptr()), a.stride(d), a.stride(d + 1)};
  p.right = {static_cast<const T*>(b.data_ptr()), b.stride(d + 1), b.stride(d)};
  p.left_batch_stride = d ? a.stride(0) : 0;
  p.right_batch_stride = d ? b.stride(0) : 0;
  p.out = static_cast<T*>(out.data_ptr());
  return p;
}

Tensor new_product(const Tensor& a, const Tensor& b) {
  if (a.dim() == 2) return new_tensor({a.size(0), b.size(1)}, a.scalar_type());
  return new_tensor({a.size(0), a.size(1), b.size(2)}, a.scalar_type());
}

Tensor multiply(const char* op, const Tensor& a, const Tensor& b, int64_t dim) {
  check_factors(op, a, b, dim);
  Tensor out = new_product(a, b);
  dispatch(op, a.scalar_type(), [&](auto zero) { matmul::multiply(product_of<decltype(zero)>(a, b, out)); });
  return out;
}

Tensor multiply_add(const char* op, const Tensor& c, const Tensor& a, const Tensor& b, double beta, double alpha,
                    int64_t dim) {
  check_factors(op, a, b, dim);
  STD_TORCH_CHECK(c.scalar_type() == a.scalar_type(), "bicompile::", op, ": expected one dtype, got an addend of ",
                  name_of(c.scalar_type()), " for factors of ", name_of(a.scalar_type()), "; convert one of them");
  Tensor out = new_product(a, b);
  int64_t strides[3] = {0, 0, 0};  // of c, broadcast to [batch, rows, columns]
  bool fits = c.dim() <= dim;
  for (int64_t back = 1; fits && back <= c.dim(); back++) {
    const int64_t size = c.size(c.dim() - back);
    fits = size == 1 || size == out.size(dim - back);
    strides[3 - back] = size == 1 ? 0 : c.stride(c.dim() - back);
  }
  STD_TORCH_CHECK(fits, "bicompile::", op, ": expected an addend that broadcasts to ", shape_of(out), ", got shape ",
                  shape_of(c));
  dispatch(op, a.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using Element = typename Pack<T>::Element;
    Product<T> p = product_of<T>(a, b, out);
    const T* data = beta == 0 ? nullptr : static_cast<const T*>(c.data_ptr());  // beta 0: not even a NaN counts
    p.addend = {data, strides[0], strides[1], strides[2], Element(beta), Element(alpha)};
    matmul::multiply(p);
  });
  return out;
}

Tensor mm(const Tensor& a, const Tensor& b) { return multiply("mm", a, b, 2); }

Tensor mm_continued(const std::optional<Tensor>& sums, const Tensor& a, const Tensor& b) {
  const char* op = "mm_continued";
  check_factors(op, a, b, 2);
  const ScalarType wide = a.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor out = new_tensor({a.size(0), b.size(1)}, wide);
  if (sums) {
    STD_TORCH_CHECK(sums->scalar_type() == wide && sizes_of(*sums) == sizes_of(out), "bicompile::", op,
                    ": expected sums of ", name_of(wide), " and shape ", shape_of(out), ", got ",
                    name_of(sums->scalar_type()), " and shape ", shape_of(*sums));
    torch::stable::copy_(out, *sums);
  }
  dispatch(op, a.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    Product<T> p = product_of<T>(a, b, out);
    p.out = nullptr;
    p.kept = static_cast<typename Pack<T>::Element*>(out.data_ptr());
    p.continued = sums.has_value();
    matmul::multiply(p);
  });
  return out;
}

// out[i] = factors[i] @ windows of a part of the image for each i, or their transpose.
template <class T>
void multiply_windows(const Tensor& factors, const Tensor& x, const windows::Image& given, int64_t batch_step,
                      bool by_position, const Tensor& out) {
  windows::Image image = given;
  const T* data = static_cast<const T*>(x.data_ptr());
  std::optional<Tensor> phases;
  if (image.reads_apart()) {
    const int64_t samples = x.size(0), channels = x.size(1), size = image.channel_in_phases();
    phases = new_tensor({samples * channels, size}, x.scalar_type());
    T* to = static_cast<T*>(phases->data_ptr());
    parallel_tasks(samples * channels, phases->numel(), [&](int64_t task) {
      given.write_phases(data + task / channels * given.sample_step + task % channels * given.channel_step,
                         to + task * size);
    });
    image = given.in_phases(samples, channels), data = to;
  }
  Product<T> p;
  p.batch = out.size(0), p.rows = out.size(1), p.columns = out.size(2), p.depth = factors.size(2);
  p.left = {static_cast<const T*>(factors.data_ptr()), factors.stride(1), factors.stride(2)};
  p.left_batch_stride = factors.size(0) > 1 ? factors.stride(0) : 0;
  p.right = {data, 0, 0, &image, data + image.extent, by_position};
  // A batch of groups has a part of the channels each, one of samples a sample.
  p.right_batch_stride = batch_step > 0 ? batch_step * image.channel_step : image.sample_step;
  p.out = static_cast<T*>(out.data_ptr());
  matmul::multiply(p);
}

void check_factors_of_windows(const char* op, const Tensor& factors, const Tensor& x, bool fits, const char* expected) {
  STD_TORCH_CHECK(factors.scalar_type() == x.scalar_type(), "bicompile::", op, ": expected one dtype, got ",
                  name_of(factors.scalar_type()), " and ", name_of(x.scalar_type()), "; convert one of them");
  STD_TORCH_CHECK(fits, "bicompile::", op, ": expected factors of ", expected, ", got shape ", shape_of(factors),
                  " for x of shape ", shape_of(x));
}

Tensor mm_windows(const Tensor& factors, const Tensor& x, windows::Ints kernel, windows::Ints stride,
                  windows::Ints dilation, windows::Ints before, windows::Ints after, windows::Ints between,
                  bool across) {
  const char* op = "mm_windows";
  const windows::Image image(op, x, kernel, stride, dilation, before, after, between);
  const bool fits = factors.dim() == 3 && factors.size(0) * factors.size(2) == x.size(1) * image.taps &&
                    (across || factors.size(0) == 1);
  check_factors_of_windows(op, factors, x, fits,
                           "[groups, rows, channels of a group * taps], and one group unless across");
  const int64_t groups = factors.size(0), rows = factors.size(1), samples = x.size(0);
  Tensor out = across ? new_tensor({groups, rows, samples * image.positions}, x.scalar_type())
                      : new_tensor({samples, rows, image.positions}, x.scalar_type());
  dispatch(op, x.scalar_type(), [&](auto zero) {
    multiply_windows<decltype(zero)>(factors, x, image, across ? x.size(1) / groups : 0, false, out);
  });
  return out;
}

Tensor mm_windows_transposed(const Tensor& factors, const Tensor& x, windows::Ints kernel, windows::Ints stride,
                             windows::Ints dilation, windows::Ints before, windows::Ints after,
                             windows::Ints between) {
  const char* op = "mm_windows_transposed";
  const windows::Image image(op, x, kernel, stride, dilation, before, after, between);
  const bool fits = factors.dim() == 3 && factors.size(0) > 0 && x.size(1) % factors.size(0) == 0 &&
                    factors.size(2) == x.size(0) * image.positions;
  check_factors_of_windows(op, factors, x, fits, "[groups, rows, samples * positions]");
  const int64_t channels = x.size(1) / factors.size(0);
  Tensor out = new_tensor({factors.size(0), factors.size(1), channels * image.taps}, x.scalar_type());
  dispatch(op, x.scalar_type(), [&](auto zero) {
    multiply_windows<decltype(zero)>(factors, x, image, channels, true, out);
  });
  return out;
}

Tensor bmm(const Tensor& a, const Tensor& b) { return multiply("bmm", a, b, 3); }
Tensor addmm(const Tensor& c, const Tensor& a, const Tensor& b, double beta, double alpha) {
  return multiply_add("addmm", c, a, b, beta, alpha, 2);
}
Tensor baddbmm(const Tensor& c, const Tensor& a, const Tensor& b, double beta, double alpha) {
  return multiply_add("baddbmm", c, a, b, beta, alpha, 3);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bicompile, CPU, m) {
  m.impl("mm", TORCH_BOX(&mm));
  m.impl("mm_continued", TORCH_BOX(&mm_continued));
  m.impl("mm_windows", TORCH_BOX(&mm_windows));
  m.impl("mm_windows_transposed", TORCH_BOX(&mm_windows_transposed));
  m.impl("bmm", TORCH_BOX(&bmm));
  m.impl("addmm", TORCH_BOX(&addmm));
  m.impl("baddbmm", TORCH_BOX(&baddbmm));
}

}  // namespace bicompile
