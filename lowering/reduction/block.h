// Blocks of 32 numbers, and the one order in which a reduction combines them.
//
// The order: the row is cut into sections of 4096 elements.  In each, lane l of 32 combines the elements k = l, l + 32,
// l + 64, ... in ascending order, starting from the neutral element; the sections' lanes are combined in ascending
// order, again from the neutral element; then the lanes halve: lane i takes lane i + 16, then i + 8, 4, 2, 1.  The
// reduced index k counts the reduced elements in row-major order of the tensor's shape.
//
// Two walks realise it.  AlongRow takes 32 neighbouring elements of one row at a time, one for each lane; AcrossRows
// takes element k of 32 neighbouring rows at a time, for tensors whose reduced dim is not the innermost.  A kernel is
// written once, on blocks, and runs on either with the same bits.
#pragma once

#include <utility>

#include "../native/simd.h"

namespace bicompile {

constexpr int kBlock = 32;
constexpr int64_t kSection = 4096;  // long chains of additions lose digits: 128 steps, then a fresh start

template <class S>
struct Block {
  using Vec = std::conditional_t<std::is_same_v<S, float>, VecF, VecD>;
  static constexpr int kVecs = kBlock / Vec::kLanes;
  Vec v[kVecs];
};

// f(vector) or f(vector, vector, ...) for the vectors of one or more blocks; unrolled, so that blocks live in registers.
template <class F, class S, class... Rest>
BICOMPILE_INLINE Block<S> map(const F& f, Block<S> a, Rest... rest) {
#if defined(BICOMPILE_AVX512) || defined(BICOMPILE_AVX2)
  return [&]<size_t... I>(std::index_sequence<I...>) BICOMPILE_LAMBDA {
    auto at = [&]<size_t J>(std::integral_constant<size_t, J>) BICOMPILE_LAMBDA { return f(a.v[J], rest.v[J]...); };
    return Block<S>{{at(std::integral_constant<size_t, I>())...}};
  }(std::make_index_sequence<Block<S>::kVecs>());
#else
  Block<S> r;
#pragma GCC unroll 1
  for (int i = 0; i < Block<S>::kVecs; i++) r.v[i] = f(a.v[i], rest.v[i]...);
  return r;
#endif
}

template <class S>
BICOMPILE_INLINE Block<S> block_of(S x) {
  auto v = splat(x);
  return map([v](auto) BICOMPILE_LAMBDA { return v; }, Block<S>());
}

template <class S>
BICOMPILE_INLINE Block<S> operator+(Block<S> a, Block<S> b) {
  return map([](auto x, auto y) BICOMPILE_LAMBDA { return x + y; }, a, b);
}
template <class S>
BICOMPILE_INLINE Block<S> operator-(Block<S> a, Block<S> b) {
  return map([](auto x, auto y) BICOMPILE_LAMBDA { return x - y; }, a, b);
}
template <class S>
BICOMPILE_INLINE Block<S> operator*(Block<S> a, Block<S> b) {
  return map([](auto x, auto y) BICOMPILE_LAMBDA { return x * y; }, a, b);
}
template <class S>
BICOMPILE_INLINE Block<S> operator/(Block<S> a, Block<S> b) {
  return map([](auto x, auto y) BICOMPILE_LAMBDA { return x / y; }, a, b);
}

BICOMPILE_INLINE Block<double> in_double(Block<double> a) { return a; }
BICOMPILE_INLINE Block<double> in_double(Block<float> a) {
  return [&]<size_t... I>(std::index_sequence<I...>) BICOMPILE_LAMBDA {
    return Block<double>{{half_in_double<I % 2>(a.v[I / 2])...}};
  }(std::make_index_sequence<Block<double>::kVecs>());
}

// The first `count` of 32 elements, widened; zeros in the other lanes.
template <class S, class In>
BICOMPILE_INLINE Block<S> load_block(const In* p, int count) {
  using Vec = typename Block<S>::Vec;
  Block<S> r;
  if (count >= kBlock) {
    for (int i = 0; i < Block<S>::kVecs; i++) r.v[i] = load(p + i * Vec::kLanes);
    return r;
  }
  for (int i = 0; i < Block<S>::kVecs; i++) {
    int left = count - i * Vec::kLanes;
    r.v[i] = left >= Vec::kLanes ? load(p + i * Vec::kLanes)
             : left > 0          ? load_first(p + i * Vec::kLanes, left, S(0))
                                 : splat(S(0));
  }
  return r;
}

// Does a kernel that computes in S read elements of type In where they lie?
template <class In, class S>
constexpr bool kReadInPlace = std::is_same_v<typename Compute<In>::Scalar, S> ||
                              (std::is_same_v<In, float> && std::is_same_v<S, double>);

template <class S, class In>
BICOMPILE_INLINE Block<S> read_block(const In* p, int count) {
  if constexpr (std::is_same_v<In, float> && std::is_same_v<S, double>) {
    return in_double(load_block<float>(p, count));
  } else {
    return load_block<S>(p, count);
  }
}

// Rounds the first `count` of 32 numbers once to the type of p; every NaN becomes the canonical one.
template <class S, class Out>
BICOMPILE_INLINE void store_block(Out* p, Block<S> a, int count) {
  using Vec = typename Block<S>::Vec;
  for (int i = 0; i < Block<S>::kVecs; i++) {
    int left = count - i * Vec::kLanes;
    if (left >= Vec::kLanes) {
      store_as(p + i * Vec::kLanes, a.v[i]);
    } else if (left > 0) {
      store_as(p + i * Vec::kLanes, a.v[i], left);
    }
  }
}

// The first `count` lanes of a block, `rest` in the others.
template <class S>
BICOMPILE_INLINE Block<S> keep_first(Block<S> a, int count, S rest) {
  using Vec = typename Block<S>::Vec;
  alignas(64) static constexpr auto kIndex = [] {
    struct { S v[kBlock]; } r{};
    for (int i = 0; i < kBlock; i++) r.v[i] = S(i);
    return r;
  }();
  for (int i = 0; i < Block<S>::kVecs; i++) {
    a.v[i] = where_less(load(kIndex.v + i * Vec::kLanes), splat(S(count)), a.v[i], splat(rest));
  }
  return a;
}

// How two partial results become one, for vectors and for blocks.  Where that is exact, no order can show.
struct Add {
  static constexpr bool kExact = false;
  template <class V>
  BICOMPILE_INLINE V operator()(V a, V b) const { return a + b; }
};
struct Multiply {
  static constexpr bool kExact = false;
  template <class V>
  BICOMPILE_INLINE V operator()(V a, V b) const { return a * b; }
};
struct Max {  // NaN wins, +0 is above -0
  static constexpr bool kExact = true;
  template <class V>
  BICOMPILE_INLINE V operator()(V a, V b) const { return max_of(a, b); }
};
struct Min {
  static constexpr bool kExact = true;
  template <class V>
  BICOMPILE_INLINE V operator()(V a, V b) const { return min_of(a, b); }
};
struct FastMax {  // ignores NaN; which zero wins is not said
  static constexpr bool kExact = true;
  template <class V>
  BICOMPILE_INLINE V operator()(V a, V b) const { return greater(b, a); }
};

// The 32 lanes of one row, halved until one number is left, in every lane of the result.
template <class S, class Combine>
BICOMPILE_INLINE Block<S> halve_lanes(Block<S> a, const Combine& combine) {
  using Vec = typename Block<S>::Vec;
  constexpr int kVecs = Block<S>::kVecs;
  if constexpr (kVecs >= 8) {
    for (int i = 0; i < 4; i++) a.v[i] = combine(a.v[i], a.v[i + 4]);
  }
  if constexpr (kVecs >= 4) {
    for (int i = 0; i < 2; i++) a.v[i] = combine(a.v[i], a.v[i + 2]);
  }
  Vec r = combine(a.v[0], a.v[1]);
  if constexpr (Vec::kLanes >= 16) r = combine(r, shift_down<8>(r));
  if constexpr (Vec::kLanes >= 8) r = combine(r, shift_down<4>(r));
  r = combine(r, shift_down<2>(r));
  r = combine(r, shift_down<1>(r));
  return block_of(S(first_lane(r)));
}

// The same for 32 rows: lanes[l] holds lane l of each.  Lanes from `used` on hold the neutral element, combining with
// which changes nothing: they are skipped.
template <class S, class Combine>
__attribute__((noinline)) Block<S> halve_blocks(Block<S>* lanes, int used, const Combine& combine) {
  for (int half = kBlock / 2; half >= 1; half /= 2) {
    for (int i = 0; i < half && i + half < used; i++) lanes[i] = map(combine, lanes[i], lanes[i + half]);
  }
  return lanes[0];
}

// A walk over one row of n elements.  Everywhere, get(k, count) gives a block of which the first `count` lanes count,
// and put(k, count) consumes them; `fold` returns a block that holds the result in every lane.
struct AlongRow {
  int64_t n;

