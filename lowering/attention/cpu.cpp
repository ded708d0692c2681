// bicompile::sdpa and its backward on the CPU: checks, views, and the choice of element type.
#include "backward.h"

namespace bicompile::attention {
namespace {

std::string shape_of(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); i++) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

View view_of(const Tensor& t) {
  View v{t.data_ptr(), {}};
  for (int64_t i = 0; i < 4; i++) v.strides[i] = t.stride(i);
  return v;
}

// A mask of up to four dims against [batch, heads, queries, keys]: stride 0 where it is broadcast.
View mask_view(const Tensor& mask, const int64_t (&sizes)[4]) {
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

Problem problem_of(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask, bool causal,
                   double scale) {
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
            view_of(q), view_of(k), view_of(v), {}, ScalarType::Bool, causal, scale};
  if (mask) {
    const ScalarType dtype = mask->scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Bool || dtype == ScalarType::Float || dtype == q.scalar_type(),
                    "bicompile::sdpa: expected a mask of bool, float32 or q's dtype, got ", name_of(dtype));
    p.mask = mask_view(*mask, {p.batch, p.heads, p.queries, p.keys});
    p.mask_dtype = dtype;
  }
  return p;
}

// [batch, heads, queries, value_depth] that lies in memory as [batch, queries, heads, value_depth].
Tensor new_output(const Problem& p, ScalarType dtype) {
  auto at_least_one = [](int64_t n) { return n > 0 ? n : 1; };
  const int64_t row = at_least_one(p.value_depth), query = row * at_least_one(p.heads);
  const int64_t sizes[4] = {p.batch, p.heads, p.queries, p.value_depth};
  const int64_t strides[4] = {query * at_least_one(p.queries), row, query, 1};
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(4, sizes, strides, int32_t(torch::stable::detail::from(dtype)),
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor new_statistic(const Problem& p, const Tensor& q) {
  const bool wide = q.scalar_type() == ScalarType::Double;
  return new_tensor({p.batch, p.heads, p.queries}, wide ? ScalarType::Double : ScalarType::Float);
}

std::tuple<Tensor, Tensor> sdpa(const Tensor& q, const Tensor& k, const Tensor& v, std::optional<Tensor> mask,
                                bool causal, double scale, std::optional<Tensor> /*rows*/) {
  const Problem p = problem_of(q, k, v, mask, causal, scale);
  Tensor out = new_output(p, q.scalar_type());
  Tensor lse = new_statistic(p, q);
  dispatch("sdpa", q.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using S = typename Compute<T>::Scalar;
    if (p.heads > 0) forward<T>(p, static_cast<T*>(out.data_ptr()), static_cast<S*>(lse.data_ptr()));
  });
  return {out, lse};
}

// The gradient of a mask of q's dtype or float32, in the mask's own shape.
template <class S>
Tensor mask_gradient(const Problem& p, const Tensor& mask, const S* score_grad) {
  int64_t sizes[4] = {1, 1, 1, 1};
  for (int64_t i = 0; i < mask.dim(); i++) sizes[4 - mask.dim() + i] = mask.size(i);
  Tensor result = new_tensor(sizes_of(mask), mask.scalar_type());
  dispatch("sdpa_backward", mask.scalar_type(), [&](auto type) {
    using M = decltype(type);
    if constexpr (std::is_same_v<S, float> ? sizeof(M) <= 4 : sizeof(M) >= 4) {
      reduce_mask_gradient<M>(p, score_grad, sizes, static_cast<M*>(result.data_ptr()));
    }
  });
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sdpa_backward(const Tensor& grad, const Tensor& q, const Tensor& k,
                                                         const Tensor& v, std::optional<Tensor> mask, const Tensor& out,
                                                         const Tensor& lse, bool causal, double scale, bool mask_grad) {
  const Problem p = problem_of(q, k, v, mask, causal, scale);
  for (const Tensor* t : {&grad, &out})
    STD_TORCH_CHECK(t->dim() == 4 && t->scalar_type() == q.scalar_type() && t->size(0) == p.batch &&
                        t->size(1) == p.heads && t->size(2) == p.queries && t->size(3) == p.value_depth,
                    "bicompile::sdpa_backward: expected grad and out of q's dtype and shape [B, H, L, Dv], got shape ",
                    shape_of(*t));
  STD_TORCH_CHECK(!mask_grad || (mask && mask->scalar_type() != ScalarType::Bool),
                  "bicompile::sdpa_backward: mask_grad needs a floating-point mask");
  Tensor dq = new_tensor(sizes_of(q), q.scalar_type()), dk = new_tensor(sizes_of(k), q.scalar_type());
  Tensor dv = new_tensor(sizes_of(v), q.scalar_type());
  std::optional<Tensor> dmask;
  dispatch("sdpa_backward", q.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using S = typename Compute<T>::Scalar;
    const int64_t rows = p.batch * p.heads * p.queries;
    std::vector<S> statistics(3 * rows), score_grad(mask_grad ? rows * p.keys : 0);
    const RowStatistics<S> saved{statistics.data(), statistics.data() + rows, statistics.data() + 2 * rows};
    if (p.heads > 0) {
      const View grads = view_of(grad);
      S* of_scores = mask_grad ? score_grad.data() : nullptr;
      backward_queries<T>(p, grads, view_of(out), static_cast<T*>(dq.data_ptr()), of_scores, saved);
      backward_keys<T>(p, grads, static_cast<T*>(dk.data_ptr()), static_cast<T*>(dv.data_ptr()), saved);
    }
    if (mask_grad) dmask = mask_gradient(p, *mask, score_grad.data());
  });
  return {dq, dk, dv, dmask ? *dmask : new_tensor({0}, q.scalar_type())};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bicompile, CPU, m) {
  m.impl("sdpa", TORCH_BOX(&sdpa));
  m.impl("sdpa_backward", TORCH_BOX(&sdpa_backward));
}

}  // namespace bicompile::attention
