"""How a matrix product is run on a GPU: tiles, warps, stages, which kernel, or which library.

Every schedule realises the order of ``gpu_order_for``; admission shows it on the device.  So the choice may follow the
number of rows, and no table entry can change a bit.  ``tables/sm_XX.json`` holds preferences for each architecture:
``few_rows`` and ``many_rows`` are what the rule below chooses from, ``tuned`` says outright which to take for a
shape.  ``python -m bicompile.tuning matmul`` measures and rewrites ``tuned``.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .problem import Problem, can_stream

TABLES = Path(__file__).parent / "tables"


@dataclass(frozen=True)
class TileSchedule:
    """One program for each tile, loading through pointers: for any strides.

    Attributes:
        block_m, block_n, block_k: sizes of a tile, and how many k are loaded at once.
        warps, stages: Triton's ``num_warps`` and ``num_stages``.
        swap: compute the transposed tile, so that the instruction's wide side takes columns, not rows.
        group: rows of tiles whose programs run side by side.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    swap: bool = False
    group: int = 8

    def __str__(self) -> str:
        swap = " swap" if self.swap else ""
        return f"tile {self.block_m}x{self.block_n}x{self.block_k} warps {self.warps} stages {self.stages}{swap}"


@dataclass(frozen=True)
class StreamSchedule:
    """Persistent programs, loading and storing by the tensor memory accelerator.

    Attributes:
        flatten: let the loads of the next tile begin before the tile at hand is stored.
        parts: in how many parts a tile is stored, 1 or 2; more need less shared memory.
        programs: for each multiprocessor.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    swap: bool = False
    flatten: bool = False
    parts: int = 1
    programs: int = 1
    group: int = 8

    def __str__(self) -> str:
        flags = "".join(f" {name}" for name in ("swap", "flatten") if getattr(self, name))
        counts = "".join(f" {name} {n}" for name in ("parts", "programs") if (n := getattr(self, name)) != 1)
        blocks = f"{self.block_m}x{self.block_n}x{self.block_k}"
        return f"stream {blocks} warps {self.warps} stages {self.stages}{flags}{counts}"


@dataclass(frozen=True)
class LibrarySchedule:
    """cuBLASLt: the first of its suggestions without split-K that is admitted, beginning with number ``first``."""

    first: int = 0

    def __str__(self) -> str:
        return f"library {self.first}"


OwnSchedule = TileSchedule | StreamSchedule
Schedule = TileSchedule | StreamSchedule | LibrarySchedule
LIBRARY = LibrarySchedule()

_PATTERN = re.compile(
    r"(?P<kind>tile|stream) (?P<block_m>\d+)x(?P<block_n>\d+)x(?P<block_k>\d+) warps (?P<warps>\d+) "
    r"stages (?P<stages>\d+)(?P<swap> swap)?(?P<flatten> flatten)?(?: parts (?P<parts>\d+))?"
    r"(?: programs (?P<programs>\d+))?"
)


def parse(text: str) -> Schedule:
    """The schedule whose ``str`` is ``text``.

    Raises:
        ValueError: there is none.
    """
    if text.startswith("library "):
        return LibrarySchedule(int(text.removeprefix("library ")))
    found = _PATTERN.fullmatch(text)
    if found is None:
        raise ValueError(f"schedule {text!r}: expected one such as {str(REFERENCES[torch.bfloat16])!r}")
    given = {name: value for name, value in found.groupdict().items() if value is not None}
    kind = given.pop("kind")
    flags: dict[str, Any] = {name: True for name in ("swap", "flatten") if given.pop(name, None)}
    numbers: dict[str, Any] = {name: int(value) for name, value in given.items()}
    return TileSchedule(**numbers, **flags) if kind == "tile" else StreamSchedule(**numbers, **flags)


REFERENCES = {
    torch.bfloat16: TileSchedule(64, 64, 64, warps=4, stages=3),
    torch.float16: TileSchedule(64, 64, 64, warps=4, stages=3),
    torch.float32: TileSchedule(64, 64, 32, warps=4, stages=3),
    torch.float64: TileSchedule(32, 32, 16, warps=4, stages=3),
}
"""The schedule that defines the bits of each dtype: the others are admitted if they give the same."""

OTHERS = {
    torch.float32: (
        (16, TileSchedule(16, 32, 64, warps=4, stages=3)),
        (math.inf, REFERENCES[torch.float32]),
    ),
    torch.float64: (
        (16, TileSchedule(16, 16, 32, warps=2, stages=3)),
        (math.inf, REFERENCES[torch.float64]),
    ),
}
"""Schedules of the dtypes that the tables are not about, by the number of rows up to which each is taken."""


@dataclass(frozen=True)
class Table:
    """The preferences of one architecture.

    Attributes:
        measured_on: the device that ``tuned`` was measured on; empty if none.
        few_rows: schedules for up to 64 rows.
        many_rows: schedules for more, with the share of the peak that full waves of their tiles reach.
        library_from: rows from which cuBLASLt comes first.
        tuned: by layout and shape (``tn 4096x6144`` for K x N), schedules by the number of rows up to which they hold.
    """

    measured_on: str
    few_rows: tuple[Schedule, ...]
    many_rows: tuple[tuple[Schedule, float], ...]
    library_from: int
    tuned: dict[str, tuple[tuple[int, Schedule], ...]]

    def own_schedules(self) -> list[OwnSchedule]:
        """Every schedule of ours that the table names."""
        chosen = [schedule for entries in self.tuned.values() for _, schedule in entries]
        every = dict.fromkeys([*self.few_rows, *(schedule for schedule, _ in self.many_rows), *chosen])
        return [schedule for schedule in every if not isinstance(schedule, LibrarySchedule)]


@functools.cache
def table_for(capability: tuple[int, int]) -> Table:
    """The table of this architecture, or of the newest older one that has a table."""
    number = 10 * capability[0] + capability[1]
    known = sorted(int(path.stem.removeprefix("sm_")) for path in TABLES.glob("sm_*.json"))
    older = [n for n in known if n <= number]
    return read_table(TABLES / f"sm_{older[-1] if older else known[0]}.json")


def read_table(path: Path) -> Table:
    """The table in a file."""
    body = json.loads(path.read_text())
    return Table(
        measured_on=body["measured_on"],
        few_rows=tuple(parse(text) for text in body["few_rows"]),
        many_rows=tuple((parse(text), share) for text, share in body["many_rows"]),
        library_from=body["library_from"],
        tuned={shape: tuple((rows, parse(text)) for rows, text in entries) for shape, entries in body["tuned"].items()},
    )


def preferences(problem: Problem, table: Table, num_sms: int) -> list[Schedule]:
    """The schedules to try for a problem, best first; the last one is the reference, which is always there.

    Args:
        problem: what is computed.
        table: the preferences of the device's architecture.
        num_sms: the device's streaming multiprocessors.
    """
    reference = REFERENCES[problem.dtype]
    if problem.dtype in OTHERS:
        rows = min(problem.m, problem.n)
        return [LIBRARY, next(s for most, s in OTHERS[problem.dtype] if rows <= most), reference]
    entries = table.tuned.get(f"{problem.layout} {problem.k}x{problem.n}", ()) if problem.batch == 1 else ()
    chosen = [schedule for rows, schedule in entries if problem.m <= rows][:1]
    by_rule = _for_many_rows(problem, table, num_sms)
    if min(problem.m, problem.n) <= 64:
        by_rule = [*_for_few_rows(problem, table, num_sms), *by_rule]
    library: list[Schedule] = [LIBRARY]
    ordered = [*library, *by_rule] if min(problem.m, problem.n) >= table.library_from else [*by_rule, *library]
    return list(dict.fromkeys([*chosen, *(s for s in ordered if _can_run(s, problem)), reference]))


def _for_few_rows(problem: Problem, table: Table, num_sms: int) -> list[Schedule]:
    """The narrowest tile that takes all rows; of those as wide a one as still gives every multiprocessor something.

    Reading ``b`` once is what takes the time.
    """
    found = []
    for mirrored in (False, True) if problem.n < problem.m else (False,):
        rows, columns = (problem.n, problem.m) if mirrored else (problem.m, problem.n)
        if rows > 64:
            continue
        usable = [s for s in map(_mirror if mirrored else _same, table.few_rows) if _can_run(s, problem)]

        def height(s: Any, mirrored: bool = mirrored) -> int:
            return s.block_n if mirrored else s.block_m

        def programs(s: Any, mirrored: bool = mirrored, rows: int = rows, columns: int = columns) -> int:
            width = s.block_m if mirrored else s.block_n
            return problem.batch * _tiles(rows, height(s)) * _tiles(columns, width)

        tall = [s for s in usable if height(s) >= rows]
        lowest = [s for s in tall if height(s) == min(map(height, tall))]
        busy = [s for s in lowest if programs(s) >= 0.9 * num_sms]
        found += sorted(busy, key=programs)[:1] or sorted(lowest, key=programs, reverse=True)[:1]
    return found


def _for_many_rows(problem: Problem, table: Table, num_sms: int) -> list[Schedule]:
    """The schedule whose waves of tiles take the least time."""
    p = problem

    def cost(entry: tuple[Any, float]) -> float:
        schedule, share = entry
        tiles = p.batch * _tiles(p.m, schedule.block_m) * _tiles(p.n, schedule.block_n)
        return _tiles(tiles, num_sms) * schedule.block_m * schedule.block_n / share

    usable = [entry for entry in table.many_rows if _can_run(entry[0], p)]
    return [schedule for schedule, _ in sorted(usable, key=cost)[:1]]


def _can_run(schedule: Schedule, problem: Problem) -> bool:
    return not isinstance(schedule, StreamSchedule) or can_stream(problem)


def _tiles(size: int, block: int) -> int:
    return -(-size // block)


def _same(schedule: Schedule) -> Schedule:
    return schedule


def _mirror(schedule: Any) -> Schedule:
    """The schedule that does to columns what ``schedule`` does to rows."""
    fields = {**schedule.__dict__, "block_m": schedule.block_n, "block_n": schedule.block_m, "swap": not schedule.swap}
    mirrored: Callable[..., Schedule] = type(schedule)
    return mirrored(**fields)
