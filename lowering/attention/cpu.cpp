// bicompile::sdpa on the CPU: the choice of element type.  Its backward is a library of its own, cpu_backward.cpp.
#include "forward.h"

namespace bicompile::attention {
namespace {

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
                                bool causal, double scale, std::optional<Tensor> /*rows*/,
                                std::optional<Tensor> seeds, double dropout_p) {
  const Problem p = problem_of(q, k, v, mask, causal, scale, seeds, dropout_p);
  Tensor out = new_output(p, q.scalar_type());
  Tensor lse = new_statistic(p, q);
  dispatch("sdpa", q.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using S = typename Compute<T>::Scalar;
    if (p.heads > 0) forward<T>(p, static_cast<T*>(out.data_ptr()), static_cast<S*>(lse.data_ptr()));
  });
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bicompile, CPU, m) { m.impl("sdpa", TORCH_BOX(&sdpa)); }

}  // namespace bicompile::attention
