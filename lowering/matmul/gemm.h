// Products of matrices, one or a batch: shares the outputs out among threads and runs the inner loop over the blocks.
//
// What follows the shapes here is the schedule: tile sizes, who packs what, how many threads.  The order of each
// output element is in multiply_tile() alone: a chain of fused multiply-adds in each block of kBlock k's, from +0,
// and the blocks' sums added up in ascending order.
#pragma once

#include <algorithm>

#include "bfloat16.h"
#include "stream.h"

namespace bicompile::matmul {

// beta * c, added to the rounded product; strides are those of c broadcast to the output.
template <class T>
struct Addend {
  const T* data = nullptr;  // none: nothing is added
  int64_t batch_stride = 0, row_stride = 0, column_stride = 0;
  typename Pack<T>::Element beta = 1, alpha = 1;
};

// out[i] = a[i] @ b[i], out contiguous [batch, rows, columns].
template <class T>
struct Product {
  int64_t batch, rows, columns, depth;
  Operand<T> left, right;
  int64_t left_batch_stride, right_batch_stride;
  Addend<T> addend;
  T* out;
  // Where the sums go as they are, contiguous, in the place of `out`: for a product whose k's come in pieces.
  typename Pack<T>::Element* kept = nullptr;
  bool continued = false;  // `kept` holds the sums of the blocks before

