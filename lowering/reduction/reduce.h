// Run a program on the rows of any strided tensor, whichever dims they lie along, in the order of block.h.
#pragma once
#include "any.h"
#include "programs.h"

namespace bicompile {
namespace {

// Below this many elements a task is not worth handing out.
constexpr int64_t kTaskElements = 4096;

// A copied row: one function for all dtypes that it was copied from.
template <class S, class Copied, class Program>
__attribute__((noinline)) void reduce_copied_row(const Program& program, const Copied* row, int64_t n,
                                                 Block<S>* results) {
  program(AlongRow{n}, RowInput<Copied, S>{row}, results);
}

// Rows whose elements lie next to each other, or that are copied to do so.
template <class In, class S, class Program>
void reduce_along_rows(const Plan& plan, const In* x, const Output* outputs, const Program& program) {
  const int64_t n = plan.reduced.numel, rows = plan.kept.numel;
  const int64_t rows_per_task = std::max<int64_t>(1, kTaskElements / std::max<int64_t>(n, 1));
  const bool in_place = kReadInPlace<In, S> && plan.reduced.is_dense();
  parallel_tasks((rows + rows_per_task - 1) / rows_per_task, rows * n * Program::kCost, [&](int64_t task) {
    struct Gathered;
    using Copied = std::conditional_t<std::is_same_v<In, float>, float, S>;  // half the memory, where S is double
    Copied* buffer = in_place ? nullptr : scratch<Gathered, Copied>(size_t(n));
    const int64_t first = task * rows_per_task, last = std::min(rows, first + rows_per_task);
    Walk walk(plan.kept, first);
    for (int64_t row = first; row < last; row++, walk.next()) {
      Block<S> results[Program::kOutputs];
      if (in_place) {
        if constexpr (kReadInPlace<In, S>) program(AlongRow{n}, RowInput<In, S>{x + walk.offset}, results);
      } else {
        gather(x + walk.offset, plan.reduced, buffer);
        reduce_copied_row(program, buffer, n, results);
      }
      for (int i = 0; i < Program::kOutputs; i++) outputs[i].put(row, first_lane(results[i].v[0]));
    }
  });
}

// Rows that lie side by side: the dim `side` of plan.kept has stride 1.
template <class In, class S, class Program>
void reduce_across_rows(const Plan& plan, int side, const In* x, const Output* outputs, const Program& program) {
  const int64_t n = plan.reduced.numel, width = plan.kept.dim[side].size;
  Dims others_in, others_out;  // the kept dims but `side`, as they lie in x and in the result
  int64_t step_out = 1, side_step_out = 1;
  std::array<int64_t, kMaxDims> steps_out;
  for (int i = plan.kept.count; i-- > 0;) {
    steps_out[i] = step_out;
    step_out *= plan.kept.dim[i].size;
  }
  for (int i = 0; i < plan.kept.count; i++) {
    if (i == side) {
      side_step_out = steps_out[i];
      continue;
    }
    // Not add(): merging must not differ between the two.
    others_in.dim[others_in.count++] = plan.kept.dim[i];
    others_out.dim[others_out.count++] = {plan.kept.dim[i].size, steps_out[i]};
    others_in.numel = others_out.numel *= plan.kept.dim[i].size;
  }
  std::vector<int64_t> table;
  if (plan.reduced.count > 1) {
    table.resize(size_t(n));
    Walk walk(plan.reduced, 0);
    for (int64_t k = 0; k < n; k++, walk.next()) table[size_t(k)] = walk.offset;
  }
  const int64_t step = plan.reduced.count ? plan.reduced.dim[0].stride : 0;
  const int64_t blocks = (width + kBlock - 1) / kBlock;
  const int64_t work = others_in.numel * width * n * Program::kCost;
  const int64_t tasks = others_in.numel * blocks, blocks_per_task = blocks >= 32 ? 4 : 1;
  auto one_block = [&](int64_t task) {
    const int64_t column = task % blocks * kBlock;
    const int count = int(std::min<int64_t>(kBlock, width - column));
    const In* from = x + Walk(others_in, task / blocks).offset + column;
    const int64_t to = Walk(others_out, task / blocks).offset + column * side_step_out;
    Block<S> results[Program::kOutputs];
    program(AcrossRows{n, count}, RowsInput<In, S>{from, step, table.empty() ? nullptr : table.data()}, results);
    for (int i = 0; i < Program::kOutputs; i++) {
      if (side_step_out == 1) {
        AnyOutput<S>{outputs[i].p, outputs[i].dtype}(to, results[i], count);
        continue;
      }
      alignas(64) S lanes[kBlock];
      store_block(lanes, results[i], kBlock);
      for (int c = 0; c < count; c++) outputs[i].put(to + c * side_step_out, lanes[c]);
    }
  };
  // Neighbouring blocks stay on one thread: what one prefetches, the next one reads.
  parallel_tasks((tasks + blocks_per_task - 1) / blocks_per_task, work, [&](int64_t task) {
    const int64_t last = std::min(tasks, (task + 1) * blocks_per_task);
    for (int64_t block = task * blocks_per_task; block < last; block++) one_block(block);
  });
}

template <class In, class S, class Program>
void reduce_as(const Plan& plan, const In* x, const Output* outputs, const Program& program) {
  if constexpr (kReadInPlace<In, S>) {
    int side = -1;
    for (int i = 0; i < plan.kept.count; i++) {
      if (plan.kept.dim[i].stride == 1) side = i;
    }
    bool one_element_rows = plan.reduced.count == 0;
    if (side >= 0 && (one_element_rows || !plan.reduced.is_dense())) {
      return reduce_across_rows<In, S>(plan, side, x, outputs, program);
    }
  }
  reduce_along_rows<In, S>(plan, x, outputs, program);
}

// Runs `program` on the rows of x and returns its results, rounded to `dtype`, in whose precision it computes.
template <class Program>
std::array<Tensor, Program::kOutputs> reduce(const char* op, const Tensor& x, const Plan& plan, ScalarType dtype,
                                             const Program& program) {
  check_floating(op, "dtype", dtype);
  std::array<Tensor, Program::kOutputs> results = [&]<size_t... I>(std::index_sequence<I...>) {
    return std::array<Tensor, Program::kOutputs>{(void(I), new_tensor(plan.result_sizes, dtype))...};
  }(std::make_index_sequence<Program::kOutputs>());
  if (plan.kept.numel == 0) return results;
  const auto outputs = [&]<size_t... I>(std::index_sequence<I...>) {
    return std::array<Output, Program::kOutputs>{Output(results[I])...};
  }(std::make_index_sequence<Program::kOutputs>());
  const void* p = x.data_ptr();
  dispatch(op, x.scalar_type(), [&](auto in) {
    using In = decltype(in);
    if (computes_in_double(dtype)) {
      reduce_as<In, double>(plan, static_cast<const In*>(p), outputs.data(), program);
    } else {
      reduce_as<In, float>(plan, static_cast<const In*>(p), outputs.data(), program);
    }
  });
  return results;
}

template <class Program>
Tensor reduce_to_one(const char* op, const Tensor& x, const std::vector<int64_t>& dim, bool keepdim, ScalarType dtype,
                     const Program& program) {
  check_floating(op, "x", x.scalar_type());
  return reduce(op, x, plan_reduction(op, x, dim, keepdim), dtype, program)[0];
}

}  // namespace
}  // namespace bicompile
