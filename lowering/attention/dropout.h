// Which weights dropout drops: bicompile/dropout.py says how, in the same arithmetic of 64 bits.
#pragma once

#include <cstdint>

namespace bicompile::attention {

// A row's seed and the place of a key, counted from the row's first weight that is not zero, decide.
struct Dropout {
  const int64_t* seeds = nullptr;  // [batch, heads, queries]; none: nothing is dropped
  int64_t strides[3] = {0, 0, 0};
  uint64_t threshold = 0;  // of a random number of 24 bits: from here on a weight is kept
  double scale = 1;        // what is kept is multiplied by that

  uint64_t seed(int64_t batch, int64_t head, int64_t query) const {
    return uint64_t(seeds[batch * strides[0] + head * strides[1] + query * strides[2]]);
  }
  bool keeps(uint64_t seed, int64_t place) const {
    uint64_t z = seed + 0x9E3779B97F4A7C15u * uint64_t(place + 1);
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return (z ^ z >> 31) >> 40 >= threshold;
  }
  // What each of `n` weights of one row, from place `first` on, is multiplied by.
  template <class S>
  void factors_of_row(uint64_t seed, int64_t first, int64_t n, S* to) const {
    for (int64_t j = 0; j < n; j++) to[j] = keeps(seed, first + j) ? S(scale) : S(0);
  }
};

// A number whose factor is 0 becomes 0, whatever it is.
template <class S>
void multiply_kept(S* numbers, const S* factors, int64_t n) {
  for (int64_t j = 0; j < n; j++) numbers[j] = factors[j] == 0 ? S(0) : numbers[j] * factors[j];
}

}  // namespace bicompile::attention
