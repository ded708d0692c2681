// Attention, forward: one task owns a tile of query rows of one group of heads that share their keys.
#pragma once

#include "elementwise/math.h"

#include "kernels.h"
#include "problem.h"

namespace bicompile::attention {

template <class S>
constexpr S kMinusInfinity = -std::numeric_limits<S>::infinity();

// Calls f(mask, hides): `mask` typed and pointing to element `offset`, hides(element) saying whether it hides its key.
template <class S, class F>
auto with_mask(const Problem& p, int64_t offset, const F& f) {
  auto additive = [](auto a) { return S(widen(a)) == kMinusInfinity<S>; };
  switch (p.mask_dtype) {
    case ScalarType::Bool: return f(static_cast<const uint8_t*>(p.mask.data) + offset, [](uint8_t m) { return !m; });
    case ScalarType::Float: return f(static_cast<const float*>(p.mask.data) + offset, additive);
    case ScalarType::Double: return f(static_cast<const double*>(p.mask.data) + offset, additive);
    case ScalarType::BFloat16: return f(static_cast<const bf16*>(p.mask.data) + offset, additive);
    default: return f(static_cast<const fp16*>(p.mask.data) + offset, additive);
  }
}

// Scores [0, n) of one query (or key) after the mask, whose elements lie `step` apart.  A masked score is -infinity
// even where it was NaN.
template <class S>
void apply_mask(const Problem& p, int64_t offset, int64_t step, int64_t n, S* scores) {
  with_mask<S>(p, offset, [&](auto* m, auto hides) {
    auto apply = [&](int64_t by) {
      for (int64_t j = 0; j < n; j++) {
        const auto a = m[j * by];
        if constexpr (std::is_same_v<decltype(a), const uint8_t>) {
          scores[j] = hides(a) ? kMinusInfinity<S> : scores[j];
        } else {
          scores[j] = hides(a) ? kMinusInfinity<S> : scores[j] + S(widen(a));
        }
      }
    };
    step == 1 ? apply(1) : apply(step);  // the literal 1 lets the compiler make vectors of the usual case
  });
}

// Keys [first, past) of a row: none outside can be seen.
struct Range {
  int64_t first, past;
};

// What the mask leaves of keys [0, n): its hidden ends are cut off.
template <class S>
Range seen_of(const Problem& p, int64_t offset, int64_t step, int64_t n) {
  return with_mask<S>(p, offset, [&](auto* m, auto hides) {
    Range r{0, n};
    while (r.past > 0 && hides(m[(r.past - 1) * step])) r.past--;
    while (r.first < r.past && hides(m[r.first * step])) r.first++;
    return r;
  });
}

// Sum of weights [0, n): lane j mod 32 in blocks of kBlock, blocks in ascending order, then halves of the lanes.
template <class S>
S sum_of_weights(const S* weights, int64_t n) {
  using Vec = VecOf<S>;
  constexpr int lanes = 32, vectors = lanes / Vec::kLanes;
  Vec total[vectors];
  for (Vec& t : total) t = splat(S(0));
  for (int64_t block = 0; block < n; block += kBlock) {
    Vec part[vectors];
    for (Vec& t : part) t = splat(S(0));
    const int64_t stop = std::min(n, block + kBlock);
    int64_t j = block;
    for (; j + lanes <= stop; j += lanes)
      for (int i = 0; i < vectors; i++) part[i] = part[i] + load(weights + j + i * Vec::kLanes);
    if (j < stop) {
      S rest[lanes] = {};
      std::copy(weights + j, weights + stop, rest);
      for (int i = 0; i < vectors; i++) part[i] = part[i] + load(rest + i * Vec::kLanes);
    }
    for (int i = 0; i < vectors; i++) total[i] = total[i] + part[i];
  }
  S sum[lanes];
  for (int i = 0; i < vectors; i++) store(sum + i * Vec::kLanes, total[i]);
  for (int half = lanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) sum[i] += sum[i + half];
  return sum[0];
}

template <class S>
struct Softmax {
  S max, sum;  // -infinity and 0 where every key is masked
  Extent extent;
};

// Scores [0, n), n a multiple of kPanel, become exp(score - max), 0 for masked ones.
template <class S>
Softmax<S> softmax_weights(S* scores, int64_t n) {
  using Vec = VecOf<S>;
  constexpr int lanes = Vec::kLanes;
  const Vec minus_infinity = splat(kMinusInfinity<S>), zero = splat(S(0));
  Vec top[2] = {minus_infinity, minus_infinity}, nan[2] = {zero, zero};
  for (int64_t j = 0; j < n; j += 2 * lanes)
    for (int i = 0; i < 2; i++) {
      const Vec s = load(scores + j + i * lanes);
      top[i] = greater(s, top[i]);
      nan[i] = where_nan(s, s, nan[i]);
    }
  S tops[2 * lanes], nans[2 * lanes];
  for (int i = 0; i < 2; i++) store(tops + i * lanes, top[i]), store(nans + i * lanes, nan[i]);
  S max = kMinusInfinity<S>;
  for (S t : tops) max = t > max ? t : max;
  for (S t : nans) max = t != t ? t : max;
  if (max == kMinusInfinity<S>) {
    std::fill_n(scores, n, S(0));
    return {max, 0, {n, n, true}};
  }
  const Vec m = splat(max);
  for (int64_t j = 0; j < n; j += lanes) {
    const Vec s = load(scores + j);
    store(scores + j, where_equal(s, minus_infinity, zero, math::exp(s - m)));
  }
  const Extent e = extent_of(scores, n);
  return {max, sum_of_weights(scores + e.first, e.last - e.first), e};
}

// A tile of query rows: row r is query `first + r / group` under head `kv_head * group + r % group`.
struct Tile {
  int64_t batch, kv_head, first, rows, group, keys;  // keys: one past the last that a row may see, without the mask
  int64_t query(int64_t r) const { return first + r / group; }
  int64_t head(int64_t r) const { return kv_head * group + r % group; }
};

// How the queries of a problem are cut into tiles.  Follows the shapes: it is a schedule and cannot be seen.
struct Tiling {
  int64_t queries, tiles;  // queries in a tile, tiles in a sequence
  Tiling(const Problem& p, int64_t scalar_bytes, int64_t buffers) {
    constexpr int64_t rows = 64, cache = 512 * 1024;  // half of a second-level cache
    const int64_t fitting = cache / (std::max<int64_t>(p.keys, 1) * scalar_bytes * buffers);
    queries = std::max<int64_t>(std::clamp<int64_t>(fitting, kScoreRows, rows) / p.group(), 1);
    tiles = (p.queries + queries - 1) / queries;
  }
  int64_t count(const Problem& p) const { return p.batch * p.kv_heads * tiles; }
  Tile at(const Problem& p, int64_t task) const {
    const int64_t tile = tiles - 1 - task % tiles;  // under a causal mask the last tile is the longest: it goes first
    const int64_t first = tile * queries, past = std::min(p.queries, first + queries);
    const int64_t head = task / tiles;
    return {head / p.kv_heads, head % p.kv_heads, first, (past - first) * p.group(), p.group(),
            p.causal ? std::min(p.keys, past) : p.keys};
  }
};

// The masked scores of a tile, in rows `ld` apart, then their softmax weights and statistics.
template <class T, class S = typename Compute<T>::Scalar>
void tile_weights(const Problem& p, const Tile& t, S* weights, int64_t ld, Softmax<S>* stats) {
  struct Packed;
  struct Ranges;
  S* packed = scratch<Packed, S>(t.rows * p.depth);
  Range* seen = scratch<Ranges, Range>(t.rows);
  auto row_at = [&](int64_t r) { return p.q.matrix<T>(t.batch, t.head(r)).at(t.query(r)); };
  pack_rows<T>(row_at, p.q.strides[3], t.rows, p.depth, packed);
  const int64_t* ms = p.mask.strides;
  auto mask_of = [&](int64_t r) { return t.batch * ms[0] + t.head(r) * ms[1] + t.query(r) * ms[2]; };
  for (int64_t r = 0; r < t.rows; r++) {
    const int64_t past = p.causal ? std::min(t.keys, t.query(r) + 1) : t.keys;
    seen[r] = p.mask.data ? seen_of<S>(p, mask_of(r), ms[3], past) : Range{0, past};
  }
  auto unseen = [&](int64_t row, int64_t past_row, int64_t key, int64_t past_key) {
    return std::all_of(seen + row, seen + past_row, [&](Range r) { return r.past <= key || past_key <= r.first; });
  };
  score_tile(packed, t.rows, p.k.matrix<T>(t.batch, t.kv_head), 0, t.keys, p.depth, S(p.scale), unseen, weights, ld);
  for (int64_t r = 0; r < t.rows; r++) {
    S* scores = weights + r * ld;
    const auto [first, past] = seen[r];
    const int64_t from = first / kPanel<S> * kPanel<S>, to = round_up(past, kPanel<S>);
    if (p.mask.data) apply_mask(p, mask_of(r) + first * ms[3], ms[3], past - first, scores + first);
    std::fill(scores, scores + from, S(0));
    std::fill(scores + from, scores + first, kMinusInfinity<S>);
    std::fill(scores + past, scores + to, kMinusInfinity<S>);
    stats[r] = softmax_weights(scores + from, to - from);
    stats[r].extent.first += from, stats[r].extent.last += from;
    std::fill(scores + to, scores + ld, S(0));
  }
}

// Multiply the numbers that belong to the weights of a tile, in rows `ld` apart, by what dropout makes of each.
template <class S>
void drop_weights(const Problem& p, const Tile& t, S* numbers, int64_t ld, const Extent* extents) {
  struct Factors;
  S* factors = scratch<Factors, S>(ld);
  for (int64_t r = 0; r < t.rows; r++) {
    const auto [first, last] = std::pair(extents[r].first, extents[r].last);
    p.dropout.factors_of_row(p.dropout.seed(t.batch, t.head(r), t.query(r)), 0, last - first, factors);
    multiply_kept(numbers + r * ld + first, factors, last - first);
  }
}

// to[0..width) = (numbers / by) rounded to T.
template <class T, class S>
void store_quotient(const S* numbers, S by, int64_t width, T* to) {
  using Vec = VecOf<S>;
  const Vec divisor = splat(by);
  int64_t d = 0;
  for (; d + Vec::kLanes <= width; d += Vec::kLanes) store_as(to + d, load(numbers + d) / divisor);
  if (d < width) store_as(to + d, load(numbers + d) / divisor, int(width - d));
}

// Vector operations, about, of one pass over the scores: what parallel_tasks weighs against waking a thread.
inline int64_t work_of(const Problem& p) {
  return p.batch * p.heads * p.queries * (p.keys + 1) * (p.depth + p.value_depth) / 8;
}

// out: [batch, queries, heads, value_depth] in memory; lse: [batch, heads, queries].
template <class T, class S = typename Compute<T>::Scalar>
void forward(const Problem& p, T* out, S* lse) {
  const Tiling tiling(p, sizeof(S), 1);
  parallel_tasks(tiling.count(p), work_of(p), [&](int64_t i) {
    struct Weights;
    struct Stats;
    struct Totals;
    const Tile t = tiling.at(p, i);
    const int64_t ld = round_up(t.keys, kPanel<S>), width = round_up(p.value_depth, VecOf<S>::kLanes);
    S* weights = scratch<Weights, S>(t.rows * ld);
    auto* stats = scratch<Stats, Softmax<S>>(t.rows);
    S* totals = scratch<Totals, S>(t.rows * width);
    tile_weights<T>(p, t, weights, ld, stats);
    struct Extents;
    Extent* extents = scratch<Extents, Extent>(t.rows);
    for (int64_t r = 0; r < t.rows; r++) extents[r] = stats[r].extent;
    if (p.dropout.seeds) {
      drop_weights(p, t, weights, ld, extents);
      for (int64_t r = 0; r < t.rows; r++) extents[r] = extent_of(weights + r * ld, ld);
    }
    weighted_sums(weights, ld, extents, t.rows, p.v.matrix<T>(t.batch, t.kv_head), p.value_depth, totals);
    for (int64_t r = 0; r < t.rows; r++) {
      const Softmax<S>& row = stats[r];
      const bool nothing_seen = row.max == kMinusInfinity<S>;
      T* to = out + ((t.batch * p.queries + t.query(r)) * p.heads + t.head(r)) * p.value_depth;
      store_quotient(totals + r * width, nothing_seen ? S(1) : row.sum, p.value_depth, to);
      ScalarVec<S, 1> log_sum = math::log(ScalarVec<S, 1>{{row.sum}});
      lse[(t.batch * p.heads + t.head(r)) * p.queries + t.query(r)] =
          nothing_seen ? kMinusInfinity<S> : canonical(row.max + log_sum.v[0]);
    }
  });
}

}  // namespace bicompile::attention
