"""Find the fastest admitted schedules of attention: decoding by splits, and the backward kernels.

For each load (few, some, many programs) of decoding, and for each backward kernel and depth, the candidates are timed
in turns on a few cases, L2 cold; the one with the lowest product of times goes into the table of this architecture.
bfloat16; decoding with heads of depth 128.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
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
    Tiles,
    read_table,
    share,
)
from bicompile.lowering.gpu.device import device_key

DECODE = ((1, 2048), (1, 8192), (16, 2048), (1, 32768), (16, 8192), (64, 4096))
"""Batch and keys of the decoding cases; 32 query heads over 8."""

SPLITS = tuple(
    SplitSchedule(16, warps, stages, tma=tma)
    for warps, stages, tma in (
        (4, 2, False), (4, 3, False), (4, 2, True), (4, 3, True), (8, 2, True), (8, 3, True), (8, 3, False)
    )
)  # fmt: skip
DEPTHS = (64, 128)
"""Of the heads that the backward kernels are tuned for."""
TILES = tuple(
    Tiles(own, step, warps, stages)
    for own, step, warps in ((64, 32, 4), (64, 64, 4), (64, 64, 8), (128, 32, 8), (128, 64, 8), (128, 128, 8))
    for stages in (1, 2, 3)
)
Found = dict[Any, list[float]]
"""Microseconds of each schedule in the cases so far."""


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
    admitted = compile_all(_candidates(arguments), arguments.jobs)
    splits: dict[str, Found] = {}
    for batch, keys in DECODE:
        p = _problem(batch, 1, keys)
        span, _, load = share(gpu.num_pieces(p.order, keys), batch * 8, False, p.order, key.num_sms)
        plans = {s: gpu.plan_of(p, replace(s, span=span)) for s in SPLITS if (128, s) in admitted}
        runs = {s: functools.partial(plan, p) for s, plan in plans.items()}
        _note(splits.setdefault(load, {}), runs, arguments.ms, f"decode B={batch} S={keys} ({load})")
    best = {load: _fastest(found) for load, found in splits.items()}
    backward = dict(read_table(path).backward) if path.exists() else {}
    if not arguments.only_splits:
        for depth in DEPTHS:
            of_queries, of_keys = ([s for s in column if (depth, s) in admitted] for column in _columns())
            backward[depth] = _fastest_backward(depth, of_queries, of_keys, arguments.ms)
    path.write_text(layout(key.name, best, backward))
    print(path.read_text())
    print(f"written: {path}")
    return 0


def layout(device: str, splits: dict[str, SplitSchedule], backward: dict[int, BackwardSchedule]) -> str:
    """The table as it stands in its file."""
    measured, lines = json.dumps(device), []
    for load, s in splits.items():
        entry = {"warps": s.warps, "stages": s.stages, "tma": s.tma}
        lines.append(f"  {json.dumps(load)}: {json.dumps(entry)}")
    depths = []
    for depth, both in backward.items():
        kernels = [f"   {json.dumps(name)}: {json.dumps(vars(tiles))}" for name, tiles in vars(both).items()]
        depths.append(f'  "{depth}": {{\n' + ",\n".join(kernels) + "\n  }")
    return (
        f'{{\n "measured_on": {measured},\n "splits": {{\n' + ",\n".join(lines) + '\n },\n "backward": {\n'
        + ",\n".join(depths) + "\n }\n}\n"
    )  # fmt: skip


def _fastest(found: dict[Any, list[float]]) -> Any:
    """The schedule whose times have the lowest product."""
    return min(found, key=lambda schedule: math.prod(found[schedule]))


def _columns() -> tuple[list[BackwardSchedule], list[BackwardSchedule]]:
    """The candidates for either backward kernel, with the reference's tiles for the other."""
    reference = REFERENCE_BACKWARD
    return [replace(reference, queries=tiles) for tiles in TILES], [replace(reference, keys=tiles) for tiles in TILES]


def _fastest_backward(
    depth: int, queries: list[BackwardSchedule], keys: list[BackwardSchedule], ms: float
) -> BackwardSchedule:
    """The fastest tiles of either kernel: causal, by flag and by mask."""
    of_queries: Found = {}
    of_keys: Found = {}
    for masked in (False, True):
        p = _problem(4, 2048, 2048, depth, masked)
        out, lse = gpu.run(p, REFERENCE)
        call = gpu_backward.call_of(p, torch.randn_like(out), out, lse)
        case = f"B=4 S=2048 D={depth}{' masked' if masked else ''}"
        gpu_backward.delta_plan(call)(call)
        by_queries = {s.queries: gpu_backward.query_plan(call, p.scale, s.queries) for s in queries}
        by_keys = {s.keys: gpu_backward.key_plan(call, s.keys) for s in keys}
        _note(of_queries, {t: functools.partial(plan, call) for t, plan in by_queries.items()}, ms, f"dq {case}")
        _note(of_keys, {t: functools.partial(plan, call) for t, plan in by_keys.items()}, ms, f"dk, dv {case}")
    return BackwardSchedule(_fastest(of_queries), _fastest(of_keys))


def _candidates(arguments: argparse.Namespace) -> list[tuple[int, SplitSchedule | BackwardSchedule]]:
    """Schedules, with the depth of heads for which they are tried."""
    backward = [] if arguments.only_splits else [(d, s) for d in DEPTHS for column in _columns() for s in column]
    return [*((128, s) for s in SPLITS), *backward]


def compile_all(
    candidates: Sequence[tuple[int, SplitSchedule | BackwardSchedule]], jobs: int
) -> set[tuple[int, SplitSchedule | BackwardSchedule]]:
    """Those that are admitted, found out in other processes, which leave compiled kernels and verdicts on disk."""
    with multiprocessing.get_context("spawn").Pool(min(jobs, len(candidates))) as pool:
        verdicts = pool.map(_admits, candidates, chunksize=1)
    return {candidate for candidate, admitted in zip(candidates, verdicts, strict=True) if admitted}


def _admits(candidate: tuple[int, SplitSchedule | BackwardSchedule]) -> bool:
    depth, schedule = candidate
    if isinstance(schedule, SplitSchedule):
        return choose(_problem(1, 1, 2048, depth), (schedule,), REFERENCE, gpu.run) == schedule
    return all(
        choose(_problem(1, 256, 256, depth, masked), (schedule,), REFERENCE_BACKWARD, gpu_backward.probe) == schedule
        for masked in (False, True)
    )


def _problem(batch: int, queries: int, keys: int, depth: int = 128, masked: bool = False) -> Problem:
    """Causal where there are several queries, by flag or by mask; keys and values as a cache holds them."""

    def randn(heads: int, length: int) -> Tensor:
        return torch.randn(batch, heads, length, depth, device="cuda", dtype=torch.bfloat16)

    mask = torch.ones(batch, 1, queries, keys, dtype=torch.bool, device="cuda").tril() if masked else None
    causal = queries > 1 and not masked
    return problem_of("sdpa", randn(32, queries), randn(8, keys), randn(8, keys), mask, causal, depth**-0.5)


def _note(found: Found, runs: Mapping[Any, Callable[[], object]], ms: float, case: str) -> None:
    """Time ``runs``, by schedule, and add their microseconds to ``found``."""
    names = dict(zip(map(str, itertools.count()), runs, strict=False))
    timings = gpu_interleaved({name: runs[schedule] for name, schedule in names.items()}, ms=ms)
    for name, schedule in names.items():
        found.setdefault(schedule, []).append(timings[name].median_us)
        print(f"{case} {schedule}: {timings[name].median_us:.1f} us", flush=True)
