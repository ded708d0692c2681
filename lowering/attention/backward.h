// Attention, backward: query tiles give dq, the mask's gradient and each row's statistics; key tiles give dk and dv.
// No sum is shared between tasks.
#pragma once

#include "forward.h"

namespace bicompile::attention {

// What the key tiles need of every query row: [batch, heads, queries] each.
template <class S>
struct RowStatistics {
  S *max, *sum, *delta;
  int64_t* first;  // weight that is not zero; for dropout only
};

// Chain over grad * out in blocks of kBlock: the part of dS that a query row's weights share.
template <class T, class S = typename Compute<T>::Scalar>
S delta_of(const T* grad, int64_t grad_step, const T* out, int64_t out_step, int64_t depth) {
  S total = 0;
  for (int64_t start = 0; start < depth; start += kBlock) {
    S part = 0;
    for (int64_t d = start; d < std::min(depth, start + kBlock); d++)
      part = std::fma(S(widen(grad[d * grad_step])), S(widen(out[d * out_step])), part);
    total = start ? total + part : part;
  }
  return total;
}

// weights[j] becomes P = weight / sum, and gradients[j], which holds dP, becomes dS = P * (dP - delta).  A weight of
// zero stays zero in both, whatever dP is there.  Sum and delta are one number (step 0) or one for each j (step 1).
template <class S>
void score_gradients(S* weights, S* gradients, int64_t n, const S* sums, const S* deltas, int64_t step) {
  using Vec = VecOf<S>;
  const Vec zero = splat(S(0));
  for (int64_t j = 0; j < n; j += Vec::kLanes) {
    const Vec weight = load(weights + j);
    const Vec sum = step ? load(sums + j) : splat(*sums), delta = step ? load(deltas + j) : splat(*deltas);
    const Vec p = where_equal(weight, zero, zero, weight / sum);
    store(weights + j, p);
    store(gradients + j, where_equal(p, zero, zero, p * (load(gradients + j) - delta)));
  }
}

// to[0..width) = numbers * by, rounded to T.
template <class T, class S>
void store_product(const S* numbers, S by, int64_t width, T* to) {
  using Vec = VecOf<S>;
  const Vec factor = splat(by);
  int64_t d = 0;
  for (; d + Vec::kLanes <= width; d += Vec::kLanes) store_as(to + d, load(numbers + d) * factor);
  if (d < width) store_as(to + d, load(numbers + d) * factor, int(width - d));
}

// dq [batch, heads, queries, depth]; score_grad [batch, heads, queries, keys], or null where nobody asks for it.
template <class T, class S = typename Compute<T>::Scalar>
void backward_queries(const Problem& p, const View& grad, const View& out, T* dq, S* score_grad,
                      RowStatistics<S> saved) {
  const Tiling tiling(p, sizeof(S), 2);
  parallel_tasks(tiling.count(p), 2 * work_of(p), [&](int64_t i) {
    struct Weights;
    struct Gradients;
    struct Stats;
    struct Packed;
    struct Extents;
    struct Totals;
    const Tile t = tiling.at(p, i);
    const int64_t ld = round_up(t.keys, kPanel<S>), width = round_up(p.depth, VecOf<S>::kLanes);
    S* weights = scratch<Weights, S>(t.rows * ld);
    S* gradients = scratch<Gradients, S>(t.rows * ld);
    auto* stats = scratch<Stats, Softmax<S>>(t.rows);
    Extent* extents = scratch<Extents, Extent>(t.rows);
    S* totals = scratch<Totals, S>(t.rows * width);
    tile_weights<T>(p, t, weights, ld, stats);

    S* packed = scratch<Packed, S>(t.rows * p.value_depth);
    auto grad_row = [&](int64_t r) { return grad.matrix<T>(t.batch, t.head(r)).at(t.query(r)); };
    pack_rows<T>(grad_row, grad.strides[3], t.rows, p.value_depth, packed);
    auto unseen = [&](int64_t, int64_t past, int64_t key, int64_t) { return p.causal && key > t.query(past - 1); };
    const Matrix<T> v = p.v.matrix<T>(t.batch, t.kv_head);
    score_tile(packed, t.rows, v, 0, t.keys, p.value_depth, S(1), unseen, gradients, ld);
    if (p.dropout.seeds) {
      for (int64_t r = 0; r < t.rows; r++) extents[r] = stats[r].extent;
      drop_weights(p, t, gradients, ld, extents);
    }
    for (int64_t r = 0; r < t.rows; r++) {
      const int64_t row = (t.batch * p.heads + t.head(r)) * p.queries + t.query(r);
      const T* out_row = out.matrix<T>(t.batch, t.head(r)).at(t.query(r));
      saved.max[row] = stats[r].max;
      saved.sum[row] = stats[r].sum;
      if (p.dropout.seeds) saved.first[row] = stats[r].extent.first;
      saved.delta[row] = delta_of(grad_row(r), grad.strides[3], out_row, out.strides[3], p.value_depth);
      score_gradients(weights + r * ld, gradients + r * ld, ld, saved.sum + row, saved.delta + row, 0);
      extents[r] = extent_of(weights + r * ld, ld);
      if (score_grad) {
        std::copy_n(gradients + r * ld, t.keys, score_grad + row * p.keys);
        std::fill_n(score_grad + row * p.keys + t.keys, p.keys - t.keys, S(0));
      }
    }
    weighted_sums(gradients, ld, extents, t.rows, p.k.matrix<T>(t.batch, t.kv_head), p.depth, totals);
    for (int64_t r = 0; r < t.rows; r++) {
      const int64_t row = (t.batch * p.heads + t.head(r)) * p.queries + t.query(r);
      store_product(totals + r * width, S(p.scale), p.depth, dq + row * p.depth);
    }
  });
}

// Row j of `weights` against all queries of one head: score [0, n) of key `key`, masked, becomes its weight.
template <class S>
void key_weights(const Problem& p, int64_t mask_offset, int64_t key, S* scores, int64_t padded, const S* maxima) {
  using Vec = VecOf<S>;
  const Vec minus_infinity = splat(kMinusInfinity<S>), zero = splat(S(0));
  if (p.mask.data) apply_mask(p, mask_offset + key * p.mask.strides[3], p.mask.strides[2], p.queries, scores);
  if (p.causal) std::fill_n(scores, std::min(key, p.queries), kMinusInfinity<S>);
  std::fill(scores + p.queries, scores + padded, kMinusInfinity<S>);
  for (int64_t i = 0; i < padded; i += Vec::kLanes) {
    const Vec s = load(scores + i);
    store(scores + i, where_equal(s, minus_infinity, zero, math::exp(s - load(maxima + i))));
  }
}

// dk [batch, kv_heads, keys, depth] and dv [batch, kv_heads, keys, value_depth].
template <class T, class S = typename Compute<T>::Scalar>
void backward_keys(const Problem& p, const View& grad, T* dk, T* dv, RowStatistics<S> saved) {
  constexpr int64_t rows = 64, cache = 512 * 1024;  // as for query tiles
  const int64_t padded = round_up(p.queries, kPanel<S>);
  const int64_t fitting = cache / (std::max<int64_t>(padded, 1) * int64_t(sizeof(S)) * 2);
  const int64_t tile = std::clamp<int64_t>(fitting, kScoreRows, rows), tiles = (p.keys + tile - 1) / tile;
  parallel_tasks(p.batch * p.kv_heads * tiles, 2 * work_of(p), [&](int64_t task) {
    struct Weights;
    struct Gradients;
    struct Keys;
    struct Values;
    struct Statistics;
    struct Extents;
    struct Head;
    struct SumK;
    struct SumV;
    struct Factors;
    const int64_t first = task % tiles * tile, count = std::min(tile, p.keys - first);
    const int64_t kv_head = task / tiles % p.kv_heads, batch = task / tiles / p.kv_heads;
    const int64_t k_width = round_up(p.depth, VecOf<S>::kLanes), v_width = round_up(p.value_depth, VecOf<S>::kLanes);
    S* weights = scratch<Weights, S>(count * padded);
    S* gradients = scratch<Gradients, S>(count * padded);
    S* keys = scratch<Keys, S>(count * p.depth);
    S* values = scratch<Values, S>(count * p.value_depth);
    Extent* extents = scratch<Extents, Extent>(count);
    S* head_sum = scratch<Head, S>(count * std::max(k_width, v_width));
    S* k_sum = scratch<SumK, S>(count * k_width);
    S* v_sum = scratch<SumV, S>(count * v_width);
    S* factors = scratch<Factors, S>(p.dropout.seeds ? count * padded : 0);
    S* row = scratch<Statistics, S>(3 * padded);  // maxima, sums, deltas of one head, padded
    std::fill_n(k_sum, count * k_width, S(0));
    std::fill_n(v_sum, count * v_width, S(0));
    std::fill_n(row, 3 * padded, S(1));
    const Matrix<T> k = p.k.matrix<T>(batch, kv_head), v = p.v.matrix<T>(batch, kv_head);
    pack_rows<T>([&](int64_t r) { return k.at(first + r); }, k.column, count, p.depth, keys);
    pack_rows<T>([&](int64_t r) { return v.at(first + r); }, v.column, count, p.value_depth, values);
    auto unseen = [&](int64_t key, int64_t, int64_t, int64_t past) { return p.causal && past <= first + key; };

    for (int64_t head = kv_head * p.group(); head < (kv_head + 1) * p.group(); head++) {
      const int64_t saved_at = (batch * p.heads + head) * p.queries;
      std::copy_n(saved.max + saved_at, p.queries, row);
      std::copy_n(saved.sum + saved_at, p.queries, row + padded);
      std::copy_n(saved.delta + saved_at, p.queries, row + 2 * padded);
      const Matrix<T> q = p.q.matrix<T>(batch, head), g = grad.matrix<T>(batch, head);
      score_tile(keys, count, q, 0, p.queries, p.depth, S(p.scale), unseen, weights, padded);
      score_tile(values, count, g, 0, p.queries, p.value_depth, S(1), unseen, gradients, padded);
      for (int64_t r = 0; r < count; r++) {
        S* w = weights + r * padded;
        key_weights(p, batch * p.mask.strides[0] + head * p.mask.strides[1], first + r, w, padded, row);
        if (p.dropout.seeds) {
          S* kept = factors + r * padded;
          for (int64_t i = 0; i < p.queries; i++) {
            const int64_t place = first + r - saved.first[saved_at + i];
            kept[i] = p.dropout.keeps(p.dropout.seed(batch, head, i), place) ? S(p.dropout.scale) : S(0);
          }
          multiply_kept(gradients + r * padded, kept, p.queries);
        }
        score_gradients(w, gradients + r * padded, padded, row + padded, row + 2 * padded, 1);
        extents[r] = extent_of(w, padded);
      }
      auto add_head = [&](S* sum, int64_t n) {
        for (int64_t d = 0; d < n; d++) sum[d] += head_sum[d];
      };
      weighted_sums(gradients, padded, extents, count, q, p.depth, head_sum);
      add_head(k_sum, count * k_width);
      if (p.dropout.seeds) {
        for (int64_t r = 0; r < count; r++) {
          multiply_kept(weights + r * padded, factors + r * padded, p.queries);
          extents[r] = extent_of(weights + r * padded, padded);
        }
      }
      weighted_sums(weights, padded, extents, count, g, p.value_depth, head_sum);
      add_head(v_sum, count * v_width);
    }
    for (int64_t r = 0; r < count; r++) {
      const int64_t key = (batch * p.kv_heads + kv_head) * p.keys + first + r;
      store_product(k_sum + r * k_width, S(p.scale), p.depth, dk + key * p.depth);
      store_product(v_sum + r * v_width, S(1), p.value_depth, dv + key * p.value_depth);
    }
  });
}

// The gradient of a mask of some shape: gradients of the scores, summed over the dims in which the mask was broadcast,
// one chain of additions in ascending [batch, head, query, key] order.  sizes: of the mask, four dims.
template <class M, class S>
void reduce_mask_gradient(const Problem& p, const S* score_grad, const int64_t (&sizes)[4], M* to) {
  const int64_t full[4] = {p.batch, p.heads, p.queries, p.keys};
  const int64_t steps[4] = {p.heads * p.queries * p.keys, p.queries * p.keys, p.keys, 1};
  const int64_t count = sizes[0] * sizes[1] * sizes[2] * sizes[3];
  constexpr int64_t chunk = 256;
  parallel_tasks((count + chunk - 1) / chunk, full[0] * steps[0], [&](int64_t task) {
    for (int64_t e = task * chunk; e < std::min(count, (task + 1) * chunk); e++) {
      int64_t offset = 0, extent[4];
      for (int64_t i = 3, rest = e; i >= 0; rest /= sizes[i], i--) {
        offset += rest % sizes[i] * steps[i];
        extent[i] = sizes[i] == 1 ? full[i] : 1;
      }
      S sum = 0;
      for (int64_t b = 0; b < extent[0]; b++)
        for (int64_t h = 0; h < extent[1]; h++)
          for (int64_t q = 0; q < extent[2]; q++)
            for (int64_t k = 0; k < extent[3]; k++)
              sum += score_grad[offset + b * steps[0] + h * steps[1] + q * steps[2] + k];
      if constexpr (std::is_same_v<M, float>)
        to[e] = canonical(float(sum));
      else
        to[e] = narrow<M>(sum);
    }
  });
}

}  // namespace bicompile::attention
