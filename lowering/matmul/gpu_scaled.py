"""Products of 8-bit floats with scales, on NVIDIA GPUs from sm_89 on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import triton
from torch import Tensor

from bicompile.lowering.gpu.device import device_key
from bicompile.lowering.gpu.launch import INTERPRETED, Launch
from bicompile.lowering.gpu.plans import Planned, new_dense

from . import gpu
from .gpu_kernels import scaled_kernel
from .problem import Problem, problem_of
from .schedule import TileSchedule

BLOCK_K = 128
"""Part of the order: see ``gpu_order_for``."""
REFERENCE = TileSchedule(64, 64, BLOCK_K, warps=4, stages=3)
# Fewer than 64 rows on the wide side of the instruction would run without the 8-bit tensor cores of sm_90, with
# other bits: so few rows are computed as columns.  A tile of 8 columns has other bits than the rest (H100, Triton 3.6).
BY_ROWS = (
    (16, TileSchedule(16, 64, BLOCK_K, warps=4, stages=5, swap=True)),
    (32, TileSchedule(32, 64, BLOCK_K, warps=4, stages=4, swap=True)),
    (128, REFERENCE),
)
MANY = TileSchedule(128, 128, BLOCK_K, warps=8, stages=3)
SCHEDULES = (*(schedule for _, schedule in BY_ROWS), MANY)
_OLDEST = (8, 9)


@Planned
def scaled_mm(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Callable[..., Tensor]:
    """``(a @ b) * a_scale * b_scale``, rounded to ``out_dtype``; then ``bias`` is added, which rounds again."""
    new, device = new_dense(a, (a.shape[0], b.shape[1]), out_dtype), a.device.index
    if a.shape[0] * b.shape[1] == 0:
        return lambda *arguments: new()
    if not INTERPRETED and (capability := device_key(a.device.index).capability) < _OLDEST:
        raise NotImplementedError(
            f"bicompile::scaled_mm: expected sm_89 or newer, which have 8-bit tensor cores, got "
            f"sm_{capability[0]}{capability[1]}; convert the factors to bfloat16"
        )
    problem = problem_of(a, b, out_dtype, tf32=False, add=bias is not None)
    steps = (_step(a_scale), _step(b_scale))
    wanted = next((schedule for most, schedule in BY_ROWS if problem.m <= most), MANY)
    if wanted != REFERENCE and not INTERPRETED and not is_admitted(wanted, problem, a.device):
        wanted = REFERENCE
    launch = _launch(wanted, problem, steps)

    def run(
        a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
    ) -> Tensor:
        out = new()
        launch(device, a, b, a_scale, b_scale, out if bias is None else bias, out)
        return out

    return run


def _step(scale: Tensor) -> int:
    """Elements from one row's scale to the next; 0 where all share one."""
    return next((stride for size, stride in zip(scale.shape, scale.stride(), strict=True) if size > 1), 0)


def _launch(schedule: TileSchedule, problem: Problem, steps: tuple[int, int]) -> Launch:
    s, p = schedule, problem
    tiles = triton.cdiv(p.m, s.block_m) * triton.cdiv(p.n, s.block_n)
    integers = (p.m, p.n, p.k, p.a.row, p.a.column, p.b.row, p.b.column, *steps)
    constants = (s.block_m, s.block_n, s.block_k, s.group, s.swap, p.k % s.block_k == 0, p.add)
    return Launch(scaled_kernel, (tiles,), integers, constants, s.warps, s.stages)


def is_admitted(schedule: TileSchedule, problem: Problem, device: torch.device) -> bool:
    key = f"{schedule}, {gpu.compilation_of(schedule, problem)} scaled"
    sizes = gpu.probes.small_probes(problem, schedule.block_m, schedule.block_n)
    results = functools.partial(_results, sizes=sizes, device=device)
    return gpu.ADMISSION.allows(key, device.index, lambda: results(schedule), lambda: results(REFERENCE))


def _results(schedule: TileSchedule, sizes: list[Problem], device: torch.device) -> Iterator[Tensor]:
    for p in sizes:
        launch = _launch(schedule, p, (1, 1))
        a_scale = torch.linspace(0.5, 2.0, p.m, dtype=torch.float32, device=device)
        b_scale = torch.linspace(0.25, 1.0, p.n, dtype=torch.float32, device=device)
        for a, b, c in gpu.probes.factors(p, device):
            out = torch.full((p.m, p.n), torch.nan, dtype=p.out, device=device)
            launch(device.index, a, b, a_scale, b_scale, out if c is None else c[0], out)
            yield out
