// bicompile::windows and interleaved on the CPU: copies, run by run where the last dim of the image is dense and the
// stride 1.
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

Tensor interleaved(const Tensor& phases, Ints strides) {
  const int64_t spatial = phases.dim() - 3;
  int64_t steps[3] = {1, 1, 1}, counts[3] = {1, 1, 1}, number = 1;
  const bool fit = spatial >= 1 && spatial <= 3 && int64_t(strides.size()) == spatial;
  for (int64_t i = 0; fit && i < spatial; i++) {
    steps[3 - spatial + i] = strides[i], counts[3 - spatial + i] = phases.size(3 + i), number *= strides[i];
  }
  STD_TORCH_CHECK(fit && number == phases.size(0) && phases.is_contiguous(),
                  "bicompile::interleaved: expected contiguous phases of [strides' product, N, C, *S] and one stride for ",
                  "each S, got ", phases.dim(), " dims, ", strides.size(), " strides");
  std::vector<int64_t> sizes = {phases.size(1), phases.size(2)};
  for (int64_t i = 0; i < spatial; i++) sizes.push_back(phases.size(3 + i) * strides[i]);
  Tensor out = new_tensor(sizes, phases.scalar_type());
  const int64_t channels = phases.size(1) * phases.size(2), count = counts[0] * counts[1] * counts[2];
  const int64_t lines = counts[1] * steps[1], width = counts[2] * steps[2];
  dispatch("interleaved", phases.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    parallel_tasks(channels, out.numel() / 2, [&](int64_t channel) {
      T* to = static_cast<T*>(out.data_ptr()) + channel * number * count;
      for (int64_t phase = 0; phase < number; phase++) {
        const int64_t a = phase / steps[2] / steps[1], b = phase / steps[2] % steps[1], c = phase % steps[2];
        const T* from = static_cast<const T*>(phases.data_ptr()) + (phase * channels + channel) * count;
        for (int64_t i = 0; i < counts[0]; i++)
          for (int64_t j = 0; j < counts[1]; j++, from += counts[2]) {
            T* line = to + ((i * steps[0] + a) * lines + j * steps[1] + b) * width + c;
            for (int64_t p = 0; p < counts[2]; p++) line[p * steps[2]] = from[p];
          }
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace bicompile

STABLE_TORCH_LIBRARY_IMPL(bicompile, CPU, m) {
  m.impl("windows", TORCH_BOX(&bicompile::columns));
  m.impl("interleaved", TORCH_BOX(&bicompile::interleaved));
}
