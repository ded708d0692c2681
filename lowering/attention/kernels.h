// The inner kernels of attention in the order of order.py: scores (dot products of rows) and weighted sums of rows.
#pragma once

#include <algorithm>

#include "pack.h"

namespace bicompile::attention {

// out[m][0..kPanel) = (row m . row j of the panel) * scale: chains over the depth, ascending, in blocks of kBlock.
template <int M, class S>
void score_rows(const S* rows, const S* panel, int64_t depth, S scale, S* out, int64_t ld) {
  using Vec = VecOf<S>;
  constexpr int lanes = Vec::kLanes;
  const Vec factor = splat(scale);
  int64_t start = 0;
  do {
    const int64_t stop = std::min(depth, start + kBlock);
    Vec low[M], high[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) low[m] = high[m] = splat(S(0));
    for (int64_t d = start; d < stop; d++) {
      const Vec a = load(panel + d * 2 * lanes), b = load(panel + d * 2 * lanes + lanes);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) {
        const Vec x = splat(rows[d * M + m]);
        low[m] = fma(x, a, low[m]);
        high[m] = fma(x, b, high[m]);
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      S* to = out + m * ld;
      if (start > 0) low[m] = load(to) + low[m], high[m] = load(to + lanes) + high[m];
      if (stop == depth) low[m] = low[m] * factor, high[m] = high[m] * factor;
      store(to, low[m]);
      store(to + lanes, high[m]);
    }
    start = stop;
  } while (start < depth);
}

// Scores of `rows` packed rows against rows [begin, end) of `keys`: score of key j in column j - begin of `out`.
// Columns up to the next multiple of kPanel are written too.  Where unseen(first row, past row, first key, past key)
// holds for a rectangle of scores, they are left as they are.
template <class T, class S, class Unseen>
void score_tile(const S* packed, int64_t rows, Matrix<T> keys, int64_t begin, int64_t end, int64_t depth, S scale,
                const Unseen& unseen, S* out, int64_t ld) {
  struct Tag;
  S* panel = scratch<Tag, S>(depth * kPanel<S>);
  for (int64_t j = begin; j < end; j += kPanel<S>) {
    const int64_t count = std::min<int64_t>(kPanel<S>, end - j);
    if (unseen(0, rows, j, j + count)) continue;
    pack_panel(keys, j, count, depth, panel);
    for (int64_t r = 0; r < rows; r += kScoreRows) {
      const int64_t m = std::min<int64_t>(kScoreRows, rows - r);
      if (unseen(r, r + m, j, j + count)) continue;
      const S* from = packed + r * depth;
      S* to = out + r * ld + (j - begin);
      switch (m) {
        case 1: score_rows<1>(from, panel, depth, scale, to, ld); break;
        case 2: score_rows<2>(from, panel, depth, scale, to, ld); break;
        case 3: score_rows<3>(from, panel, depth, scale, to, ld); break;
        case 4: score_rows<4>(from, panel, depth, scale, to, ld); break;
        case 5: score_rows<5>(from, panel, depth, scale, to, ld); break;
        case 6: score_rows<6>(from, panel, depth, scale, to, ld); break;
        case 7: score_rows<7>(from, panel, depth, scale, to, ld); break;
        default: score_rows<kScoreRows>(from, panel, depth, scale, to, ld);
      }
    }
  }
}

// Where a row's weights lie: zero outside [first, last), and nowhere zero inside if dense.
struct Extent {
  int64_t first = 0, last = 0;
  bool dense = true;
};

// The extent of weights [0, n), n a multiple of kLanes.
template <class S>
Extent extent_of(const S* weights, int64_t n) {
  using Vec = VecOf<S>;
  Extent e{0, n, true};
  while (e.first < n && weights[e.first] == 0) e.first++;
  while (e.last > e.first && weights[e.last - 1] == 0) e.last--;
  int64_t j = e.first;
  for (; e.dense && j + 8 * Vec::kLanes <= e.last; j += 8 * Vec::kLanes) {
    Vec zeros = splat(S(0));
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
      zeros = where_equal(load(weights + j + i * Vec::kLanes), splat(S(0)), splat(S(1)), zeros);
    S lanes[Vec::kLanes];
    store(lanes, zeros);
    for (S lane : lanes) e.dense &= lane == 0;
  }
  for (; j < e.last; j++) e.dense &= weights[j] != 0;
  return e;
}

// sums[m][0..N vectors) = fma(weights[m][j], values[j], sums[m]) for j ascending in [0, count).
template <int M, int N, class V, class S>
void add_weighted_strip(const S* weights, int64_t ldw, const V* values, int64_t ldv, int64_t count, S* sums,
                        int64_t lds) {
  using Vec = VecOf<S>;
  constexpr int lanes = Vec::kLanes;
  Vec sum[M][N];
#pragma GCC unroll 6
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) sum[m][n] = load(sums + m * lds + n * lanes);
  for (int64_t j = 0; j < count; j++, values += ldv) {
    Vec value[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) value[n] = load(values + n * lanes);
#pragma GCC unroll 6
    for (int m = 0; m < M; m++) {
      const Vec w = splat(weights[m * ldw + j]);
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) sum[m][n] = fma(w, value[n], sum[m][n]);
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) store(sums + m * lds + n * lanes, sum[m][n]);
}

