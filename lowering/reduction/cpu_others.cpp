// The other reductions: a library of its own, since a model seldom needs them and they take long to compile.
#include "reduce.h"

namespace bicompile {
namespace {

Tensor prod(const Tensor& x, std::vector<int64_t> dim, bool keepdim, ScalarType dtype) {
  return reduce_to_one("prod", x, dim, keepdim, dtype, Product{});
}

template <class Program>
Tensor extremum(const char* op, const Tensor& x, const std::vector<int64_t>& dim, bool keepdim, ScalarType dtype) {
  check_floating(op, "x", x.scalar_type());
  Plan plan = plan_reduction(op, x, dim, keepdim);
  STD_TORCH_CHECK(plan.reduced.numel > 0 || plan.kept.numel == 0, "bicompile::", op,
                  ": expected at least one element to reduce, got an empty dim; nothing is the extremum of no numbers");
  return reduce(op, x, plan, dtype, Program{false})[0];
}
Tensor amax(const Tensor& x, std::vector<int64_t> dim, bool keepdim, ScalarType dtype) {
  return extremum<Extremum<Max>>("amax", x, dim, keepdim, dtype);
}
Tensor amin(const Tensor& x, std::vector<int64_t> dim, bool keepdim, ScalarType dtype) {
  return extremum<Extremum<Min>>("amin", x, dim, keepdim, dtype);
}

std::tuple<Tensor, Tensor> var(const Tensor& x, std::vector<int64_t> dim, double correction, bool keepdim, bool sqrt) {
  check_floating("var", "x", x.scalar_type());
  auto r = reduce("var", x, plan_reduction("var", x, dim, keepdim), x.scalar_type(), Variance{correction, sqrt});
  return {r[0], r[1]};
}

Tensor vector_norm(const Tensor& x, double ord, std::vector<int64_t> dim, bool keepdim, ScalarType dtype) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  check_floating("vector_norm", "x", x.scalar_type());
  Plan plan = plan_reduction("vector_norm", x, dim, keepdim);
  STD_TORCH_CHECK((ord >= 0 && ord != kInfinity) || plan.reduced.numel > 0 || plan.kept.numel == 0,
                  "bicompile::vector_norm: expected at least one element for ord ", ord,
                  ", which has no identity, got an empty dim; use an ord in [0, inf)");
  auto run = [&](const auto& program) { return reduce("vector_norm", x, plan, dtype, program)[0]; };
  if (ord == 2) return run(SumOfSquares{Finish::kSquareRoot});
  if (ord == kInfinity) return run(Extremum<Max>{true});
  if (ord == -kInfinity) return run(Extremum<Min>{true});
  return run(Norm{ord});
}

Tensor logsumexp(const Tensor& x, std::vector<int64_t> dim, bool keepdim) {
  check_floating("logsumexp", "x", x.scalar_type());
  return reduce("logsumexp", x, plan_reduction("logsumexp", x, dim, keepdim), x.scalar_type(), LogSumExp{})[0];
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bicompile, CPU, m) {
  m.impl("prod", TORCH_BOX(&prod));
  m.impl("amax", TORCH_BOX(&amax));
  m.impl("amin", TORCH_BOX(&amin));
  m.impl("var", TORCH_BOX(&var));
  m.impl("vector_norm", TORCH_BOX(&vector_norm));
  m.impl("logsumexp", TORCH_BOX(&logsumexp));
}

}  // namespace bicompile