  int64_t left_batches() const { return left_batch_stride == 0 ? 1 : batch; }  // different ones
};

// How the work is cut up.  None of it can be seen in the bits.
struct Schedule {
  int64_t tile_rows, tile_columns;  // what one task computes
  int64_t chunk;                    // k's packed at a time, a multiple of kBlock
  bool stream;                      // read the right operand in place instead of packing it
  bool share_left;                  // pack the left operand once, before the tasks, instead of each its rows
  bool share_right;                 // the same of the right operand and its columns, which several tasks meet
};

// Columns of a panel, by the rows it meets: few rows leave registers for more columns.
template <class T>
constexpr int panel_width(int64_t rows) {
  return (rows <= kWideRows ? 4 : 2) * Pack<T>::kLanes;
}

// How many panels wide a tile of many rows is: at least 4, at most `most`.  Wide tiles' operands are packed fewer
// times; narrow tiles can be shared out more evenly.
inline int64_t panels_of_tile(int64_t row_tiles, int64_t rows, int64_t panels, int64_t width, int64_t most) {
  // Packing an element takes as long as about 32 multiply-adds (a Zen 4, tiles 128 to 512 wide, 2026-11-29).
  constexpr int64_t kPackCost = 32;
  const int64_t threads = torch::stable::get_num_threads();
  int64_t best = 0, least_cost = 0;
  for (int64_t count = std::min(most, panels); count >= std::min<int64_t>(4, panels); count--) {
    const int64_t tasks = row_tiles * ((panels + count - 1) / count), columns = count * width;
    const int64_t cost = (tasks + threads - 1) / threads * (rows * columns + kPackCost * (rows + columns));
    if (best == 0 || cost < least_cost) best = count, least_cost = cost;
  }
  return best;
}

template <class T>
Schedule schedule_for(const Product<T>& p) {
  // Fastest of a few on a Zen 4 with 1 MiB of L2: a tile's sums take half of it.
  constexpr int64_t kFewRows = 64, kTallRows = 256, kTallBytes = 2048;
  constexpr int64_t kSharedSize = 4 << 20;
  const bool along = p.right.k_stride == 1;
  Schedule s;
  s.stream = p.rows <= kStreamRows && (along || p.right.line_stride == 1) && p.kept == nullptr;
  s.share_left = s.stream || (p.left_batches() == 1 && p.rows * p.depth <= kSharedSize);
  s.share_right = false;
  const int64_t width = s.stream ? Pack<T>::kLanes : panel_width<T>(p.rows);
  const int64_t panels = (p.columns + width - 1) / width;
  const int64_t wanted = 8 * int64_t(torch::stable::get_num_threads());
  if (s.stream && !along) {
    s.chunk = kBlock;
    s.tile_rows = p.rows;
    const int64_t most = std::max<int64_t>(16, 256 / p.rows);  // the sums of a block stay in L1
    s.tile_columns = width * std::clamp<int64_t>(2 * p.batch * panels / wanted, 16, most);
    return s;
  }
  if (p.rows <= kFewRows) {
    // The right operand is read far along the way in which it lies: the processor's prefetcher follows that best.
    s.chunk = along ? 8 * kBlock : kBlock;
    s.tile_rows = p.rows;
    const int64_t least = along ? 1 : std::min<int64_t>(8, panels);
    s.tile_columns = width * std::clamp<int64_t>(p.batch * panels / wanted, least, along ? 8 : 16);
    return s;
  }
  s.chunk = kBlock;
  const int64_t row_tiles = (p.rows + kTallRows - 1) / kTallRows;
  s.tile_rows = ((p.rows + row_tiles - 1) / row_tiles + 15) / 16 * 16;  // so that no line of memory is read twice
  const int64_t most = kTallBytes / (width * int64_t(sizeof(typename Pack<T>::Element)));
  s.tile_columns = width * panels_of_tile(p.batch * row_tiles, s.tile_rows, panels, width, most);
  s.share_right = row_tiles > 1 && p.batch * p.columns * p.depth <= kSharedSize;
  s.share_left = s.share_left && !s.share_right;  // a task's own rows stay in its cache
  return s;
}

// One value of the storage type after another rounding: what a chain of separate tensor operations would give.
template <class T>
BICOMPILE_INLINE typename Pack<T>::Vec rounded(typename Pack<T>::Vec x) {
  if constexpr (sizeof(T) == 2) {
    T lanes[Pack<T>::kLanes];
    store_as(lanes, x);
    return load(lanes);
  } else {
    return x;
  }
}

template <class T>
typename Pack<T>::Vec load_addend(const T* c, int64_t stride, int count) {
  using Element = typename Pack<T>::Element;
  if (stride == 1) return count == Pack<T>::kLanes ? load(c) : load_first(c, count, Element(0));
  if (stride == 0) return splat(Element(widen(*c)));
  Element lanes[Pack<T>::kLanes] = {};
  for (int i = 0; i < count; i++) lanes[i] = widen(c[i * stride]);
  return load(lanes);
}

// Rounds finished sums to the output type, adds the addend in that type, and stores them.
template <class T>
void finish(const Product<T>& p, int64_t batch, int64_t row, int64_t rows, int64_t column, int64_t columns,
            const typename Pack<T>::Element* sums, int64_t sum_stride) {
  using Vec = typename Pack<T>::Vec;
  constexpr int kLanes = Pack<T>::kLanes;
  FloatMode mode(false);
  const Addend<T>& add = p.addend;
  const Vec alpha = splat(add.alpha), beta = splat(add.beta);
  for (int64_t i = 0; i < rows; i++) {
    T* to = p.out + (batch * p.rows + row + i) * p.columns + column;
    const T* c = add.data + batch * add.batch_stride + (row + i) * add.row_stride + column * add.column_stride;
    for (int64_t j = 0; j < columns; j += kLanes) {
      const int count = int(std::min<int64_t>(columns - j, kLanes));
      Vec y = load(sums + i * sum_stride + j);
      if (add.alpha != 1) y = rounded<T>(rounded<T>(y) * alpha);
      if (add.data != nullptr) {
        Vec term = load_addend(c + j * add.column_stride, add.column_stride, count);
        if (add.beta != 1) term = rounded<T>(term * beta);
        y = rounded<T>(y) + term;
      }
      if (count == kLanes) {
        store_as(to + j, y);
      } else {
        store_as(to + j, y, count);
      }
    }
  }
}

// Copies a tile's sums between `p.kept` and the task's own memory, one way or the other.
template <class T, bool kKeep>
void copy_kept(const Product<T>& p, int64_t batch, int64_t row, int64_t rows, int64_t column, int64_t columns,
               typename Pack<T>::Element* sums, int64_t sum_stride) {
  for (int64_t i = 0; i < rows; i++) {
    auto* kept = p.kept + (batch * p.rows + row + i) * p.columns + column;
    auto* own = sums + i * sum_stride;
    std::copy_n(kKeep ? own : kept, columns, kKeep ? kept : own);
  }
}

// The left operand's rows [row, row + rows), k's [k, k + depth_k): packed rows for each block, blocks apart.
template <class T>
void pack_left(const Operand<T>& left, int64_t row, int64_t rows, int64_t k, int64_t depth_k,
               typename Pack<T>::Element* to, int64_t block_stride) {
  for (int64_t done = 0; done < depth_k; done += kBlock, to += block_stride) {
    pack_rows(left, row, int(rows), k + done, int(std::min<int64_t>(kBlock, depth_k - done)), to);
  }
}

// What one task computes: outputs [row, row + rows) x [column, column + columns) of one matrix of the batch.
struct Tile {
  int64_t batch, row, rows, column, columns;
};

template <class T>
Operand<T> of_batch(const Operand<T>& x, int64_t offset) {
  return {x.data + offset, x.line_stride, x.k_stride, x.image, x.end, x.by_position};
}

// Memory that will be read soon, asked for a part at a time while the processor multiplies.
struct Ahead {
  const char* data;
  int64_t lines, stride, bytes;
  void fetch(int64_t part, int64_t parts) const {
    for (int64_t line = lines * part / parts; line < lines * (part + 1) / parts; line++) {
      for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(data + line * stride + at, 0, 2);
    }
  }
};

template <class T>
Ahead ahead_of(const Operand<T>& x, int64_t line, int64_t lines, int64_t k, int64_t depth_k) {
  const char* data = reinterpret_cast<const char*>(x.at(line, k));
  constexpr int64_t kSize = sizeof(T);
  if (x.k_stride == 1) return {data, lines, x.line_stride * kSize, depth_k * kSize};
  if (x.line_stride == 1) return {data, depth_k, x.k_stride * kSize, lines * kSize};
  return {data, 0, 0, 0};
}

// The lines of a tile that will be written soon: asked for, so that the stores need not wait for them.
template <class T>
BICOMPILE_INLINE void out_ahead(const Product<T>& p, const Tile& t, int64_t row, int rows, int64_t at, int64_t width) {
  if (p.out == nullptr) return;
  const int64_t columns = std::min(width, t.columns - at);
  const T* to = p.out + (t.batch * p.rows + t.row + row) * p.columns + t.column + at;
  for (int i = 0; i < rows; i++, to += p.columns) {
    for (int64_t j = 0; j < columns; j += 64 / int(sizeof(T))) __builtin_prefetch(to + j, 1);
  }
}

// Elements of one panel of a right operand that is packed before the tasks, all of its k's.
template <class T>
int64_t panel_size(int64_t depth, int64_t width) {
  return std::max<int64_t>(1, (depth + kBlock - 1) / kBlock) * Pack<T>::kDepth * width;
}

// Many rows, or columns that lie anyhow: the columns are packed in panels, then met by one tile of rows after another.
template <class T, PairBy by>
void panel_task(const Product<T>& p, const Schedule& s, const typename Pack<T>::Element* packed_left,
                const typename Pack<T>::Element* packed_right, const Tile& t) {
  using P = Pack<T>;
  using Element = typename P::Element;
  struct LeftTag;
  struct RightTag;
  struct SumTag;
  const Operand<T> left = of_batch(p.left, t.batch * p.left_batch_stride);
  const Operand<T> right = of_batch(p.right, t.batch * p.right_batch_stride);
  const bool wide = packed_right == nullptr && t.rows <= kWideRows;
  const int64_t width = panel_width<T>(packed_right ? p.rows : t.rows);
  const int64_t sum_stride = (t.columns + width - 1) / width * width;
  const int64_t panel_stride = packed_right ? panel_size<T>(p.depth, width) : s.chunk / P::kPair * width;
  // Columns along k are packed one panel at a time, to find it in the cache; columns across k all at once.
  const int64_t group = right.k_stride == 1 && packed_right == nullptr ? width : sum_stride;
  Element* sums = scratch<SumTag, Element>(t.rows * sum_stride);
  Element* own_right = packed_right ? nullptr : scratch<RightTag, Element>(group / width * panel_stride);
  Element* own_left = packed_left ? nullptr : scratch<LeftTag, Element>(s.chunk / kBlock * t.rows * P::kRowStride);
  // Packed before the tasks, it holds all rows of the product; else those of this tile.
  const int64_t block_stride = (packed_left ? p.rows : t.rows) * P::kRowStride;
  const int64_t row_tiles = (t.rows + kTileRows - 1) / kTileRows;
  if (p.continued) copy_kept<T, false>(p, t.batch, t.row, t.rows, t.column, t.columns, sums, sum_stride);
  for (int64_t k = 0; k == 0 || k < p.depth; k += s.chunk) {
    const int64_t chunk = std::min(s.chunk, p.depth - k), next_chunk = std::min(s.chunk, p.depth - k - chunk);
    const int64_t blocks = std::max<int64_t>(1, (chunk + kBlock - 1) / kBlock);
    const Element* left_rows = own_left;
    if (packed_left != nullptr) {
      left_rows = packed_left + k / kBlock * block_stride + t.row * P::kRowStride;
    } else {
      pack_left(left, t.row, t.rows, k, chunk, own_left, block_stride);
    }
    const Element* panels = own_right;
    if (packed_right != nullptr) {
      panels = packed_right + t.column / width * panel_stride + k / kBlock * P::kDepth * width;
    }
    const bool last = k + s.chunk >= p.depth;
    // Sums that need no more than a place are written to it.
    const bool direct = last && std::is_same_v<T, Element> && p.kept == nullptr && p.addend.data == nullptr &&
                        p.addend.alpha == 1;
    const Ahead left_ahead = ahead_of(left, t.row, packed_left ? 0 : t.rows, k + chunk, next_chunk);
    for (int64_t at = 0; at < t.columns; at += width) {
      const int64_t group_start = at / group * group, in_group = std::min(group, t.columns - group_start);
      if (at == group_start && own_right != nullptr) {
        pack_columns(right, t.column + at, in_group, k, int(chunk), int(width), panel_stride, own_right);
      }
      // What is packed next: another group of this chunk, or the first one of the next chunk.
      const int64_t next = group_start + group;
      const Ahead right_ahead =
          next < t.columns ? ahead_of(right, t.column + next, std::min(group, t.columns - next), k, chunk)
                           : ahead_of(right, t.column, std::min(group, t.columns), k + chunk, next_chunk);
      int64_t call = (at - group_start) / width * blocks * row_tiles;
      const int64_t calls = (in_group + width - 1) / width * blocks * row_tiles;
      for (int64_t block = 0; block < blocks; block++) {
        const int depth = elements<T>(int(std::min<int64_t>(kBlock, chunk - block * kBlock)));
        const Element* columns = panels + (at - group_start) / width * panel_stride + block * P::kDepth * width;
        int64_t row = 0;
        for (int64_t tile = 0; tile < row_tiles; tile++, call++) {
          const int rows = int(t.rows / row_tiles + (tile < t.rows % row_tiles));
          if (own_right != nullptr) right_ahead.fetch(call, calls);
          const bool ends = last && block + 1 == blocks;
          if (ends) out_ahead(p, t, row, rows, at, width);
          if (at == 0) left_ahead.fetch(block * row_tiles + tile, blocks * row_tiles);
          Element *sum = sums + row * sum_stride + at, *to = sum;
          int64_t to_stride = sum_stride;
          if constexpr (std::is_same_v<T, Element>) {
            if (ends && direct && t.columns - at >= width) {
              to = p.out + (t.batch * p.rows + t.row + row) * p.columns + t.column + at, to_stride = p.columns;
            }
          }
          tile_kernel<T, by>(rows, wide)(depth, left_rows + block * block_stride + row * P::kRowStride, columns, width,
                                         k + block == 0 && !p.continued ? nullptr : sum, sum_stride, to, to_stride);
          row += rows;
        }
      }
      if (!last) continue;
      const int64_t there = std::min(width, t.columns - at);
      if (direct && there == width) continue;
      if (p.kept != nullptr) {
        copy_kept<T, true>(p, t.batch, t.row, t.rows, t.column + at, there, sums + at, sum_stride);
      } else {
        finish(p, t.batch, t.row, t.rows, t.column + at, there, sums + at, sum_stride);
      }
    }
  }
}

// A few rows: the columns are read in place.
template <class T, PairBy by>
void stream_task(const Product<T>& p, const Schedule& s, const typename Pack<T>::Element* packed_left, const Tile& t) {
  using Element = typename Pack<T>::Element;
  struct SumTag;
  constexpr int kLanes = Pack<T>::kLanes;
  const Operand<T> right = of_batch(p.right, t.batch * p.right_batch_stride);
  if (right.k_stride == 1) {
    const StreamColumns<T> kernel = stream_columns_kernel<T, by>(int(t.rows));
    Element sums[kStreamRows * kLanes];
    for (int64_t at = 0; at < t.columns; at += kLanes) {
      const int there = int(std::min<int64_t>(kLanes, t.columns - at));
      kernel(right, t.column + at, there, p.depth, packed_left, sums);
      finish(p, t.batch, t.row, t.rows, t.column + at, there, sums, kLanes);
    }
    return;
  }
  const int64_t full = t.columns / kLanes * kLanes;
  if (full > 0 && p.depth > 0) {
    Element* part = scratch<SumTag, Element>(2 * t.rows * full);
    Element* sums = part + t.rows * full;
    stream_rows_kernel<T, by>(int(t.rows))(right, t.column, full, p.depth, packed_left, part, sums);
    finish(p, t.batch, t.row, t.rows, t.column, full, sums, full);
  }
  const int64_t rest = p.depth > 0 ? full : 0;
  if (rest == t.columns) return;
  panel_task<T, by>(p, s, packed_left, nullptr, {t.batch, t.row, t.rows, t.column + rest, t.columns - rest});
}

template <class T, PairBy by>
void run(const Product<T>& p) {
  using P = Pack<T>;
  using Element = typename P::Element;
  struct LeftTag;
  struct RightTag;
  constexpr int64_t kPackRows = 256, kPackColumns = 128;  // a task's share of the packing
  const Schedule s = schedule_for(p);
  const int64_t block_stride = p.rows * P::kRowStride;
  const int64_t packed_size = std::max<int64_t>(1, (p.depth + kBlock - 1) / kBlock) * block_stride;
  Element* shared_left = nullptr;
  if (s.share_left) {
    shared_left = scratch<LeftTag, Element>(p.left_batches() * packed_size);
    const int64_t blocks = packed_size / block_stride;
    const int64_t parts = (p.rows + kPackRows - 1) / kPackRows;
    parallel_tasks(p.left_batches() * blocks * parts, p.left_batches() * p.rows * p.depth, [&](int64_t task) {
      const int64_t batch = task / parts / blocks, k = task / parts % blocks * kBlock, row = task % parts * kPackRows;
      const Operand<T> left = of_batch(p.left, batch * p.left_batch_stride);
      const int rows = int(std::min(kPackRows, p.rows - row)), depth_k = int(std::min<int64_t>(kBlock, p.depth - k));
      Element* to = shared_left + batch * packed_size + k / kBlock * block_stride + row * P::kRowStride;
      pack_rows(left, row, rows, k, depth_k, to);
    });
  }
  const int64_t width = panel_width<T>(p.rows), panel_stride = panel_size<T>(p.depth, width);
  const int64_t right_size = (p.columns + width - 1) / width * panel_stride;
  Element* shared_right = nullptr;
  if (s.share_right) {
    shared_right = scratch<RightTag, Element>(p.batch * right_size);
    const int64_t blocks = (p.depth + kBlock - 1) / kBlock;
    const int64_t parts = (p.columns + kPackColumns - 1) / kPackColumns;
    parallel_tasks(p.batch * blocks * parts, p.batch * p.columns * p.depth, [&](int64_t task) {
      const int64_t batch = task / parts / blocks, block = task / parts % blocks, column = task % parts * kPackColumns;
      const Operand<T> right = of_batch(p.right, batch * p.right_batch_stride);
      const int64_t columns = std::min(kPackColumns, p.columns - column), k = block * kBlock;
      Element* to = shared_right + batch * right_size + column / width * panel_stride + block * P::kDepth * width;
      pack_columns(right, column, columns, k, int(std::min<int64_t>(kBlock, p.depth - k)), int(width), panel_stride, to);
    });
  }
  const int64_t row_tiles = (p.rows + s.tile_rows - 1) / s.tile_rows;
  const int64_t column_tiles = (p.columns + s.tile_columns - 1) / s.tile_columns;
  const int64_t tasks = p.batch * row_tiles * column_tiles;
  const int64_t work = p.batch * p.columns * (p.depth + 1) * (p.rows + 4) / 8;
  const bool flush = std::is_same_v<T, bf16> && kFlushInHardware;
  parallel_tasks(tasks, work, [&](int64_t task) {
    Tile t;
    t.row = task % row_tiles * s.tile_rows;
    t.rows = std::min(s.tile_rows, p.rows - t.row);
    t.column = task / row_tiles % column_tiles * s.tile_columns;
    t.columns = std::min(s.tile_columns, p.columns - t.column);
    t.batch = task / row_tiles / column_tiles;
    const Element* left = shared_left ? shared_left + t.batch % p.left_batches() * packed_size : nullptr;
    const Element* right = shared_right ? shared_right + t.batch * right_size : nullptr;
    if (s.stream) {
      stream_task<T, by>(p, s, left, t);
    } else {
      panel_task<T, by>(p, s, left, right, t);
    }
  }, flush);
}

template <class T>
void multiply(const Product<T>& p) {
  if (p.batch == 0 || p.rows == 0 || p.columns == 0) return;
#if defined(BICOMPILE_AVX512) && defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, bf16>) {
    if (pair_by() == PairBy::kInstruction) return run<T, PairBy::kInstruction>(p);
  }
#endif
  run<T, PairBy::kFused>(p);
}

}  // namespace bicompile::matmul