template <int M, class V, class S>
void add_weighted_rows(const S* weights, int64_t ldw, const V* values, int64_t ldv, int64_t count, S* sums,
                       int64_t width) {
  constexpr int lanes = VecOf<S>::kLanes;
  int64_t d = 0;
  if constexpr (4 * M <= kAccumulators)
    for (; d + 4 * lanes <= width; d += 4 * lanes)
      add_weighted_strip<M, 4>(weights, ldw, values + d, ldv, count, sums + d, width);
  for (; d + 2 * lanes <= width; d += 2 * lanes)
    add_weighted_strip<M, 2>(weights, ldw, values + d, ldv, count, sums + d, width);
  for (; d < width; d += lanes) add_weighted_strip<M, 1>(weights, ldw, values + d, ldv, count, sums + d, width);
}

template <class V, class S>
void add_weighted(int64_t rows, const S* weights, int64_t ldw, const V* values, int64_t ldv, int64_t count, S* sums,
                  int64_t width) {
  switch (rows) {
    case 1: return add_weighted_rows<1>(weights, ldw, values, ldv, count, sums, width);
    case 2: return add_weighted_rows<2>(weights, ldw, values, ldv, count, sums, width);
    case 3: return add_weighted_rows<3>(weights, ldw, values, ldv, count, sums, width);
    case 4: return add_weighted_rows<4>(weights, ldw, values, ldv, count, sums, width);
    case 5: return add_weighted_rows<5>(weights, ldw, values, ldv, count, sums, width);
    default: return add_weighted_rows<kSumRows>(weights, ldw, values, ldv, count, sums, width);
  }
}

template <class S, class V>
bool all_finite(const V* values, int64_t ldv, int64_t count, int64_t width) {
  using Vec = VecOf<S>;
  Vec poison = splat(S(0));  // NaN as soon as one value is infinite or NaN
  for (int64_t j = 0; j < count; j++)
    for (int64_t d = 0; d < width; d += Vec::kLanes) poison = fma(load(values + j * ldv + d), splat(S(0)), poison);
  S lanes[Vec::kLanes];
  store(lanes, poison);
  return std::all_of(lanes, lanes + Vec::kLanes, [](S x) { return x == 0; });
}

// Consecutive rows whose weights begin at the same key: they share their blocks.
struct RowGroup {
  int64_t row, count, first, last;
};

template <class S>
struct WeightedSums {
  const S* weights;       // [rows][ldw]
  int64_t ldw;
  const Extent* extents;  // [rows]
  int64_t rows, width;    // width of a padded row of totals, a multiple of kLanes
  S* totals;              // [rows][width]
  S* sums;                // [rows][width]: of the unfinished block

