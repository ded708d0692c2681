// Images with zeros between and around their elements, and the windows that move over them, as the columns of a matrix.
#pragma once

#include <algorithm>
#include <array>
#include <cstring>
#include <numeric>
#include <vector>

#include "tensor.h"

namespace bicompile::windows {

using Ints = std::vector<int64_t>;

// Copies elements to a place of their own.
struct Exactly {
  template <class T>
  void copy(const T* from, int64_t count, T* to) const {
    std::copy_n(from, count, to);
  }
  template <class T>
  void zeros(int64_t count, T* to) const {
    std::fill_n(to, count, T());
  }
  template <class T>
  bool may_read(const T*, int64_t) const {
    return true;
  }
};

// Copies to where what follows is written later, or is free: whole pieces, which takes less time than to count.
template <class T>
struct Loosely {
  static constexpr int64_t kPiece = 64 / sizeof(T);
  const T* end;  // of what may be read

  bool may_read(const T* from, int64_t count) const { return end - from >= (count + kPiece - 1) / kPiece * kPiece; }
  void copy(const T* from, int64_t count, T* to) const {
    for (int64_t i = 0; i < count; i += kPiece) std::memcpy(to + i, from + i, sizeof(T) * kPiece);
  }
  void zeros(int64_t count, T* to) const {
    for (int64_t i = 0; i < count; i += kPiece) std::memset(to + i, 0, sizeof(T) * kPiece);
  }
};

// One spatial dim: the image's elements, with zeros between and around them, and the windows that move over them.
struct Dim {
  int64_t size = 1, step = 0;  // of the image; the step in elements
  int64_t kernel = 1, stride = 1, dilation = 1, before = 0, after = 0, between = 1, positions = 1;

  Dim() = default;
  Dim(const char* op, int64_t size, int64_t step, int64_t kernel, int64_t stride, int64_t dilation, int64_t before,
      int64_t after, int64_t between)
      : size(size), step(step), kernel(kernel), stride(stride), dilation(dilation), before(before), after(after),
        between(between) {
    STD_TORCH_CHECK(kernel > 0 && stride > 0 && dilation > 0 && between > 0, "bicompile::", op,
                    ": expected kernel, stride, dilation and between of 1 or more, got ", kernel, ", ", stride, ", ",
                    dilation, " and ", between);
    const int64_t reach = dilation * (kernel - 1) + 1, room = before + spread() + after;
    STD_TORCH_CHECK(room >= reach, "bicompile::", op, ": expected x to hold one window at least, got a dim of ", room,
                    " for one of ", reach);
    positions = (room - reach) / stride + 1;
  }

  int64_t spread() const { return size > 0 ? (size - 1) * between + 1 : 0; }

  // The image's element at kernel position k of the window at position p; -1 for a zero.
  int64_t source(int64_t p, int64_t k) const {
    const int64_t at = p * stride + k * dilation - before;
    if (at < 0 || at >= spread()) return -1;
    return between == 1 ? at : at % between == 0 ? at / between : -1;
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

  // Positions [begin, begin + length) of the image's row `from`, whose elements lie `step` apart.
  template <class T, class Copy>
  void copy(const T* from, int64_t step, int64_t begin, int64_t length, T* to, const Copy& by_pieces) const {
    const int64_t by = source_step * step;
    from += source * step;
    if (period > 1) {
      std::fill_n(to, length, T());
      for (int64_t i = std::max<int64_t>(0, (begin - first + period - 1) / period); i < count; i++) {
        const int64_t at = first + i * period - begin;
        if (at >= length) break;
        to[at] = from[i * by];
      }
      return;
    }
    const int64_t zeros = std::clamp<int64_t>(first - begin, 0, length);
    const int64_t end = std::max(zeros, std::min(first + count - begin, length));
    from += (begin + zeros - first) * by;
    by_pieces.zeros(zeros, to);
    if (by == 1) {
      by_pieces.may_read(from, end - zeros) ? by_pieces.copy(from, end - zeros, to + zeros)
                                            : Exactly().copy(from, end - zeros, to + zeros);
    } else {
      for (int64_t i = zeros; i < end; i++) to[i] = from[(i - zeros) * by];
    }
    by_pieces.zeros(length - end, to + end);
  }
};

// An image [N, C, *S]: its windows are a matrix [C * taps, N * positions].
struct Image {
  std::array<Dim, 3> dims;
  std::vector<Run> runs;           // of the last dim, by kernel position
  int64_t taps = 1, positions = 1;  // of a kernel; of a sample
  int64_t sample_step, channel_step;
  int64_t extent = 1;  // elements from the first to the last one

  Image(const char* op, const Tensor& x, const Ints& kernel, const Ints& stride, const Ints& dilation,
        const Ints& before, const Ints& after, const Ints& between) {
    const int64_t spatial = x.dim() - 2;
    bool fit = spatial >= 1 && spatial <= 3;
    for (const Ints* each : {&kernel, &stride, &dilation, &before, &after, &between})
      fit = fit && int64_t(each->size()) == spatial;
    STD_TORCH_CHECK(fit, "bicompile::", op, ": expected x of [N, C, *S] and one number for each S, got ", x.dim(),
                    " dims and ", kernel.size(), " numbers");
    for (int64_t i = 0; i < spatial; i++)
      dims[3 - spatial + i] =
          Dim(op, x.size(2 + i), x.stride(2 + i), kernel[i], stride[i], dilation[i], before[i], after[i], between[i]);
    for (const Dim& d : dims) taps *= d.kernel, positions *= d.positions;
    for (int64_t k = 0; k < dims[2].kernel; k++) runs.emplace_back(dims[2], k);
    sample_step = x.stride(0), channel_step = x.stride(1);
    for (int64_t i = 0; i < x.dim(); i++) extent += (x.size(i) - 1) * x.stride(i);
  }

