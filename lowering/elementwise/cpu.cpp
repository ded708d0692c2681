// bicompile::unary and bicompile::binary: the functions of math.h for eager code, with the bits that a compiled kernel
// gives them.
//
// Elements are gathered into a block of the computing type, whatever their strides, mapped there and rounded once.
#include <algorithm>
#include <numeric>

#include "../native/tensor.h"
#include "math.h"

namespace bicompile {
namespace {

constexpr int64_t kBlock = 512;      // elements mapped at once: both operands stay in L1
constexpr int64_t kTask = 16 * kBlock;  // elements of one task

// Replaces a[i] by the function's value, i < n; n is a multiple of the vector length.
template <class S>
using Map = void (*)(S* a, const S* b, int64_t n);
struct Function {
  const char* name;
  Map<float> in_float;
  Map<double> in_double;
};

template <class Vec, class F>
void map_unary(Lane<Vec>* a, const Lane<Vec>*, int64_t n) {
  for (int64_t i = 0; i < n; i += Vec::kLanes) store(a + i, F()(load(a + i)));
}
template <class Vec, class F>
void map_binary(Lane<Vec>* a, const Lane<Vec>* b, int64_t n) {
  for (int64_t i = 0; i < n; i += Vec::kLanes) store(a + i, F()(load(a + i), load(b + i)));
}

// One function object type for each name: ours, or libm's on every lane.
#define BICOMPILE_OURS(name)                                   \
  struct name##_of {                                           \
    template <class Vec, class... More>                        \
    BICOMPILE_INLINE Vec operator()(Vec x, More... y) const {  \
      return math::name(x, y...);                              \
    }                                                          \
  };
#define BICOMPILE_LIBM(name)                                                              \
  struct name##_of {                                                                      \
    template <class Vec, class... More>                                                   \
    BICOMPILE_INLINE Vec operator()(Vec x, More... y) const {                             \
      return math::per_lane([](auto... v) { return std::name(v...); }, x, y...);          \
    }                                                                                     \
  };
#define BICOMPILE_UNARY_OURS(F) \
  F(exp) F(exp2) F(expm1) F(log) F(log2) F(log10) F(log1p) F(sigmoid) F(tanh) F(erf) F(erfc) F(sin) F(cos) F(rsqrt) \
  F(sqrt)
#define BICOMPILE_UNARY_LIBM(F) F(tan) F(asin) F(acos) F(atan) F(sinh) F(cosh) F(asinh) F(acosh) F(atanh) F(lgamma)
#define BICOMPILE_BINARY_OURS(F) F(pow) F(pow_by_number) F(pow_of_number) F(fmod) F(remainder)
#define BICOMPILE_BINARY_LIBM(F) F(atan2) F(hypot) F(nextafter)
BICOMPILE_UNARY_OURS(BICOMPILE_OURS)
BICOMPILE_UNARY_LIBM(BICOMPILE_LIBM)
BICOMPILE_BINARY_OURS(BICOMPILE_OURS)
BICOMPILE_BINARY_LIBM(BICOMPILE_LIBM)

#define BICOMPILE_UNARY(name) {#name, map_unary<VecF, name##_of>, map_unary<VecD, name##_of>},
#define BICOMPILE_BINARY(name) {#name, map_binary<VecF, name##_of>, map_binary<VecD, name##_of>},
constexpr Function kUnary[] = {BICOMPILE_UNARY_OURS(BICOMPILE_UNARY) BICOMPILE_UNARY_LIBM(BICOMPILE_UNARY)};
constexpr Function kBinary[] = {BICOMPILE_BINARY_OURS(BICOMPILE_BINARY) BICOMPILE_BINARY_LIBM(BICOMPILE_BINARY)};

template <size_t N>
const Function& find(const char* op, const Function (&functions)[N], const std::string& name) {
  std::string known;
  for (const Function& f : functions) {
    if (name == f.name) return f;
    known += std::string(known.empty() ? "" : ", ") + f.name;
  }
  STD_TORCH_CHECK(false, "bicompile::", op, ": expected name to be one of ", known, "; got ", name);
}

struct Shape {
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides;
  bool operator==(const Shape&) const = default;
};

Shape shape_of(const Tensor& t) {
  Shape r{sizes_of(t), {}};
  for (int64_t i = 0; i < t.dim(); i++) r.strides.push_back(t.stride(i));
  return r;
}

// Whether the elements fill one piece of memory, each once, in any order of dims.
bool is_dense(const Shape& s) {
  std::vector<size_t> order(s.sizes.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](size_t i, size_t j) { return s.strides[i] < s.strides[j]; });
  int64_t step = 1;
  for (size_t i : order) {
    if (s.sizes[i] == 1) continue;
    if (s.strides[i] != step) return false;
    step *= s.sizes[i];
  }
  return true;
}

