"""What the matrix product tests compute, and a pool of processes that compiles it beforehand.

Triton compiles one kernel at a time in a process, and a schedule has another binary for each layout.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import bicompile.lowering.matmul.op  # noqa: F401  registers the ops
from bicompile.lowering.gpu.device import device_key
from bicompile.lowering.matmul import gpu
from bicompile.lowering.matmul.problem import Problem, problem_of
from bicompile.lowering.matmul.schedule import OwnSchedule, table_for

DEVICE = torch.device("cuda", 0)
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (*HALVES, torch.float32, torch.float64)
ROWS = (1, 2, 7, 16, 33, 64, 65, 130, 300)

Case = tuple[torch.dtype, int, int, bool]
CASES: tuple[Case, ...] = (  # dtype, K, N, and whether the weight lies as [N, K]
    (torch.bfloat16, 1024, 512, True),
    (torch.bfloat16, 4096, 1536, False),
    (torch.bfloat16, 1111, 200, True),
    (torch.bfloat16, 1111, 200, False),
    (torch.bfloat16, 72, 17, True),
    (torch.float16, 1024, 512, True),
    (torch.float16, 1111, 200, False),
    (torch.float32, 1024, 512, True),
    (torch.float32, 1111, 200, False),
    (torch.float64, 1111, 200, True),
)


def spread(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    """Random values over many binades."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    scale = torch.exp2(torch.randint(-8, 5, shape, generator=generator, device=DEVICE).float())
    return (torch.randn(shape, generator=generator, device=DEVICE) * scale).to(dtype)


def weight(k: int, n: int, by_k: bool, dtype: torch.dtype) -> Tensor:
    """``[K, N]``, in memory as ``[N, K]`` if ``by_k``."""
    return spread(n, k, dtype=dtype, seed=1).t() if by_k else spread(k, n, dtype=dtype, seed=1)


def shifted(x: Tensor) -> Tensor:
    """The same values one element behind an aligned address, with rows 3 elements further apart."""
    memory = x.new_zeros(x.shape[0] * (x.shape[1] + 3) + 1)
    return memory[1:].view(x.shape[0], x.shape[1] + 3)[:, : x.shape[1]].copy_(x)


def situations(case: Case) -> Iterator[tuple[str, Tensor, Tensor]]:
    """What a row's bits must not show: its name, what came out, and the same rows of the whole batch."""
    dtype, k, n, by_k = case
    mm = torch.ops.bicompile.mm
    x, w = spread(max(ROWS), k, dtype=dtype), weight(k, n, by_k, dtype)
    whole = mm(x, w)
    for m in ROWS:
        yield f"{m} rows", mm(x[:m], w), whole[:m]
    order = torch.randperm(len(x), device=DEVICE)
    yield "permuted", mm(x[order], w), whole[order]
    poisoned = torch.full_like(x, float("nan"))
    poisoned[::2] = float("inf")
    poisoned[[5, 129]] = x[[5, 129]]
    yield "among NaN", mm(poisoned, w)[[5, 129]], whole[[5, 129]]
    for m in (1, 300):
        yield f"{m} misaligned rows", mm(shifted(x)[:m], w), whole[:m]
        yield f"{m} rows of a transposed matrix", mm(x.t().contiguous().t()[:m], w), whole[:m]
        yield f"{m} rows, misaligned weight", mm(x[:m], shifted(w)), whole[:m]
        other = w.t().contiguous().t() if w.is_contiguous() else w.contiguous()
        yield f"{m} rows, weight in the other layout", mm(x[:m], other), whole[:m]
    yield "one row 40 times", mm(x[7:8].expand(40, k), w), whole[7:8].expand(40, n)
    yield "one column", mm(x, w[:, 3:4]), whole[:, 3:4]


def listed() -> list[OwnSchedule]:
    """Every schedule of ours that the table of this device names."""
    return table_for(device_key(0).capability).own_schedules()


def listed_problem(dtype: torch.dtype) -> tuple[Tensor, Tensor, Problem]:
    """Factors that every schedule can take, and their problem."""
    x, w = spread(150, 2048, dtype=dtype), weight(2048, 416, True, dtype)
    return x, w, problem_of(x, w, dtype, tf32=False, add=False)


Job = tuple[Callable[..., None], Any]


def compile_beforehand() -> None:
    """Run what the tests run, in many processes, for the sake of the compiled kernels and the verdicts on disk."""
    in_processes([*((_run_case, case) for case in CASES), *admissions()])


def admissions() -> list[Job]:
    """What compiles and admits every listed schedule."""
    return [(_admit, (dtype, schedule)) for dtype in HALVES for schedule in listed()]


def in_processes(jobs: list[Job]) -> None:
    """Do each job, a function of a module and its argument, in one of many processes."""
    workers = min(len(jobs), max(1, (os.cpu_count() or 1) - 2), 14)
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for result in [pool.apply_async(job, (argument,)) for job, argument in jobs]:
            result.wait()


def _run_case(case: Case) -> None:
    for _ in situations(case):
        pass
    torch.cuda.synchronize()


def _admit(job: tuple[torch.dtype, OwnSchedule]) -> None:
    dtype, schedule = job
    gpu.admitted_runner(schedule, listed_problem(dtype)[2], DEVICE)


@contextlib.contextmanager
def tf32_allowed(allowed: bool) -> Iterator[None]:
    """Products of float32 in TF32, or not."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
