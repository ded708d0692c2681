// Sums and means of any dims of any strided tensor.
#include "reduce.h"

namespace bicompile {
namespace {

Tensor sum(const Tensor& x, std::vector<int64_t> dim, bool keepdim, ScalarType dtype) {
  return reduce_to_one("sum", x, dim, keepdim, dtype, Sum{Finish::kNothing});
}
Tensor mean(const Tensor& x, std::vector<int64_t> dim, bool keepdim, ScalarType dtype) {
  return reduce_to_one("mean", x, dim, keepdim, dtype, Sum{Finish::kDivideByCount});
}
Tensor sum_square(const Tensor& x, std::vector<int64_t> dim, bool keepdim, ScalarType dtype) {
  return reduce_to_one("sum_square", x, dim, keepdim, dtype, SumOfSquares{Finish::kNothing});
}
Tensor mean_square(const Tensor& x, std::vector<int64_t> dim, bool keepdim, ScalarType dtype) {
  return reduce_to_one("mean_square", x, dim, keepdim, dtype, SumOfSquares{Finish::kDivideByCount});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bicompile, CPU, m) {
  m.impl("sum", TORCH_BOX(&sum));
  m.impl("mean", TORCH_BOX(&mean));
  m.impl("sum_square", TORCH_BOX(&sum_square));
  m.impl("mean_square", TORCH_BOX(&mean_square));
}

}  // namespace bicompile
