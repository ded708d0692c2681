"""The forward and backward kernels as they are compiled, for tests that have no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import torch
from torch import Tensor

from bicompile.lowering.gpu.ahead import Compilation
from bicompile.lowering.gpu.device import DeviceKey
from bicompile.lowering.gpu.recording import recorded

from . import gpu, gpu_backward
from .problem import Problem, problem_of
from .schedule import (
    DEEP_BACKWARD,
    PLAIN_BACKWARD,
    REFERENCE,
    REFERENCE_BACKWARD,
    TABLES,
    BackwardSchedule,
    HopperSchedule,
    Schedule,
    SplitSchedule,
    TileSchedule,
    read_table,
)

_MASKS = (("none", False), ("none", True), ("bool", False), ("additive", False))
_MERGED = (2048, 4096, 8192, 32768)
"""Numbers of keys whose splits are merged by different kernels."""


def problem(
    dtype: torch.dtype, depth: int, mask: str = "none", *, causal: bool = False, dropout: bool = False,
    queries: int = 256, keys: int = 2048,
) -> Problem:  # fmt: skip
    """Two rows of 8 heads, 2 of the keys, without memory; the mask's ``kind`` is as in ``Problem``."""

    def empty(heads: int, length: int) -> Tensor:
        return torch.empty(2, length, heads, depth, dtype=dtype, device="meta").transpose(1, 2)

    shape, masks = (2, 1, queries, keys), {"bool": torch.bool, "additive": dtype}
    of_mask = None if mask == "none" else torch.empty(shape, dtype=masks[mask], device="meta")
    seeds = torch.empty(2, 8, queries, dtype=torch.int64, device="meta") if dropout else None
    inputs = empty(8, queries), empty(2, keys), empty(2, keys)
    return problem_of("sdpa", *inputs, of_mask, causal, depth**-0.5, None, seeds, 0.1 if dropout else 0.0)


def forward_compilations(p: Problem, schedule: Schedule) -> list[Compilation]:
    """What a forward launches.  TMA comes with sm_90, and with it kernels that start before the last has ended."""
    recent = isinstance(schedule, HopperSchedule) or schedule.tma
    device = DeviceKey("", (9, 0) if recent else (8, 0), num_sms=132, shared_memory=0, versions="")
    with mock.patch.object(gpu, "device_key", lambda index: device):
        found = recorded(f"attention {_name(p)} {schedule}", gpu.run, p, schedule)
    roomy = schedule in (TileSchedule(128, 8, 2), *_tuned_splits())  # for the shared memory of sm_90
    needs, up_to = 90 if recent or roomy else 80, 90 if isinstance(schedule, HopperSchedule) else 1000
    return [replace(case, needs=needs, up_to=up_to) for case in found]


def backward_compilations(p: Problem, schedule: BackwardSchedule) -> list[Compilation]:
    """What a backward launches."""
    out, lse = gpu.outputs_of(p)()
    return recorded(f"backward of attention {_name(p)} {schedule}", gpu_backward.run, p, out, out, lse, schedule)


def _name(p: Problem) -> str:
    ways = [name for name, on in (("causal", p.causal), ("dropout", p.drops)) if on]
    return " ".join([str(p.q.dtype).removeprefix("torch."), str(p.q.shape[3]), f"mask {p.kind}", *ways])


def aot_cases() -> Iterator[Compilation]:
    """Every schedule, with the depths and masks it meets; of equal compilations one."""
    seen = set()
    for case in _all_cases():
        same = (case.kernel, *map(str, (case.signature, case.constants, case.options)), case.warps, case.stages)
        if same not in seen:
            seen.add(same)
            yield case


def _all_cases() -> Iterator[Compilation]:
    half, quarter = torch.bfloat16, torch.float16
    small = [REFERENCE, TileSchedule(64, 8, 2), TileSchedule(64, 8, 1)]
    tiles = [*small, TileSchedule(128, 8, 2, True), TileSchedule(128, 8, 2)]
    splits = [SplitSchedule(16, 4, 1), SplitSchedule(16, 4, 2), SplitSchedule(32, 8, 2), *_tuned_splits()]
    every: list[Schedule] = [*tiles, *splits]
    for mask, causal in _MASKS:
        for schedule in every:
            yield from forward_compilations(problem(half, 128, mask, causal=causal), schedule)
        if not causal:
            for keys in _MERGED:
                for schedule in (SplitSchedule(16, 4, 2), SplitSchedule(16, 4, 2, tma=True)):
                    yield from forward_compilations(problem(half, 128, mask, queries=1, keys=keys), schedule)
        for depth, kernels in ((128, PLAIN_BACKWARD), *_tuned_backward()):
            yield from backward_compilations(problem(half, depth, mask, causal=causal), kernels)
        if mask != "additive":
            for depth in (64, 128):
                yield from forward_compilations(problem(half, depth, mask, causal=causal), HopperSchedule(2, True))
    for dtype, depth in ((quarter, 64), (half, 32), (half, 256), (torch.float32, 128), (torch.float64, 64)):
        for mask, causal in (("none", True), ("bool", False)):
            p = problem(dtype, depth, mask, causal=causal)
            yield from forward_compilations(p, REFERENCE)
            yield from forward_compilations(p, SplitSchedule(16, 4, 1))
            yield from backward_compilations(p, REFERENCE_BACKWARD)
    for mask, causal in (("none", True), ("bool", False)):
        p = problem(half, 128, mask, causal=causal, dropout=True)
        for schedule in tiles:
            yield from forward_compilations(p, schedule)
        yield from backward_compilations(p, PLAIN_BACKWARD)
    for p in (problem(half, 256, causal=True), problem(half, 256, causal=True, dropout=True)):
        yield from forward_compilations(p, TileSchedule(32, 8, 1))
        yield from backward_compilations(p, DEEP_BACKWARD)
    yield from forward_compilations(problem(half, 256, causal=True), SplitSchedule(32, 8, 2))
    p = problem(torch.float64, 64, "additive", dropout=True)
    yield from forward_compilations(p, REFERENCE)
    yield from backward_compilations(p, REFERENCE_BACKWARD)


def _tuned_splits() -> list[SplitSchedule]:
    """What the tables prefer on any architecture, and the same with all splits in one program."""
    found = [s for path in sorted(TABLES.glob("*.json")) for s in read_table(path).splits.values()]
    return list(dict.fromkeys(replace(s, span=n, v_programs=v) for s in found for n, v in ((1, 1), (1, 2), (0, 1))))


def _tuned_backward() -> list[tuple[int, BackwardSchedule]]:
    """What the tables prefer, with the depth of heads that it is for."""
    return list(dict.fromkeys(e for path in sorted(TABLES.glob("*.json")) for e in read_table(path).backward.items()))