  // Whether elements that lie `stride` apart are read more than once along the last dim.
  bool reads_apart() const { return dims[2].stride > 1 && dims[2].between == 1 && dims[2].kernel > dims[2].stride; }

  // Elements of a channel of `in_phases()`.
  int64_t channel_in_phases() const { return dims[0].size * dims[1].size * dims[2].stride * phase(); }

  // The image of which each line holds its elements phase by phase, those that are equal by the stride side by side.
  Image in_phases(int64_t samples, int64_t channels) const {
    Image found = *this;
    found.dims[2].step = 1;
    found.dims[1].step = dims[2].stride * phase();
    found.dims[0].step = dims[1].size * found.dims[1].step;
    found.channel_step = channel_in_phases(), found.sample_step = channels * found.channel_step;
    found.extent = samples * found.sample_step;
    for (Run& run : found.runs) {
      run.source = run.source % dims[2].stride * phase() + run.source / dims[2].stride;
      run.source_step = 1;
    }
    return found;
  }

  // Writes the phases of one channel of this image to `to`.
  template <class T>
  void write_phases(const T* channel, T* to) const {
    const Dim& d = dims[2];
    for (int64_t y = 0; y < dims[0].size; y++)
      for (int64_t z = 0; z < dims[1].size; z++)
        for (int64_t f = 0; f < d.stride; f++, to += phase()) {
          const T* line = channel + y * dims[0].step + z * dims[1].step;
          for (int64_t q = 0, at = f; at < d.size; q++, at += d.stride) to[q] = line[at * d.step];
        }
  }

  // Rows [row, row + rows) of columns [column, column + columns), the rows `to_step` apart.
  template <class T, class Copy>
  void copy(const T* x, int64_t row, int64_t rows, int64_t column, int64_t columns, T* to, int64_t to_step,
            const Copy& by_pieces) const {
    const int64_t width = dims[2].positions, line = column / width;
    const int64_t sample = column / positions, last_sample = (column + columns - 1) / positions;
    for (int64_t r = row; r < row + rows; r++, to += to_step) {
      const int64_t tap = r % taps, c = tap % dims[2].kernel, b = tap / dims[2].kernel % dims[1].kernel;
      const int64_t a = tap / dims[2].kernel / dims[1].kernel;
      const Run& run = runs[c];
      const T* channel = x + sample * sample_step + r / taps * channel_step;
      const bool simple = is_simple(run) && by_pieces.may_read(channel + (last_sample - sample) * sample_step +
                                                               (dims[0].size - 1) * dims[0].step +
                                                               (dims[1].size - 1) * dims[1].step + run.source, run.count);
      int64_t i = line / dims[1].positions % dims[0].positions, j = line % dims[1].positions, p = column % width;
      for (int64_t done = 0; done < columns; p = 0) {
        const int64_t part = std::min(width - p, columns - done);
        const int64_t y = dims[0].source(i, a);
        int64_t lines = 1;
        if (simple && y >= 0 && part == width) {
          lines = std::min(dims[1].positions - j, (columns - done) / width);
          copy_lines(channel + y * dims[0].step + run.source, b, j, lines, run, to + done, by_pieces);
          done += lines * width;
        } else {
          const int64_t z = dims[1].source(j, b);
          if (y < 0 || z < 0) {
            by_pieces.zeros(part, to + done);
          } else {
            const T* from = channel + y * dims[0].step + z * dims[1].step;
            run.copy(from, dims[2].step, p, part, to + done, by_pieces);
          }
          done += part;
        }
        j += lines;
        if (j < dims[1].positions) continue;
        j = 0;
        if (++i == dims[0].positions) i = 0, channel += sample_step;
      }
    }
  }

 private:
  int64_t phase() const { return (dims[2].size + dims[2].stride - 1) / dims[2].stride; }

  // Whether lines of windows are pieces of lines of the image, all of them as long.
  bool is_simple(const Run& run) const {
    return dims[1].between == 1 && run.period == 1 && run.source_step * dims[2].step == 1;
  }

  // Whole lines [j, j + lines) of a tap's elements, of a simple run that begins at `from` in the image's first line.
  template <class T, class Copy>
  void copy_lines(const T* from, int64_t b, int64_t j, int64_t lines, const Run& run, T* to,
                  const Copy& by_pieces) const {
    const Dim& d = dims[1];
    const int64_t width = dims[2].positions, end = run.first + run.count;
    int64_t z = j * d.stride + b * d.dilation - d.before;
    for (int64_t line = 0; line < lines; line++, z += d.stride, to += width) {
      if (z < 0 || z >= d.size) {
        by_pieces.zeros(width, to);
        continue;
      }
      if (run.first > 0) by_pieces.zeros(run.first, to);
      by_pieces.copy(from + z * d.step, run.count, to + run.first);
      if (end < width) by_pieces.zeros(width - end, to + end);
    }
  }
};

}  // namespace bicompile::windows
