// bicompile::windows on the CPU: copies, run by run where the last dim of the image is dense and the stride 1.
#include "windows/image.h"

namespace bicompile {
namespace {

using windows::Image;
using windows::Ints;

Tensor columns(const Tensor& x, Ints kernel, Ints stride, Ints dilation, Ints before, Ints after, Ints between,
               bool across) {
  const Image image("windows", x, kernel, stride, dilation, before, after, between);
  const int64_t samples = x.size(0), channels = x.size(1), rows = channels * image.taps, count = image.positions;
  Tensor out = across ? new_tensor({rows, samples * count}, x.scalar_type())
                      : new_tensor({samples, rows, count}, x.scalar_type());
  const int64_t sample_to = across ? count : rows * count, row_to = across ? samples * count : count;
  dispatch("windows", x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    parallel_tasks(samples * channels, samples * rows * count / 4, [&](int64_t task) {
      const int64_t n = task / channels, row = task % channels * image.taps;
      const T* sample = static_cast<const T*>(x.data_ptr()) + n * image.sample_step;
      T* to = static_cast<T*>(out.data_ptr()) + n * sample_to + row * row_to;
      image.copy(sample, row, image.taps, 0, count, to, row_to, windows::Exactly());
    });
  });
  return out;
}

}  // namespace
}  // namespace bicompile

STABLE_TORCH_LIBRARY_IMPL(bicompile, CPU, m) { m.impl("windows", TORCH_BOX(&bicompile::columns)); }
