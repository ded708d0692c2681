// What a call of bicompile::sdpa or of its backward computes with: its arguments, checked.
#pragma once

#include <cmath>
#include <string>

#include "dropout.h"
#include "pack.h"

namespace bicompile::attention {

// What is not a matter of the element type.  Strides are in elements, of [batch, head, row, column].
struct View {
  const void* data = nullptr;
  int64_t strides[4] = {0, 0, 0, 0};
  template <class T>
  Matrix<T> matrix(int64_t batch, int64_t head) const {
    return {static_cast<const T*>(data) + batch * strides[0] + head * strides[1], strides[2], strides[3]};
  }
};

struct Problem {
  int64_t batch, heads, kv_heads, queries, keys, depth, value_depth;
  View q, k, v, mask;
  ScalarType mask_dtype;
  bool causal;
  double scale;
  Dropout dropout;
  int64_t group() const { return heads / kv_heads; }
};

inline std::string shape_of(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); i++) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

inline View view_of(const Tensor& t) {
  View v{t.data_ptr(), {}};
  for (int64_t i = 0; i < 4; i++) v.strides[i] = t.stride(i);
  return v;
}

// A mask of up to four dims against [batch, heads, queries, keys]: stride 0 where it is broadcast.
inline View mask_view(const Tensor& mask, const int64_t (&sizes)[4]) {
  View v{mask.data_ptr(), {0, 0, 0, 0}};
  STD_TORCH_CHECK(mask.dim() <= 4, "bicompile::sdpa: expected a mask of at most 4 dims, got shape ", shape_of(mask));
  for (int64_t i = 0; i < mask.dim(); i++) {
    const int64_t to = 4 - mask.dim() + i, size = mask.size(i);
    STD_TORCH_CHECK(size == 1 || size == sizes[to],
                    "bicompile::sdpa: expected a mask that broadcasts to [batch, heads, queries, keys] = [", sizes[0],
                    ", ", sizes[1], ", ", sizes[2], ", ", sizes[3], "], got shape ", shape_of(mask));
    if (size != 1) v.strides[to] = mask.stride(i);
  }
  return v;
}

inline Problem problem_of(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask,
                          bool causal, double scale, const std::optional<Tensor>& seeds, double dropout_p) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4,
                  "bicompile::sdpa: expected q, k, v of 4 dims, [batch, heads, length, depth], got shapes ",
                  shape_of(q), ", ", shape_of(k), " and ", shape_of(v));
  STD_TORCH_CHECK(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(),
                  "bicompile::sdpa: expected q, k, v of one dtype; cast them to one first");
  STD_TORCH_CHECK(k.size(0) == q.size(0) && v.size(0) == q.size(0) && k.size(1) == v.size(1) &&
                      k.size(2) == v.size(2) && k.size(3) == q.size(3) &&
                      (k.size(1) > 0 ? q.size(1) % k.size(1) == 0 : q.size(1) == 0),
                  "bicompile::sdpa: expected q [B, H, L, D], k [B, Hkv, S, D] and v [B, Hkv, S, Dv] with H a multiple ",
                  "of Hkv, got ", shape_of(q), ", ", shape_of(k), " and ", shape_of(v));
  Problem p{q.size(0), q.size(1), k.size(1), q.size(2), k.size(2), q.size(3), v.size(3),
            view_of(q), view_of(k), view_of(v), {}, ScalarType::Bool, causal, scale, {}};
  if (mask) {
    const ScalarType dtype = mask->scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Bool || dtype == ScalarType::Float || dtype == q.scalar_type(),
                    "bicompile::sdpa: expected a mask of bool, float32 or q's dtype, got ", name_of(dtype));
    p.mask = mask_view(*mask, {p.batch, p.heads, p.queries, p.keys});
    p.mask_dtype = dtype;
  }
  STD_TORCH_CHECK(seeds || dropout_p == 0, "bicompile::sdpa: expected seeds for dropout_p=", dropout_p, ", got none");
  if (seeds) {
    STD_TORCH_CHECK(seeds->scalar_type() == ScalarType::Long && seeds->dim() == 3 && seeds->size(0) == p.batch &&
                        seeds->size(1) == p.heads && seeds->size(2) == p.queries && dropout_p >= 0 && dropout_p <= 1,
                    "bicompile::sdpa: expected int64 seeds [B, H, L] and dropout_p from 0 to 1, got shape ",
                    shape_of(*seeds), " and dropout_p=", dropout_p);
    p.dropout.seeds = static_cast<const int64_t*>(seeds->data_ptr());
    for (int64_t i = 0; i < 3; i++) p.dropout.strides[i] = seeds->stride(i);
    p.dropout.threshold = uint64_t(std::nearbyint(dropout_p * 0x1p24));
    p.dropout.scale = dropout_p < 1 ? 1 / (1 - dropout_p) : 0;
  }
  return p;
}

}  // namespace bicompile::attention
