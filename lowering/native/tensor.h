// What a kernel needs of torch, through LibTorch's stable ABI: one binary serves every torch that loads it.
#pragma once

#include <atomic>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "simd.h"

namespace bicompile {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A new tensor, uninitialised and contiguous, on the CPU.
inline Tensor new_tensor(const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t step = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = step;
    step *= sizes[i] > 0 ? sizes[i] : 1;
  }
  AtenTensorHandle handle = nullptr;
  // Straight to the allocator: half the cost of aten::empty through the dispatcher.
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      int64_t(sizes.size()), sizes.data(), strides.data(),
      int32_t(torch::stable::detail::from(dtype)), aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline std::vector<int64_t> sizes_of(const Tensor& t) {
  std::vector<int64_t> r(t.dim());
  for (int64_t i = 0; i < t.dim(); i++) r[i] = t.size(i);
  return r;
}

inline const char* name_of(ScalarType t) {
  switch (t) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    default: return "another dtype";
  }
}

// Calls f with a value of the storage type of `dtype`.
template <class F>
void dispatch(const char* op, ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float: return f(float());
    case ScalarType::Double: return f(double());
    case ScalarType::BFloat16: return f(bf16());
    case ScalarType::Half: return f(fp16());
    default:
      STD_TORCH_CHECK(false, "bicompile::", op, ": expected float32, float64, bfloat16 or float16, got ", name_of(dtype));
  }
}

// The vector and scalar in which values of a storage type are computed.
template <class T>
struct Compute {
  using Vec = VecF;
  using Scalar = float;
};
template <>
struct Compute<double> {
  using Vec = VecD;
  using Scalar = double;
};

// Rounding to nearest and denormals as the kernel wants them, whatever the calling thread had set
// (torch.set_flush_denormal sets one thread, not the others); restored on the way out.
class FloatMode {
 public:
  explicit FloatMode(bool flush_denormals) {
#if defined(__SSE2__)
    saved_ = _mm_getcsr();
    _mm_setcsr(flush_denormals ? 0x1f80 | 0x8040 : 0x1f80);
#endif
  }
  ~FloatMode() {
#if defined(__SSE2__)
    _mm_setcsr(saved_);
#endif
  }

 private:
#if defined(__SSE2__)
  unsigned saved_;
#endif
};

// Runs f(task) for every task in [0, tasks), tasks handed out one by one to torch's own threads.  A task must compute
// whole output elements: who runs it, and when, then cannot be seen.  `work` is a rough count of elementary
// operations; little work stays on this thread.
template <class F>
void parallel_tasks(int64_t tasks, int64_t work, const F& f, bool flush_denormals = false) {
  int64_t threads = work < 50'000 ? 1 : int64_t(torch::stable::get_num_threads());
  if (tasks < threads) threads = tasks;
  if (threads <= 1) {
    FloatMode mode(flush_denormals);
    for (int64_t task = 0; task < tasks; task++) f(task);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    FloatMode mode(flush_denormals);
    for (int64_t task = next++; task < tasks; task = next++) f(task);
  });
}

// 64-byte aligned memory of one thread, kept between calls and grown when needed; contents undefined.  Each `Tag`
// names a buffer of its own.
template <class Tag, class T>
T* scratch(size_t count) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local size_t bytes = 0;
  size_t wanted = (count * sizeof(T) + 63) / 64 * 64;
  if (bytes < wanted) {
    memory.reset(std::aligned_alloc(64, wanted));
    STD_TORCH_CHECK(memory, "bicompile: out of memory, ", wanted, " bytes of scratch");
    bytes = wanted;
  }
  return static_cast<T*>(memory.get());
}

}  // namespace bicompile
