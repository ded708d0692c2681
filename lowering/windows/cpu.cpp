// bicompile::windows on the CPU: copies, run by run where the last dim of the image is dense and the stride 1.
#include <algorithm>
#include <array>

#include "tensor.h"

namespace bicompile {
namespace {

using Three = std::array<int64_t, 3>;

// Values of the 1 to 3 spatial dims behind `first`, as the last of three.
template <class Get>
Three padded(int64_t dims, int64_t otherwise, const Get& get) {
  Three r{otherwise, otherwise, otherwise};
  for (int64_t i = 0; i < dims; i++) r[3 - dims + i] = get(i);
  return r;
}

struct Windows {
  Three kernel, stride, dilation, positions, step;  // step: of the image, in elements
  int64_t samples, channels, sample_step, channel_step;
  int64_t taps, count;  // elements of a kernel, positions of a sample

  Windows(const Tensor& x, const std::vector<int64_t>& k, const std::vector<int64_t>& s,
          const std::vector<int64_t>& d) {
    const int64_t dims = x.dim() - 2;
    STD_TORCH_CHECK(dims >= 1 && dims <= 3 && int64_t(k.size()) == dims && int64_t(s.size()) == dims &&
                        int64_t(d.size()) == dims,
                    "bicompile::windows: expected x of [N, C, *S] and a kernel, stride and dilation for each S, got ",
                    x.dim(), " dims and ", k.size());
    kernel = padded(dims, 1, [&](int64_t i) { return k[i]; });
    stride = padded(dims, 1, [&](int64_t i) { return s[i]; });
    dilation = padded(dims, 1, [&](int64_t i) { return d[i]; });
    step = padded(dims, 0, [&](int64_t i) { return x.stride(2 + i); });
    const Three sizes = padded(dims, 1, [&](int64_t i) { return x.size(2 + i); });
    samples = x.size(0), channels = x.size(1), sample_step = x.stride(0), channel_step = x.stride(1);
    taps = count = 1;
    for (int i = 0; i < 3; i++) {
      const int64_t reach = dilation[i] * (kernel[i] - 1) + 1;
      STD_TORCH_CHECK(kernel[i] > 0 && stride[i] > 0 && dilation[i] > 0 && sizes[i] >= reach,
                      "bicompile::windows: expected x to hold one window at least, got a dim of ", sizes[i],
                      " for one of ", reach);
      positions[i] = (sizes[i] - reach) / stride[i] + 1;
      taps *= kernel[i], count *= positions[i];
    }
  }

  // The elements of all windows of one channel at one kernel position.
  template <class T>
  void copy(const T* from, T* to) const {
    const int64_t next = step[2] * stride[2], width = positions[2];
    for (int64_t i = 0; i < positions[0]; i++)
      for (int64_t j = 0; j < positions[1]; j++, to += width) {
        const T* row = from + i * stride[0] * step[0] + j * stride[1] * step[1];
        if (next == 1) {
          std::copy_n(row, width, to);
        } else {
          for (int64_t w = 0; w < width; w++) to[w] = row[w * next];
        }
      }
  }

  // All windows; rows of one sample and row lie `sample_to` and `row_to` apart in the result.
  template <class T>
  void copy_all(const T* x, T* out, int64_t sample_to, int64_t row_to) const {
    const int64_t work = samples * channels * taps * count / 4;
    parallel_tasks(samples * channels, work, [&](int64_t task) {
      const int64_t n = task / channels, c = task % channels;
      const T* image = x + n * sample_step + c * channel_step;
      T* to = out + n * sample_to + c * taps * row_to;
      for (int64_t a = 0; a < kernel[0]; a++)
        for (int64_t b = 0; b < kernel[1]; b++)
          for (int64_t d = 0; d < kernel[2]; d++, to += row_to) {
            copy(image + a * dilation[0] * step[0] + b * dilation[1] * step[1] + d * dilation[2] * step[2], to);
          }
    });
  }
};

Tensor windows(const Tensor& x, std::vector<int64_t> kernel, std::vector<int64_t> stride,
               std::vector<int64_t> dilation, bool across) {
  const Windows w(x, kernel, stride, dilation);
  const int64_t rows = w.channels * w.taps;
  Tensor out = across ? new_tensor({rows, w.samples * w.count}, x.scalar_type())
                      : new_tensor({w.samples, rows, w.count}, x.scalar_type());
  dispatch("windows", x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    w.copy_all(static_cast<const T*>(x.data_ptr()), static_cast<T*>(out.data_ptr()),
               across ? w.count : rows * w.count, across ? w.samples * w.count : w.count);
  });
  return out;
}

}  // namespace
}  // namespace bicompile

STABLE_TORCH_LIBRARY_IMPL(bicompile, CPU, m) { m.impl("windows", TORCH_BOX(&bicompile::windows)); }
