// bicompile::windows on the CPU: copies, run by run where the last dim of the image is dense and the stride 1.
#include <algorithm>
#include <array>
#include <numeric>

#include "tensor.h"

namespace bicompile {
namespace {

using Ints = std::vector<int64_t>;

// One spatial dim: the image's elements, with zeros between and around them, and the windows that move over them.
struct Dim {
  int64_t size = 1, step = 0;  // of the image; the step in elements
  int64_t kernel = 1, stride = 1, dilation = 1, before = 0, after = 0, between = 1, positions = 1;

  Dim() = default;
  Dim(int64_t size, int64_t step, int64_t kernel, int64_t stride, int64_t dilation, int64_t before, int64_t after,
      int64_t between)
      : size(size), step(step), kernel(kernel), stride(stride), dilation(dilation), before(before), after(after),
        between(between) {
    STD_TORCH_CHECK(kernel > 0 && stride > 0 && dilation > 0 && between > 0,
                    "bicompile::windows: expected kernel, stride, dilation and between of 1 or more, got ", kernel, ", ",
                    stride, ", ", dilation, " and ", between);
    const int64_t reach = dilation * (kernel - 1) + 1, room = before + spread() + after;
    STD_TORCH_CHECK(room >= reach, "bicompile::windows: expected x to hold one window at least, got a dim of ", room,
                    " for one of ", reach);
    positions = (room - reach) / stride + 1;
  }

  int64_t spread() const { return size > 0 ? (size - 1) * between + 1 : 0; }

  // The image's element at kernel position k of the window at position p; -1 for a zero.
  int64_t source(int64_t p, int64_t k) const {
    const int64_t at = p * stride + k * dilation - before;
    return at >= 0 && at < spread() && at % between == 0 ? at / between : -1;
  }
};

// Where along a dim the elements at one kernel position are no zeros: every `period`-th position from `first` on.
struct Run {
  int64_t first = 0, count = 0, period, source = 0, source_step;

  Run(const Dim& d, int64_t k) {
    const int64_t common = std::gcd(d.stride, d.between);
    period = d.between / common, source_step = d.stride / common;
    while (first < d.positions && d.source(first, k) < 0) first++;
    if (first == d.positions) return;
    source = d.source(first, k);
    count = std::min((d.positions - first - 1) / period, (d.size - 1 - source) / source_step) + 1;
  }

  // from: the image's row, whose elements lie `step` apart; to: `width` elements.
  template <class T>
  void copy(const T* from, int64_t step, T* to, int64_t width) const {
    from += source * step;
    const int64_t by = source_step * step;
    if (period > 1) {
      std::fill_n(to, width, T());
      for (int64_t i = 0; i < count; i++) to[first + i * period] = from[i * by];
      return;
    }
    std::fill_n(to, first, T());
    if (by == 1) {
      std::copy_n(from, count, to + first);
    } else {
      for (int64_t i = 0; i < count; i++) to[first + i] = from[i * by];
    }
    std::fill(to + first + count, to + width, T());
  }
};

// The elements of all windows of one channel at kernel position (a, b, that of `run`).
template <class T>
void copy_tap(const std::array<Dim, 3>& dims, const T* image, int64_t a, int64_t b, const Run& run, T* to) {
  const int64_t width = dims[2].positions;
  for (int64_t i = 0; i < dims[0].positions; i++)
    for (int64_t j = 0; j < dims[1].positions; j++, to += width) {
      const int64_t y = dims[0].source(i, a), x = dims[1].source(j, b);
      if (y < 0 || x < 0) {
        std::fill_n(to, width, T());
      } else {
        run.copy(image + y * dims[0].step + x * dims[1].step, dims[2].step, to, width);
      }
    }
}

Tensor windows(const Tensor& x, Ints kernel, Ints stride, Ints dilation, Ints before, Ints after, Ints between,
               bool across) {
  const int64_t spatial = x.dim() - 2;
  bool fit = spatial >= 1 && spatial <= 3;
  for (const Ints* each : {&kernel, &stride, &dilation, &before, &after, &between})
    fit = fit && int64_t(each->size()) == spatial;
  STD_TORCH_CHECK(fit, "bicompile::windows: expected x of [N, C, *S] and one number for each S, got ", x.dim(),
                  " dims and ", kernel.size(), " numbers");
  std::array<Dim, 3> dims;
  for (int64_t i = 0; i < spatial; i++)
    dims[3 - spatial + i] =
        Dim(x.size(2 + i), x.stride(2 + i), kernel[i], stride[i], dilation[i], before[i], after[i], between[i]);
  int64_t taps = 1, count = 1;  // of a kernel, positions of a sample
  for (const Dim& d : dims) taps *= d.kernel, count *= d.positions;
  std::vector<Run> runs;
  for (int64_t k = 0; k < dims[2].kernel; k++) runs.emplace_back(dims[2], k);

  const int64_t samples = x.size(0), channels = x.size(1), rows = channels * taps;
  Tensor out = across ? new_tensor({rows, samples * count}, x.scalar_type())
                      : new_tensor({samples, rows, count}, x.scalar_type());
  const int64_t sample_to = across ? count : rows * count, row_to = across ? samples * count : count;
  dispatch("windows", x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    parallel_tasks(samples * channels, samples * rows * count / 4, [&](int64_t task) {
      const int64_t n = task / channels, c = task % channels;
      const T* image = static_cast<const T*>(x.data_ptr()) + n * x.stride(0) + c * x.stride(1);
      T* to = static_cast<T*>(out.data_ptr()) + n * sample_to + c * taps * row_to;
      for (int64_t a = 0; a < dims[0].kernel; a++)
        for (int64_t b = 0; b < dims[1].kernel; b++)
          for (const Run& run : runs) copy_tap(dims, image, a, b, run, to), to += row_to;
    });
  });
  return out;
}

}  // namespace
}  // namespace bicompile

STABLE_TORCH_LIBRARY_IMPL(bicompile, CPU, m) { m.impl("windows", TORCH_BOX(&bicompile::windows)); }
