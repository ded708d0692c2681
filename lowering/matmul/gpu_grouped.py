"""Grouped products on NVIDIA GPUs: the rows of each group as ``mm`` computes them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bicompile.lowering.gpu.launch import INTERPRETED, Launch
from bicompile.lowering.gpu.plans import Planned, new_dense

from . import gpu
from .gpu_kernels import grouped_depths_kernel, grouped_rows_kernel
from .problem import Problem, problem_of
from .schedule import REFERENCES, TileSchedule

_BY_ROWS = (
    (16, TileSchedule(16, 64, 128, warps=4, stages=4)),
    (64, TileSchedule(64, 64, 64, warps=4, stages=4)),
)
"""By the mean number of rows in a group; beyond, :data:`_MANY`."""
_MANY = TileSchedule(128, 128, 64, warps=8, stages=3)
SCHEDULES = (*(schedule for _, schedule in _BY_ROWS), _MANY, REFERENCES[torch.bfloat16])


def grouped_mm(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """See :func:`bicompile.lowering.matmul.grouped.grouped_mm`; the groups are known on the device only."""
    if a.dim() == 3:  # columns of groups: rows of groups of the transposed product
        return grouped_mm(b.t(), a.transpose(1, 2), ends).t().contiguous()
    return _grouped(a, b, ends)


@functools.partial(Planned, setting=gpu.rounds_to_tf32)
def _grouped(a: Tensor, b: Tensor, ends: Tensor) -> Callable[..., Tensor]:
    """The groups' products, where those of ``a`` are rows or lie along the inner dim."""
    by_rows = b.dim() == 3
    groups = ends.shape[0]
    shape = (a.shape[0], b.shape[2]) if by_rows else (groups, a.shape[0], b.shape[1])
    if 0 in shape or groups == 0:
        return lambda a, b, ends: a.new_zeros(shape)
    problem = problem_of(a, b[0] if by_rows else b, a.dtype, gpu.rounds_to_tf32(a), add=False)
    schedule = _preferred(problem, groups, by_rows)
    if not INTERPRETED and not _is_admitted(schedule, problem, by_rows, a.device):
        schedule = REFERENCES[a.dtype]
    launch = _launch(schedule, problem, b.stride(0) if by_rows else 0, groups, by_rows)
    device, new = a.device.index, new_dense(a, shape)

    def run(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
        out = new()
        launch(device, a, b, ends, out)
        return out

    return run


def _preferred(problem: Problem, groups: int, by_rows: bool) -> TileSchedule:
    """By the number of rows of an average group."""
    if problem.dtype.itemsize != 2:
        return REFERENCES[problem.dtype]
    each = problem.m / groups if by_rows else problem.m
    return next((schedule for most, schedule in _BY_ROWS if each <= most), _MANY)


def _launch(schedule: TileSchedule, problem: Problem, step_b: int, groups: int, by_rows: bool) -> Launch:
    """The kernel with everything but its tensors."""
    s, p = schedule, problem
    blocks = (s.block_m, s.block_n, s.block_k)
    strides = (p.a.row, p.a.column, p.b.row, p.b.column)
    precision = "tf32" if p.tf32 else "ieee"
    acc = tl.float64 if p.dtype == torch.float64 else tl.float32
    tiles_n = triton.cdiv(p.n, s.block_n)
    if not by_rows:
        grid = (groups * triton.cdiv(p.m, s.block_m) * tiles_n,)
        integers: tuple[int, ...] = (p.m, p.n, p.k, groups, *strides, p.n)
        constants: tuple[Any, ...] = (*blocks, s.group, s.swap, p.wide, precision, acc)
        return Launch(grouped_depths_kernel, grid, integers, constants, s.warps, s.stages)
    # Each group, and what is beyond the last, may leave one tile incomplete.
    tiles_m = triton.cdiv(p.m, s.block_m) + groups
    integers = (p.m, tiles_m, p.n, p.k, groups, *strides, step_b, p.n)
    constants = (
        triton.next_power_of_2(groups + 1),
        *blocks,
        *(s.swap, p.k % s.block_k == 0, p.wide, precision, acc),
    )
    return Launch(grouped_rows_kernel, (tiles_m * tiles_n,), integers, constants, s.warps, s.stages)


def _is_admitted(schedule: TileSchedule, problem: Problem, by_rows: bool, device: torch.device) -> bool:
    """Whether each group has the bits that the reference schedule of ``mm`` gives it; the reference itself has."""
    if schedule == REFERENCES[problem.dtype]:
        return True
    kind = "grouped rows" if by_rows else "grouped depths"
    key = f"{schedule}, {gpu.compilation_of(schedule, problem)} {kind}"
    sizes = gpu.probes.small_probes(problem, schedule.block_m, schedule.block_n)[:1]
    run = functools.partial(_grouped_results, schedule, sizes[0], by_rows, device)
    return gpu.ADMISSION.allows(key, device.index, run, lambda: _single_results(sizes[0], by_rows, device))


def _cuts(problem: Problem, by_rows: bool) -> list[int]:
    """The ends of four groups, one of them empty; what is beyond the last belongs to none."""
    size = problem.m if by_rows else problem.k
    step = 1 if by_rows else 16
    return [size // 3 // step * step, size // 3 // step * step, size - 2 * step, size - step]


def _grouped_results(schedule: TileSchedule, problem: Problem, by_rows: bool, device: torch.device) -> Iterator[Tensor]:
    cuts = _cuts(problem, by_rows)
    ends = torch.tensor(cuts, dtype=torch.int32, device=device)
    launch = _launch(schedule, problem, 0, len(cuts), by_rows)
    for a, b, _ in gpu.probes.factors(problem, device):
        shape = (problem.m, problem.n) if by_rows else (len(cuts), problem.m, problem.n)
        out = a.new_empty(shape)
        launch(device.index, a, b, ends, out)
        yield from (out[: cuts[-1]],) if by_rows else out.unbind()


def _single_results(problem: Problem, by_rows: bool, device: torch.device) -> Iterator[Tensor]:
    reference = REFERENCES[problem.dtype]
    cuts = _cuts(problem, by_rows)
    groups = [(0, cuts[-1])] if by_rows else list(itertools.pairwise([0, *cuts]))
    for a, b, _ in gpu.probes.factors(problem, device):
        for start, end in groups:
            left, right = (a[start:end], b) if by_rows else (a[:, start:end], b[start:end])
            out = a.new_empty(left.shape[0], right.shape[1])
            single = problem_of(left, right, a.dtype, problem.tf32, add=False)
            gpu.runner_of(reference, single, device.index)(left, right, None, out)
            yield out