  template <class S, class Combine, class Get>
  BICOMPILE_INLINE Block<S> fold(const Combine& combine, S neutral, const Get& get) const {
    Block<S> total = block_of(neutral);
    int64_t k = 0;
    if constexpr (Combine::kExact) {  // four chains at a time hide the latency of a comparison
      Block<S> others[3] = {total, total, total};
      for (; k + 4 * kBlock <= n; k += 4 * kBlock) {
        total = map(combine, total, get(k, kBlock));
        for (int i = 0; i < 3; i++) others[i] = map(combine, others[i], get(k + (i + 1) * kBlock, kBlock));
      }
      total = map(combine, map(combine, total, others[0]), map(combine, others[1], others[2]));
    }
    while (k < n) {
      const int64_t end = n - k < kSection ? n : k + kSection;
      Block<S> lanes = block_of(neutral);
      for (; k + kBlock <= end; k += kBlock) lanes = map(combine, lanes, get(k, kBlock));
      if (k < end) {
        lanes = map(combine, lanes, keep_first(get(k, int(end - k)), int(end - k), neutral));
        k = end;
      }
      total = map(combine, total, lanes);
    }
    return halve_lanes(total, combine);
  }
  template <class Put>
  BICOMPILE_INLINE void each(const Put& put) const {
    int64_t k = 0;
    for (; k + kBlock <= n; k += kBlock) put(k, kBlock);
    if (k < n) put(k, int(n - k));
  }
};

// A walk over `rows` <= 32 neighbouring rows of n elements at once: `fold` returns a block with one result for each.
struct AcrossRows {
  int64_t n;
  int rows;