Tensor new_like(const Shape& s, ScalarType dtype) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      int64_t(s.sizes.size()), s.sizes.data(), s.strides.data(), int32_t(torch::stable::detail::from(dtype)),
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// Elements [first, first + n) of t in row-major order, widened.
template <class T, class S>
void gather(const T* data, const Shape& shape, int64_t first, int64_t n, S* out) {
  const int64_t dims = int64_t(shape.sizes.size());
  const int64_t columns = dims ? shape.sizes[dims - 1] : 1, step = dims ? shape.strides[dims - 1] : 0;
  while (n > 0) {
    int64_t row = first / columns, column = first % columns, offset = column * step;
    for (int64_t i = dims - 2; i >= 0; i--) {
      offset += row % shape.sizes[i] * shape.strides[i];
      row /= shape.sizes[i];
    }
    const int64_t count = std::min(n, columns - column);
    const T* source = data + offset;
    for (int64_t j = 0; j < count; j++) out[j] = widen(source[j * step]);
    out += count;
    first += count;
    n -= count;
  }
}

struct Operand {
  const void* data;
  ScalarType dtype;
  Shape shape;
};

template <class S>
void gather(const char* op, const Operand& x, int64_t first, int64_t n, S* out) {
  dispatch(op, x.dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (std::is_same_v<typename Compute<T>::Scalar, S>) {
      gather(static_cast<const T*>(x.data), x.shape, first, n, out);
    }
  });
}

void run(const char* op, const Function& f, const std::vector<Operand>& in, Tensor& result, int64_t count) {
  const int64_t tasks = (count + kTask - 1) / kTask;
  dispatch(op, result.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using S = typename Compute<T>::Scalar;
    using Vec = typename Compute<T>::Vec;
    T* out = static_cast<T*>(result.data_ptr());
    Map<S> map;
    if constexpr (std::is_same_v<S, float>) map = f.in_float;
    if constexpr (std::is_same_v<S, double>) map = f.in_double;
    parallel_tasks(tasks, 8 * count, [&](int64_t task) {
      alignas(64) S a[kBlock], b[kBlock];
      for (int64_t first = task * kTask; first < std::min(count, (task + 1) * kTask); first += kBlock) {
        const int64_t n = std::min(kBlock, count - first);
        const int64_t whole = (n + Vec::kLanes - 1) / Vec::kLanes * Vec::kLanes;
        std::fill(a + n, a + whole, S(1));
        gather(op, in[0], first, n, a);
        if (in.size() > 1) {
          std::fill(b + n, b + whole, S(1));
          gather(op, in[1], first, n, b);
        }
        map(a, b, whole);
        int64_t i = 0;
        for (; i + Vec::kLanes <= n; i += Vec::kLanes) store_as(out + first + i, load(a + i));
        if (i < n) store_as(out + first + i, load(a + i), int(n - i));
      }
    });
  });
}

Operand operand(const Tensor& t, bool flat) {
  Shape shape = flat ? Shape{{t.numel()}, {1}} : shape_of(t);
  return {t.data_ptr(), t.scalar_type(), shape};
}

Tensor unary(Tensor x, std::string name) {
  const Function& f = find("unary", kUnary, name);
  const Shape shape = shape_of(x);
  const bool flat = is_dense(shape);
  Tensor result = flat ? new_like(shape, x.scalar_type()) : new_tensor(shape.sizes, x.scalar_type());
  run("unary", f, {operand(x, flat)}, result, x.numel());
  return result;
}

bool is_half(ScalarType t) { return t == ScalarType::BFloat16 || t == ScalarType::Half; }

Tensor binary(Tensor a, Tensor b, std::string name) {
  const Function& f = find("binary", kBinary, name);
  const Shape shape = shape_of(a), other = shape_of(b);
  STD_TORCH_CHECK(shape.sizes == other.sizes,
                  "bicompile::binary: expected a and b of one shape, got other shapes; broadcast them first");
  const ScalarType dtype = a.scalar_type(), second = b.scalar_type();
  const bool mixed = (is_half(dtype) && second == ScalarType::Float) || (dtype == ScalarType::Float && is_half(second));
  STD_TORCH_CHECK(dtype == second || mixed, "bicompile::binary: expected a and b of one dtype, or one of them float32 "
                  "beside a half precision, got ", name_of(dtype), " and ", name_of(second), "; convert one first");
  const ScalarType out = is_half(second) ? second : dtype;
  const bool flat = shape == other && is_dense(shape);
  Tensor result = flat ? new_like(shape, out) : new_tensor(shape.sizes, out);
  run("binary", f, {operand(a, flat), operand(b, flat)}, result, a.numel());
  return result;
}

STABLE_TORCH_LIBRARY_IMPL(bicompile, CPU, m) {
  m.impl("unary", TORCH_BOX(&unary));
  m.impl("binary", TORCH_BOX(&binary));
}

}  // namespace
}  // namespace bicompile
