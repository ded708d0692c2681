"""Matrix products on NVIDIA GPUs: choose an admitted schedule for the sizes at hand, keep it, and run it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bicompile.lowering.gpu.admission import Admission
from bicompile.lowering.gpu.device import device_key
from bicompile.lowering.gpu.launch import INTERPRETED
from bicompile.lowering.gpu.plans import Planned, is_capturing, new_dense

from . import cublaslt, probes
from .problem import Problem, problem_of
from .runners import Runner, can_ask_library, library_product, library_runner, num_sms, stream_runner, tile_runner
from .schedule import (
    REFERENCES,
    LibrarySchedule,
    OwnSchedule,
    Schedule,
    TileSchedule,
    preferences,
    table_for,
)

_FOLDER = Path(__file__).parent
_SOURCES = (
    "cublaslt.py gpu.py gpu_grouped.py gpu_kernels.py gpu_scaled.py probes.py problem.py runners.py schedule.py".split()
)
ADMISSION = Admission("matmul", [_FOLDER / name for name in _SOURCES])
_SUGGESTIONS = 4
"""How many of cuBLASLt's suggestions are tried: on an H100 the first few hold the fastest."""
_PROBE_ELEMENTS = 1 << 24
"""Elements of a factor of a probe at full size: as many as keep the probe's memory below 200 MB."""


def rounds_to_tf32(a: Tensor, *_: Any) -> bool:
    """Whether the elements of ``a`` may be rounded to TF32."""
    return a.dtype == torch.float32 and allows_tf32()


_planned = functools.partial(Planned, setting=rounds_to_tf32)


@_planned
def mm(a: Tensor, b: Tensor) -> Callable[..., Tensor]:
    """``a @ b`` of ``[M, K]`` and ``[K, N]``."""
    return _product(a, b)


@_planned
def bmm(a: Tensor, b: Tensor) -> Callable[..., Tensor]:
    """``a @ b`` of ``[B, M, K]`` and ``[B, K, N]``."""
    return _product(a, b)


