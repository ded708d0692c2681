// Blocks read from and written to memory of any dtype.
#pragma once

#include "layout.h"

namespace bicompile {

// Densely packed numbers whose dtype is looked up once a block; absent if p is null.
template <class S>
struct AnyInput {
  const void* p;
  ScalarType dtype;
  int64_t first = 0;

  explicit operator bool() const { return p != nullptr; }
  BICOMPILE_INLINE Block<S> operator()(int64_t k, int count) const {
    if constexpr (std::is_same_v<S, double>) {
      if (dtype == ScalarType::Double) return load_block<S>(static_cast<const double*>(p) + first + k, count);
    } else {
      if (dtype == ScalarType::Float) return load_block<S>(static_cast<const float*>(p) + first + k, count);
      if (dtype == ScalarType::BFloat16) return load_block<S>(static_cast<const bf16*>(p) + first + k, count);
      if (dtype == ScalarType::Half) return load_block<S>(static_cast<const fp16*>(p) + first + k, count);
    }
    return converted(k, count);
  }

 private:
  __attribute__((noinline)) Block<S> converted(int64_t k, int count) const {
    alignas(64) S lanes[kBlock] = {};
    dispatch("input", dtype, [&](auto t) {
      auto from = static_cast<const decltype(t)*>(p) + first + k;
      for (int i = 0; i < count; i++) lanes[i] = S(widen(from[i]));
    });
    return load_block<S>(lanes, kBlock);
  }
};

template <class S>
struct AnyOutput {
  void* p;
  ScalarType dtype;
  int64_t first = 0;

  BICOMPILE_INLINE void operator()(int64_t k, Block<S> value, int count) const {
    if constexpr (std::is_same_v<S, double>) {
      if (dtype == ScalarType::Double) return store_block(static_cast<double*>(p) + first + k, value, count);
    } else {
      if (dtype == ScalarType::Float) return store_block(static_cast<float*>(p) + first + k, value, count);
      if (dtype == ScalarType::BFloat16) return store_block(static_cast<bf16*>(p) + first + k, value, count);
      if (dtype == ScalarType::Half) return store_block(static_cast<fp16*>(p) + first + k, value, count);
    }
    converted(k, value, count);
  }

 private:
  __attribute__((noinline)) void converted(int64_t k, Block<S> value, int count) const {
    alignas(64) S lanes[kBlock];
    store_block(lanes, value, kBlock);
    const Output out{p, dtype};
    for (int i = 0; i < count; i++) out.put(first + k + i, lanes[i]);
  }
};

}  // namespace bicompile
