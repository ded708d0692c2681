// bicompile::sdpa_backward on the CPU: checks, and the choice of element type.
#include "backward.h"

namespace bicompile::attention {
namespace {

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
                                                         const Tensor& lse, bool causal, double scale, bool mask_grad,
                                                         std::optional<Tensor> seeds, double dropout_p) {
  const Problem p = problem_of(q, k, v, mask, causal, scale, seeds, dropout_p);
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
    std::vector<int64_t> first(p.dropout.seeds ? rows : 0);
    const RowStatistics<S> saved{statistics.data(), statistics.data() + rows, statistics.data() + 2 * rows,
                                 first.data()};
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

STABLE_TORCH_LIBRARY_IMPL(bicompile, CPU, m) { m.impl("sdpa_backward", TORCH_BOX(&sdpa_backward)); }

}  // namespace bicompile::attention