  // One chunk of keys, [begin, end), for one group.  `values` points at key `begin`.
  template <class V, class Finite>
  void add(const RowGroup& g, int64_t begin, int64_t end, const V* values, int64_t ldv, const Finite& finite) const {
    int64_t x = std::max(begin, g.first);
    const int64_t y = std::min(end, g.last);
    while (x < y) {
      const int64_t block_end = g.first + ((x - g.first) / kBlock + 1) * kBlock, z = std::min(y, block_end);
      bool covered = true;
      for (int64_t r = g.row; r < g.row + g.count; r++) covered &= extents[r].dense && extents[r].last >= z;
      const S* w = weights + g.row * ldw + x;
      const V* from = values + (x - begin) * ldv;
      S* to = sums + g.row * width;
      // A weight of zero must add nothing.  Times a finite value it adds nothing by itself: totals begin at +0, which
      // also hides the sign of a zero in a chain.
      if (covered || finite()) {
        add_weighted(g.count, w, ldw, from, ldv, z - x, to, width);
      } else {
        for (int64_t r = 0; r < g.count; r++)
          for (int64_t j = 0; j < z - x; j++)
            if (w[r * ldw + j] != 0)
              add_weighted(1, w + r * ldw + j, ldw, from + j * ldv, ldv, 1, to + r * width, width);
      }
      if (z == block_end) finish(g.row, g.count);
      x = z;
    }
  }

  void finish(int64_t row, int64_t count) const {
    using Vec = VecOf<S>;
    for (int64_t i = row * width; i < (row + count) * width; i += Vec::kLanes) {
      store(totals + i, load(totals + i) + load(sums + i));
      store(sums + i, splat(S(0)));
    }
  }
};

// totals[r][0..width) = sum over j of weights[r][j] * row j of `values`, padded rows: FMA chains in blocks of kBlock
// keys counted from extents[r].first, the blocks added in ascending order.  Weights of zero add nothing.
template <class T, class S>
void weighted_sums(const S* weights, int64_t ldw, const Extent* extents, int64_t rows, Matrix<T> values, int64_t width,
                   S* totals) {
  constexpr int64_t chunk = 64;  // keys that stay in the first-level cache while all rows pass over them
  struct Sums;
  struct Groups;
  struct Widened;
  const int64_t padded = round_up(width, VecOf<S>::kLanes);
  WeightedSums<S> task{weights, ldw, extents, rows, padded, totals, scratch<Sums, S>(rows * padded)};
  std::fill_n(totals, rows * padded, S(0));
  std::fill_n(task.sums, rows * padded, S(0));

  RowGroup* groups = scratch<Groups, RowGroup>(rows);
  int64_t num_groups = 0, begin = std::numeric_limits<int64_t>::max(), end = 0;
  for (int64_t r = 0; r < rows; r++) {
    const Extent& e = extents[r];
    if (e.first == e.last) continue;
    RowGroup* g = num_groups ? &groups[num_groups - 1] : nullptr;
    if (g && g->first == e.first && g->count < kSumRows && g->row + g->count == r) {
      g->count++;
      g->last = std::max(g->last, e.last);
    } else {
      groups[num_groups++] = {r, 1, e.first, e.last};
    }
    begin = std::min(begin, e.first);
    end = std::max(end, e.last);
  }
  if (num_groups == 0) return;

  const bool in_place = values.column == 1 && padded == width && (sizeof(T) == sizeof(S) || num_groups <= 2);
  S* widened = in_place ? nullptr : scratch<Widened, S>(chunk * padded);
  for (int64_t j = begin; j < end; j += chunk) {
    const int64_t count = std::min(chunk, end - j);
    auto pass = [&](auto* from, int64_t ld) {
      int known = -1;
      auto finite = [&] {
        if (known < 0) known = all_finite<S>(from, ld, count, padded);
        return known == 1;
      };
      for (int64_t i = 0; i < num_groups; i++) task.add(groups[i], j, j + count, from, ld, finite);
    };
    if (in_place) {
      pass(values.at(j), values.row);
    } else {
      widen_rows(values, j, count, width, widened);
      pass(static_cast<const S*>(widened), padded);
    }
  }
  task.finish(0, rows);
}

}  // namespace bicompile::attention