  template <class S, class Combine, class Get>
  BICOMPILE_INLINE Block<S> fold(const Combine& combine, S neutral, const Get& get) const {
    return rows == kBlock ? fold_rows(combine, neutral, get, kBlock) : fold_rows(combine, neutral, get, rows);
  }
  template <class Put>
  BICOMPILE_INLINE void each(const Put& put) const {
    if (rows == kBlock) {
      for (int64_t k = 0; k < n; k++) put(k, kBlock);
    } else {
      for (int64_t k = 0; k < n; k++) put(k, rows);
    }
  }

 private:
  template <class S, class Combine, class Get>
  BICOMPILE_INLINE Block<S> fold_rows(const Combine& combine, S neutral, const Get& get, int count) const {
    Block<S> lanes[kBlock];
    lanes[0] = block_of(neutral);
    const int used = int(n < kBlock ? n : kBlock);
    for (int lane = 0; lane < used; lane++) {
      Block<S> total = block_of(neutral);
      for (int64_t start = 0; start < n; start += kSection) {
        const int64_t end = n - start < kSection ? n : start + kSection;
        Block<S> part = block_of(neutral);
        for (int64_t k = start + lane; k < end; k += kBlock) part = map(combine, part, get(k, count));
        total = map(combine, total, part);
      }
      lanes[lane] = total;
    }
    return halve_blocks(lanes, used, combine);
  }
};

// Where a kernel reads element k: of one row, densely packed.
template <class In, class S>
struct RowInput {
  const In* p;
  BICOMPILE_INLINE Block<S> operator()(int64_t k, int count) const { return read_block<S>(p + k, count); }
};
// Of neighbouring rows, densely packed in the other direction: k * step away, or table[k] if there is a table.
template <class In, class S>
struct RowsInput {
  const In* p;
  int64_t step;
  const int64_t* table = nullptr;
  BICOMPILE_INLINE Block<S> operator()(int64_t k, int count) const {
    const In* from = p + (table ? table[k] : k * step);
    // The next block of columns, while its page is at hand: elements of one column lie pages apart.
    for (size_t line = 0; line < kBlock * sizeof(In); line += 64) {
      __builtin_prefetch(reinterpret_cast<const char*>(from + kBlock) + line);
    }
    return read_block<S>(from, count);
  }
};

}  // namespace bicompile