@_planned
def addmm(c: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> Callable[..., Tensor]:
    """``beta * c + alpha * (a @ b)``, every operation rounded to the dtype; with ``beta`` 0, ``c`` is not looked at."""
    return _affine(c, a, b, beta, alpha)


@_planned
def baddbmm(c: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> Callable[..., Tensor]:
    """:func:`addmm` for each of a batch."""
    return _affine(c, a, b, beta, alpha)


def _product(a: Tensor, b: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """``a @ b``."""
    runner, new = _runner(a, b, add=False), new_dense(a, (*a.shape[:-1], b.shape[-1]))

    def run(a: Tensor, b: Tensor) -> Tensor:
        out = new()
        runner(a, b, None, out)
        return out

    return run


def _affine(c: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> Callable[..., Tensor]:
    """``beta * c + alpha * (a @ b)``."""
    if alpha == 1 and beta == 1:
        shape = (*a.shape[:-1], b.shape[-1])
        runner, new = _runner(a, b, add=True), new_dense(a, shape)

        def run(c: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> Tensor:
            out = new()
            runner(a, b, c.expand(shape), out)
            return out

        return run

    product = _product(a, b)

    def run_scaled(c: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> Tensor:
        y = product(a, b)
        if alpha != 1:
            y = y * alpha
        return y if beta == 0 else y + (c if beta == 1 else c * beta)

    return run_scaled


def _runner(a: Tensor, b: Tensor, add: bool) -> Runner:
    """That of the schedule preferred for these factors."""
    return _preferred(problem_of(a, b, a.dtype, rounds_to_tf32(a), add), a.device)


def allows_tf32() -> bool:
    """Whether torch's own settings let float32 factors be rounded to TF32."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _preferred(problem: Problem, device: torch.device) -> Runner:
    """The runner of the first schedule among the preferences that is admitted."""
    p = problem
    if min(p.batch, p.m, p.n) == 0:
        return lambda a, b, c, out: None
    if INTERPRETED:
        return tile_runner(REFERENCES[p.dtype], p, 0)
    index = device.index
    wanted = preferences(p, table_for(device_key(index).capability), num_sms(index))
    for schedule in wanted[:-1]:
        runner = admitted_runner(schedule, p, device)
        if runner is not None:
            return runner
    return runner_of(REFERENCES[p.dtype], p, index)


def admitted_runner(schedule: Schedule, problem: Problem, device: torch.device) -> Runner | None:
    """``schedule`` ready to run, or None where it cannot run this problem, or gave other bits than the reference."""
    if isinstance(schedule, LibrarySchedule):
        return next(library_runners(schedule, problem, device), None)
    if schedule == REFERENCES[problem.dtype]:
        return runner_of(schedule, problem, device.index)
    key = f"{schedule}, {compilation_of(schedule, problem)}"
    sizes = probes.small_probes(problem, schedule.block_m, schedule.block_n)
    run = functools.partial(_results, lambda p: runner_of(schedule, p, device.index), sizes, device)
    if not ADMISSION.allows(key, device.index, run, lambda: _reference_results(sizes, device)):
        return None
    return runner_of(schedule, problem, device.index)


def library_runners(schedule: LibrarySchedule, problem: Problem, device: torch.device) -> Iterator[Runner]:
    """The admitted ones among cuBLASLt's suggestions, the one that it thinks fastest first."""
    p = problem
    if is_capturing() or not can_ask_library(p) or not cublaslt.available():
        return
    try:
        found = cublaslt.algorithms(library_product(p), device.index, _SUGGESTIONS)
    except cublaslt.CublasLtError:
        return
    for algorithm in found[schedule.first :]:
        if _admits(algorithm, p, device):
            yield library_runner(algorithm, p, device.index)


def _admits(algorithm: cublaslt.Algorithm, problem: Problem, device: torch.device) -> bool:
    """Whether an algorithm of cuBLASLt gives the reference's bits at this N and K, at several M."""

    def runner_for(probe: Problem) -> Runner:
        return library_runner(algorithm.moved_to(library_product(probe), device.index), probe, device.index)

    @functools.cache
    def sizes() -> list[Problem]:
        found = [probe for probe in probes.full_probes(problem, _PROBE_ELEMENTS) if _takes(runner_for, probe)]
        if not found:
            raise cublaslt.CublasLtError("it can compute none of the probes")
        return found

    key = f"cuBLASLt {cublaslt.version()} {algorithm.config}, {_shape_of(problem)}"
    run, reference = (lambda: _results(runner_for, sizes(), device)), (lambda: _reference_results(sizes(), device))
    return ADMISSION.allows(key, device.index, run, reference)


def _takes(runner_for: Callable[[Problem], Runner], problem: Problem) -> bool:
    """Whether an algorithm can compute a problem of these sizes."""
    try:
        runner_for(problem)
    except cublaslt.CublasLtError:
        return False
    return True


def runner_of(schedule: OwnSchedule, problem: Problem, device: int) -> Runner:
    """``schedule`` ready to run ``problem``, admitted or not."""
    if isinstance(schedule, TileSchedule):
        return tile_runner(schedule, problem, device)
    return stream_runner(schedule, problem, device)


def _reference_results(sizes: list[Problem], device: torch.device) -> Iterator[Tensor]:
    """What the reference schedule makes of the probes of each size."""
    return _results(lambda p: runner_of(REFERENCES[p.dtype], p, device.index), sizes, device)


def _results(runner_for: Callable[[Problem], Runner], sizes: list[Problem], device: torch.device) -> Iterator[Tensor]:
    """What a schedule makes of the probes of each size."""
    for p in sizes:
        runner = runner_for(p)
        for a, b, c in probes.factors(p, device):
            out = torch.full((*a.shape[:-1], p.n), torch.nan, dtype=p.out, device=device)
            runner(a, b, c, out)
            yield out


def compilation_of(schedule: Any, problem: Problem) -> str:
    """Everything that makes another binary of a schedule of ours."""
    p = problem
    ragged = "even" if p.k % schedule.block_k == 0 else "ragged"
    integers = (p.n, p.k, p.a.row, p.a.column, p.b.row, p.b.column, p.a.step, p.b.step)
    divisible = "".join("1" if n == 1 else "-" if n % 16 else "a" for n in integers)
    loose = [name for name, factor in (("loose a", p.a), ("loose b", p.b)) if not factor.aligned]
    return " ".join([_name(p.dtype), _name(p.out), p.layout, ragged, divisible, *loose, *_flags(p)])


def _shape_of(problem: Problem) -> str:
    """Everything but the number of rows, or of what is added up in a weight's gradient."""
    p = problem
    k = p.k if p.a_by_k else f"<{1 << p.k.bit_length()}"
    aligned = ("aligned" if p.is_aligned else "loose") + ("" if p.n % 16 == 0 else " ragged")
    batched = ["batched"] if p.batch > 1 else []
    return " ".join([_name(p.dtype), _name(p.out), p.layout, f"{k}x{p.n}", aligned, *batched, *_flags(p)])


def _flags(problem: Problem) -> list[str]:
    return [name for name in ("tf32", "add", "wide") if getattr(problem, name)]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
