"""Find the fastest admitted schedules of attention: decoding by splits, and the backward kernels.

For each load (few, some, many programs) the candidates are timed in turns on a few cases, L2 cold; the one with the
lowest product of times goes into the table of this architecture.  Heads of depth 128 in bfloat16.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bicompile.bench import gpu_interleaved
from bicompile.lowering.attention import gpu, gpu_backward
from bicompile.lowering.attention.admitted import choose
from bicompile.lowering.attention.problem import Problem, problem_of
from bicompile.lowering.attention.schedule import (
    REFERENCE,
    REFERENCE_BACKWARD,
    TABLES,
    BackwardSchedule,
    SplitSchedule,
    load_of,
    read_table,
)
from bicompile.lowering.gpu.device import device_key

DECODE = ((1, 2048), (1, 8192), (16, 2048), (1, 32768), (16, 8192), (64, 4096))
"""Batch and keys of the decoding cases; 32 query heads over 8."""

SPLITS = tuple(
    SplitSchedule(16, warps, stages, parts, tma)
    for warps, stages, parts, tma in (
        (4, 2, 1, False), (4, 3, 1, False), (4, 2, 1, True), (4, 3, 1, True), (8, 3, 1, True), (4, 3, 2, True),
        (4, 3, 4, True), (4, 2, 2, True),
    )
)  # fmt: skip
BACKWARD = (
    BackwardSchedule(64, 64, 32, 4, 2),
    BackwardSchedule(128, 128, 32, 8, 2),
    BackwardSchedule(128, 64, 64, 8, 2),
    BackwardSchedule(128, 128, 64, 8, 2),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The tuner's options."""
    parser.add_argument("--only-splits", action="store_true", help="leave the backward kernels as the table has them")
    parser.add_argument("--ms", type=float, default=40.0, help="milliseconds of calls for each case")
    parser.add_argument(
        "--jobs", type=int, default=min(14, os.cpu_count() or 1), help="processes that compile at first"
    )
    parser.add_argument("--table", type=Path, help="the file to rewrite; default: this architecture's table")


def run(arguments: argparse.Namespace) -> int:
    """Tune, print the winners, and rewrite the table."""
    key = device_key(torch.cuda.current_device())
    path = arguments.table or TABLES / f"sm_{key.capability[0]}{key.capability[1]}.json"
    compile_all([*SPLITS, *(() if arguments.only_splits else BACKWARD)], arguments.jobs)
    times: dict[str, dict[Any, list[float]]] = {}
    for (batch, keys), load in zip(DECODE, _loads(key.num_sms), strict=True):
        p = _problem(batch, 1, keys)
        runs = {s: functools.partial(gpu.run, p, s) for s in SPLITS if _admits_split(s)}
        for schedule, us in _timed(runs, arguments.ms).items():
            times.setdefault(load, {}).setdefault(schedule, []).append(us)
            print(f"decode B={batch} S={keys} ({load}) {schedule}: {us:.1f} us", flush=True)
    if not arguments.only_splits:
        for schedule, us in _backward_times(arguments.ms).items():
            times.setdefault("backward", {}).setdefault(schedule, []).append(us)
            print(f"backward B=4 S=2048 {schedule}: {us:.1f} us", flush=True)
    best = {name: _fastest(found) for name, found in times.items()}
    best.setdefault("backward", read_table(path).backward if path.exists() else BACKWARD[0])
    for name, schedule in best.items():
        print(f"{name}: {schedule}")
    path.write_text(layout(key.name, best))
    print(f"written: {path}")
    return 0


def layout(device: str, best: dict[str, Any]) -> str:
    """The table as it stands in its file."""
    splits = {
        load: {"warps": s.warps, "stages": s.stages, "parts": s.parts, "tma": s.tma}
        for load, s in best.items()
        if load != "backward"
    }
    lines = ",\n".join(f"  {json.dumps(load)}: {json.dumps(entry)}" for load, entry in splits.items())
    backward = json.dumps(vars(best["backward"]))
    measured = json.dumps(device)
    return f'{{\n "measured_on": {measured},\n "splits": {{\n{lines}\n }},\n "backward": {backward}\n}}\n'


def _fastest(found: dict[Any, list[float]]) -> Any:
    """The schedule whose times have the lowest product."""
    return min(found, key=lambda schedule: math.prod(found[schedule]))


def _backward_times(ms: float) -> dict[Any, float]:
    """Microseconds of each admitted backward schedule."""
    p = _problem(4, 2048, 2048)
    out, lse = gpu.run(p, REFERENCE)
    grad = torch.randn_like(out)
    return _timed({s: _backward_call(p, grad, out, lse, s) for s in BACKWARD if _admits_backward(s)}, ms)


def compile_all(candidates: Sequence[SplitSchedule | BackwardSchedule], jobs: int) -> None:
    """Admit the candidates in other processes, which leave compiled kernels and verdicts on disk."""
    with multiprocessing.get_context("spawn").Pool(min(jobs, len(candidates))) as pool:
        pool.map(_admit, candidates, chunksize=1)


def _admit(schedule: SplitSchedule | BackwardSchedule) -> None:
    if isinstance(schedule, SplitSchedule):
        _admits_split(schedule)
    else:
        _admits_backward(schedule)


def _admits_split(schedule: SplitSchedule) -> bool:
    return choose(_problem(1, 1, 2048), (schedule,), REFERENCE, gpu.run, gpu.run) == schedule


def _admits_backward(schedule: BackwardSchedule) -> bool:
    probe = gpu_backward.probe
    return choose(_problem(1, 256, 256), (schedule,), REFERENCE_BACKWARD, probe, probe) == schedule


def _backward_call(
    p: Problem, grad: Tensor, out: Tensor, lse: Tensor, schedule: BackwardSchedule
) -> Callable[[], object]:
    return lambda: gpu_backward.run_backward(p, grad, out, lse, p.scale, False, schedule)


def _loads(num_sms: int) -> Iterator[str]:
    order = _problem(1, 1, 16).order
    for batch, keys in DECODE:
        yield load_of(gpu.num_splits(order, keys) * batch * 8, num_sms)


def _problem(batch: int, queries: int, keys: int) -> Problem:
    """Causal where there are several queries; keys and values as a cache holds them."""

    def randn(heads: int, length: int) -> Tensor:
        return torch.randn(batch, heads, length, 128, device="cuda", dtype=torch.bfloat16)

    return problem_of("sdpa", randn(32, queries), randn(8, keys), randn(8, keys), None, queries > 1, 128**-0.5)


def _timed(runs: Mapping[Any, Callable[[], object]], ms: float) -> dict[Any, float]:
    names = dict(zip(map(str, itertools.count()), runs, strict=False))
    timings = gpu_interleaved({name: runs[schedule] for name, schedule in names.items()}, ms=ms)
    return {schedule: timings[name].median_us for name, schedule in names.items()}
