"""Find the fastest admitted schedule of matrix products, for each shape and number of rows.

The shapes are weights as ``KxN`` of ``nn.Linear`` layers, in bfloat16; float16 has the same schedules.  For each, and
for each number of rows, every candidate is admitted and timed in turns with the others, L2 cold.  The winner goes
into ``tuned`` of the table of this architecture; or what the rule takes, if it is as fast within :data:`TOLERANCE`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bicompile.bench import gpu_interleaved
from bicompile.lowering.gpu.device import device_key
from bicompile.lowering.matmul import gpu
from bicompile.lowering.matmul.problem import Problem, can_stream, problem_of
from bicompile.lowering.matmul.runners import Runner, num_sms
from bicompile.lowering.matmul.schedule import (
    TABLES,
    LibrarySchedule,
    Schedule,
    StreamSchedule,
    Table,
    TileSchedule,
    preferences,
    read_table,
)

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192)
SHAPES = ("4096x6144", "4096x4096", "4096x28672", "14336x4096")  # Llama-3-8B and Mistral-7B
TOLERANCE = 0.015
"""How much slower than the winner the rule's choice may be, as a share of its time: less is noise."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The tuner's options."""
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="KxN", help="weights to tune for")
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS, help="numbers of rows to tune for")
    parser.add_argument(
        "--ms", type=float, default=60.0, help="milliseconds of calls for each shape and number of rows"
    )
    parser.add_argument(
        "--jobs", type=int, default=min(14, os.cpu_count() or 1), help="processes that compile at first"
    )
    parser.add_argument("--table", type=Path, help="the file to rewrite; default: this architecture's table")


def run(arguments: argparse.Namespace) -> int:
    """Tune, print the winners, and rewrite the table."""
    from tqdm import tqdm

    key = device_key(torch.cuda.current_device())
    path = arguments.table or TABLES / f"sm_{key.capability[0]}{key.capability[1]}.json"
    table = read_table(path)
    body = json.loads(path.read_text())
    cases = [(shape, rows) for shape in arguments.shapes for rows in sorted(arguments.rows)]
    _compile(cases, path, arguments.jobs)
    found: dict[str, list[tuple[int, str]]] = {}
    with tqdm(cases, unit="case") as progress:
        for shape, rows in progress:
            progress.set_description(f"{shape} M={rows}")
            best, gain = tune(shape, rows, table, arguments.ms)
            progress.write(f"{shape} M={rows}: {best} ({gain:.2f} times as fast as the rule's choice)")
            found.setdefault(f"tn {shape}", []).append((rows, str(best)))
    for shape, entries in found.items():
        body["tuned"][shape] = shortened(entries)
    body["measured_on"] = key.name
    path.write_text(layout(body))
    print(f"written: {path}")
    return 0


def _compile(cases: list[tuple[str, int]], path: Path, jobs: int) -> None:
    """Admit every candidate in other processes, which leave compiled kernels and verdicts on disk."""
    from tqdm import tqdm

    table = read_table(path)
    wanted: dict[Schedule, tuple[str, int]] = {}
    for shape, rows in cases:
        for schedule in candidates(_operands(shape, rows)[2], table):
            wanted.setdefault(schedule, (shape, rows))
    todo = [(schedule, *case) for schedule, case in wanted.items()]
    with multiprocessing.get_context("spawn").Pool(min(jobs, len(todo))) as pool:
        for _ in tqdm(pool.imap_unordered(_admit, todo), total=len(todo), unit="schedule", desc="compiling"):
            pass


def _admit(job: tuple[Schedule, str, int]) -> None:
    schedule, shape, rows = job
    x, _, problem = _operands(shape, rows)
    gpu.admitted_runner(schedule, problem, x.device)


def _operands(shape: str, rows: int) -> tuple[Tensor, Tensor, Problem]:
    k, n = map(int, shape.split("x"))
    x = torch.randn(rows, k, dtype=torch.bfloat16, device="cuda")
    weight = torch.randn(n, k, dtype=torch.bfloat16, device="cuda").t()
    return x, weight, problem_of(x, weight, x.dtype, tf32=False, add=False)


def tune(shape: str, rows: int, table: Table, ms: float) -> tuple[Schedule, float]:
    """The fastest schedule, and by what factor it beats the rule's choice."""
    x, weight, problem = _operands(shape, rows)
    by_rule = preferences(problem, replace(table, tuned={}), num_sms(x.device.index))[0]
    runners: dict[Schedule, Runner] = {}
    for schedule in dict.fromkeys([by_rule, *candidates(problem, table)]):
        runner = gpu.admitted_runner(schedule, problem, x.device)
        if runner is not None:
            runners[schedule] = runner

    def timed(runner: Runner) -> Callable[[], Tensor]:
        def call() -> Tensor:
            out = x.new_empty(rows, problem.n)
            runner(x, weight, None, out)
            return out

        return call

    times = gpu_interleaved({str(schedule): timed(runner) for schedule, runner in runners.items()}, ms=ms)
    microseconds = {schedule: times[str(schedule)].median_us for schedule in runners}
    best = min(microseconds, key=microseconds.__getitem__)
    if by_rule in microseconds and microseconds[by_rule] <= microseconds[best] * (1 + TOLERANCE):
        best = by_rule
    return best, microseconds.get(by_rule, float("inf")) / microseconds[best]


