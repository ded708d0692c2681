// Which elements of a strided tensor make one row: dims sorted into kept and reduced, neighbours merged.
#pragma once

#include <array>
#include <vector>

#include "../native/tensor.h"
#include "block.h"

namespace bicompile {

constexpr int kMaxDims = 64;  // torch's own limit

struct Dim {
  int64_t size, stride;
};

// A list of dims, outermost first, without dims of size 1; a dim that continues its predecessor is merged into it.
struct Dims {
  std::array<Dim, kMaxDims> dim;
  int count = 0;
  int64_t numel = 1;

  void add(int64_t size, int64_t stride) {
    numel *= size;
    if (size == 1) return;
    if (count > 0 && dim[count - 1].stride == size * stride) {
      dim[count - 1] = {dim[count - 1].size * size, stride};
    } else {
      dim[count++] = {size, stride};
    }
  }
  // One dense run of elements?
  bool is_dense() const { return count == 0 || (count == 1 && dim[0].stride == 1); }
};

// Visits the elements of `dims` in row-major order from the index-th on: `offset` is where the current one lies.
class Walk {
 public:
  Walk(const Dims& dims, int64_t index) : dims_(dims) {
    for (int i = dims.count; i-- > 0;) {
      at_[i] = dims.dim[i].size > 0 ? index % dims.dim[i].size : 0;
      index = dims.dim[i].size > 0 ? index / dims.dim[i].size : 0;
      offset += at_[i] * dims.dim[i].stride;
    }
  }
  void next() {
    for (int i = dims_.count; i-- > 0;) {
      offset += dims_.dim[i].stride;
      if (++at_[i] < dims_.dim[i].size) return;
      offset -= dims_.dim[i].size * dims_.dim[i].stride;
      at_[i] = 0;
    }
  }
  int64_t offset = 0;

 private:
  const Dims& dims_;
  std::array<int64_t, kMaxDims> at_;
};

// Copies the elements of `dims`, in row-major order, next to each other, converted to S.
template <class S, class In>
void gather(const In* p, const Dims& dims, S* to) {
  if (dims.numel == 0) return;
  Dim inner = dims.count ? dims.dim[dims.count - 1] : Dim{1, 1};
  Walk walk(dims, 0);
  Dims outer = dims;
  outer.count = dims.count ? dims.count - 1 : 0;
  Walk start(outer, 0);
  for (int64_t done = 0; done < dims.numel; done += inner.size, start.next()) {
    const In* from = p + start.offset;
    for (int64_t i = 0; i < inner.size; i++) *to++ = S(widen(from[i * inner.stride]));
  }
}

// As torch counts dims: from the end if negative; a 0-d tensor takes 0 and -1.
inline int64_t checked_dim(const char* op, int64_t dim, int64_t rank) {
  int64_t limit = rank > 0 ? rank : 1;
  STD_TORCH_CHECK(dim >= -limit && dim < limit, "bicompile::", op, ": expected a dim in [", -limit, ", ", limit - 1,
                  "], got ", dim, " for a tensor of rank ", rank, "; pass a dim that the tensor has");
  return dim < 0 ? dim + limit : dim;
}

inline bool is_floating(ScalarType t) {
  return t == ScalarType::Float || t == ScalarType::Double || t == ScalarType::BFloat16 || t == ScalarType::Half;
}

inline void check_floating(const char* op, const char* argument, ScalarType t) {
  STD_TORCH_CHECK(is_floating(t), "bicompile::", op, ": expected ", argument,
                  " in float32, float64, bfloat16 or float16, got ", torch::headeronly::toString(t),
                  "; convert it first, or call torch's own op");
}

inline bool computes_in_double(ScalarType t) { return t == ScalarType::Double; }

// A result written one number at a time, rounded once to its dtype.
struct Output {
  void* p;
  ScalarType dtype;

  explicit Output(const Tensor& t) : p(t.data_ptr()), dtype(t.scalar_type()) {}
  Output(void* data, ScalarType type) : p(data), dtype(type) {}

  template <class S>
  void put(int64_t i, S value) const {
    switch (dtype) {
      case ScalarType::Double: static_cast<double*>(p)[i] = canonical(double(value)); return;
      case ScalarType::Float: static_cast<float*>(p)[i] = canonical(float(value)); return;
      case ScalarType::BFloat16: static_cast<bf16*>(p)[i] = narrow<bf16>(float(value)); return;
      default: static_cast<fp16*>(p)[i] = narrow<fp16>(float(value)); return;
    }
  }
};

// What a reduction reads and where: rows of `reduced` elements, one for each element of `kept`.
struct Plan {
  Dims kept, reduced;
  std::vector<int64_t> result_sizes;
};

// Empty `dims`: all of them, as torch has it.
inline Plan plan_reduction(const char* op, const Tensor& x, const std::vector<int64_t>& dims, bool keepdim) {
  auto sizes = x.sizes();
  auto strides = x.strides();
  int64_t rank = int64_t(sizes.size());
  uint64_t mask = 0;
  for (int64_t d : dims) {
    uint64_t bit = uint64_t(1) << checked_dim(op, d, rank);
    STD_TORCH_CHECK(!(mask & bit), "bicompile::", op, ": expected each dim once, got dim ", d,
                    " twice; name every reduced dim once");
    mask |= bit;
  }
  if (dims.empty()) mask = ~uint64_t(0);
  Plan plan;
  plan.result_sizes.reserve(size_t(rank));
  for (int64_t d = 0; d < rank; d++) {
    bool reduce = mask >> d & 1;
    (reduce ? plan.reduced : plan.kept).add(sizes[d], strides[d]);
    if (!reduce || keepdim) plan.result_sizes.push_back(reduce ? 1 : sizes[d]);
  }
  return plan;
}

}  // namespace bicompile
