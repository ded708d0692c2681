// What each reduction computes of one row, or of 32 rows side by side: the same text for both walks of block.h.
//
// A program is called with a walk, a reader of elements and the blocks to fill with results.  kCost is its rough count
// of operations for one element.  A product is rounded before it is added, never fused: a sum of squares has the bits
// of squaring in one kernel and summing in another.
#pragma once

#include <algorithm>
#include <cmath>

#include "../elementwise/math.h"
#include "layout.h"

namespace bicompile {

template <class S>
BICOMPILE_INLINE Block<S> exp(Block<S> a) {
  return map([](auto v) BICOMPILE_LAMBDA { return math::exp(v); }, a);
}
template <class S>
BICOMPILE_INLINE Block<S> log(Block<S> a) {
  return map([](auto v) BICOMPILE_LAMBDA { return math::log(v); }, a);
}
template <class S>
BICOMPILE_INLINE Block<S> sqrt(Block<S> a) {
  return map([](auto v) BICOMPILE_LAMBDA { return sqrt(v); }, a);
}
template <class S>
BICOMPILE_INLINE Block<S> abs(Block<S> a) {
  return map([](auto v) BICOMPILE_LAMBDA { return abs(v); }, a);
}
template <class S>
BICOMPILE_INLINE Block<S> where_equal(Block<S> a, Block<S> b, Block<S> x, Block<S> y) {
  return map([](auto... v) BICOMPILE_LAMBDA { return where_equal(v...); }, a, b, x, y);
}

// What is done with a sum over n elements.
enum class Finish { kNothing, kDivideByCount, kSquareRoot };

template <class S>
BICOMPILE_INLINE Block<S> finish(Finish how, Block<S> sum, int64_t n) {
  if (how == Finish::kDivideByCount) return sum / block_of(S(n));
  return how == Finish::kSquareRoot ? sqrt(sum) : sum;
}

struct Sum {
  static constexpr int kOutputs = 1, kCost = 1;
  Finish how;
  template <class S, class Walk, class X>
  BICOMPILE_INLINE void operator()(const Walk& walk, const X& x, Block<S>* r) const {
    r[0] = finish(how, walk.fold(Add{}, S(0), x), walk.n);
  }
};

struct SumOfSquares {
  static constexpr int kOutputs = 1, kCost = 1;
  Finish how;
  template <class S, class Walk, class X>
  BICOMPILE_INLINE void operator()(const Walk& walk, const X& x, Block<S>* r) const {
    auto square = [&](int64_t k, int count) BICOMPILE_LAMBDA {
      Block<S> v = x(k, count);
      return v * v;
    };
    r[0] = finish(how, walk.fold(Add{}, S(0), square), walk.n);
  }
};

struct Product {
  static constexpr int kOutputs = 1, kCost = 1;
  template <class S, class Walk, class X>
  BICOMPILE_INLINE void operator()(const Walk& walk, const X& x, Block<S>* r) const {
    r[0] = walk.fold(Multiply{}, S(1), x);
  }
};

// The largest or smallest element or magnitude.  Exact, so its order cannot show.
template <class Combine>
struct Extremum {
  static constexpr int kOutputs = 1, kCost = 2;
  bool of_magnitudes;
  template <class S, class Walk, class X>
  BICOMPILE_INLINE void operator()(const Walk& walk, const X& x, Block<S>* r) const {
    constexpr S kInfinity = std::numeric_limits<S>::infinity();
    using Bits = BitsOf<S>;
    const Block<S> kept = block_of(bit_cast<S>(of_magnitudes ? Bits(~Bits(0)) >> 1 : ~Bits(0)));  // all but the sign
    auto element = [&](int64_t k, int count) BICOMPILE_LAMBDA {
      return map([](auto v, auto mask) BICOMPILE_LAMBDA { return bit_and(v, mask); }, x(k, count), kept);
    };
    r[0] = walk.fold(Combine{}, std::is_same_v<Combine, Max> ? -kInfinity : kInfinity, element);
  }
};

// Two passes: the mean, then the squares of the distances to it.  Results: variance (or its root) and mean.
struct Variance {
  static constexpr int kOutputs = 2, kCost = 3;
  double correction;
  bool root;
  template <class S, class Walk, class X>
  BICOMPILE_INLINE void operator()(const Walk& walk, const X& x, Block<S>* r) const {
    const Block<S> mean = walk.fold(Add{}, S(0), x) / block_of(S(walk.n));
    auto square = [&](int64_t k, int count) BICOMPILE_LAMBDA {
      Block<S> d = x(k, count) - mean;
      return d * d;
    };
    const S degrees = S(std::max(double(walk.n) - correction, 0.0));
    r[0] = walk.fold(Add{}, S(0), square) / block_of(degrees);
    if (root) r[0] = sqrt(r[0]);
    r[1] = mean;
  }
};

// (sum |x|**ord)**(1 / ord), and the number of nonzero elements for ord 0.  Powers are libm's, one number at a time: no
// vector function, no tail with other bits.
struct Norm {
  static constexpr int kOutputs = 1, kCost = 20;
  double ord;

  template <class S>
  __attribute__((noinline)) static Block<S> power(Block<S> a, S exponent) {
    alignas(64) S lanes[kBlock];
    for (int i = 0; i < Block<S>::kVecs; i++) store(lanes + i * Block<S>::Vec::kLanes, a.v[i]);
    for (S& lane : lanes) lane = std::pow(lane, exponent);
    return load_block<S>(lanes, kBlock);
  }
  template <class S, class Walk, class X>
  BICOMPILE_INLINE void operator()(const Walk& walk, const X& x, Block<S>* r) const {
    const Block<S> zero = block_of(S(0)), one = block_of(S(1));
    auto element = [&](int64_t k, int count) BICOMPILE_LAMBDA {
      const Block<S> v = x(k, count);
      if (ord == 0) return where_equal(v, zero, zero, one);
      return ord == 1 ? abs(v) : power(abs(v), S(ord));
    };
    r[0] = walk.fold(Add{}, S(0), element);
    if (ord != 0 && ord != 1) r[0] = power(r[0], S(1) / S(ord));
  }
};

// The largest element of a row, +0 for -0; NaN is left to the sum that follows.
template <class S, class Walk, class X>
BICOMPILE_INLINE Block<S> largest(const Walk& walk, const X& x) {
  return walk.fold(FastMax{}, -std::numeric_limits<S>::infinity(), x) + block_of(S(0));
}

struct LogSumExp {
  static constexpr int kOutputs = 1, kCost = 10;
  template <class S, class Walk, class X>
  BICOMPILE_INLINE void operator()(const Walk& walk, const X& x, Block<S>* r) const {
    const Block<S> zero = block_of(S(0)), max = largest<S>(walk, x);
    // Shifted by 0 where the maximum is infinite, as in torch: log then gives it back.
    const Block<S> shift = where_equal(abs(max), block_of(std::numeric_limits<S>::infinity()), zero, max);
    auto power = [&](int64_t k, int count) BICOMPILE_LAMBDA { return exp(x(k, count) - shift); };
    r[0] = log(walk.fold(Add{}, S(0), power)) + shift;
  }
};

}  // namespace bicompile