def candidates(problem: Problem, table: Table) -> Iterator[Schedule]:
    """Everything that could be the fastest for a problem of this many rows."""
    m = problem.m
    ours: list[Any] = [*(schedule for schedule, _ in (*table.few_rows, *table.many_rows)), *_more()]
    for schedule in ours:
        fits = schedule.block_m <= max(2 * m, 16) and (m <= 4 * schedule.block_m or schedule.block_m >= 64)
        if fits and (isinstance(schedule, TileSchedule) or can_stream(problem)):
            yield schedule
    yield from (LibrarySchedule(first) for first in range(4))


def _more() -> Iterator[Schedule]:
    """Schedules beyond those that the rule chooses from."""
    for rows in (8, 16):
        for columns, depth, warps, stages in ((32, 128, 2, 6), (64, 128, 4, 5), (64, 256, 4, 3)):
            yield TileSchedule(rows, columns, depth, warps, stages, swap=True)
    yield TileSchedule(16, 32, 256, warps=2, stages=4, swap=True)
    yield TileSchedule(16, 128, 128, warps=4, stages=3, swap=True)
    yield StreamSchedule(16, 64, 256, warps=4, stages=4, swap=True)
    yield StreamSchedule(16, 64, 128, warps=4, stages=6, swap=True)
    yield StreamSchedule(32, 64, 128, warps=4, stages=5, swap=True)
    yield StreamSchedule(64, 128, 128, warps=4, stages=4, swap=True)
    yield StreamSchedule(128, 64, 128, warps=4, stages=4)
    yield StreamSchedule(128, 128, 64, warps=4, stages=5, flatten=True)
    yield StreamSchedule(128, 256, 64, warps=8, stages=3, flatten=True, parts=2)


def shortened(entries: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """``entries`` without those that the next one repeats."""
    pairs = zip(entries, [*entries[1:], (0, "")], strict=True)
    return [entry for entry, following in pairs if entry[1] != following[1]]


def layout(body: dict[str, Any]) -> str:
    """A table as JSON, one schedule a line."""

    def block(name: str, opening: str, lines: list[str], closing: str, end: str) -> str:
        inside = "\n" + ",\n".join(lines) + "\n " if lines else ""
        return f" {json.dumps(name)}: {opening}{inside}{closing}{end}"

    shapes = [
        f"  {json.dumps(shape)}: [\n" + ",\n".join(f"   {json.dumps(entry)}" for entry in entries) + "\n  ]"
        for shape, entries in body["tuned"].items()
    ]
    return "\n".join(
        [
            "{",
            f' "measured_on": {json.dumps(body["measured_on"])},',
            block("few_rows", "[", [f"  {json.dumps(entry)}" for entry in body["few_rows"]], "]", ","),
            block("many_rows", "[", [f"  {json.dumps(entry)}" for entry in body["many_rows"]], "]", ","),
            f' "library_from": {body["library_from"]},',
            block("tuned", "{", shapes, "}", ""),
            "}",
            "",
        ]
    )
