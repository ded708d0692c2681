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
from dataclasses import dataclass, replace
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
        few_rows: schedules for up to 64 rows, with the share of the memory's speed that each reaches where it fits.
        many_rows: schedules for more, with the share of the peak that full waves of their tiles reach.
        library_from: rows from which cuBLASLt comes first.
        tuned: by layout and shape (``tn 4096x6144`` for K x N), schedules by the number of rows up to which they hold.
    """

    measured_on: str
    few_rows: tuple[tuple[Schedule, float], ...]
    many_rows: tuple[tuple[Schedule, float], ...]
    library_from: int
    tuned: dict[str, tuple[tuple[int, Schedule], ...]]

    def own_schedules(self) -> list[OwnSchedule]:
        """Every schedule of ours that the table names."""
        chosen = [schedule for entries in self.tuned.values() for _, schedule in entries]
        every = dict.fromkeys([*(schedule for schedule, _ in (*self.few_rows, *self.many_rows)), *chosen])
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
        few_rows=tuple((parse(text), share) for text, share in body["few_rows"]),
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
    p = problem
    reference = REFERENCES[p.dtype]
    rows = min(p.m, p.n)
    if p.dtype in OTHERS:
        return [LIBRARY, next(s for most, s in OTHERS[p.dtype] if rows <= most), reference]
    if not (p.is_dense and p.is_aligned):  # rare, so few binaries are better than fast ones
        return [_mirror(_LOOSE) if p.n < p.m else _LOOSE, reference] if rows <= _LOOSE.block_m else [reference]
    entries = table.tuned.get(f"{p.layout} {p.k}x{p.n}", ()) if p.batch == 1 and not p.add else ()
    chosen = [schedule for most, schedule in entries if p.m <= most][:1]
    ours = _for_few_rows(p, table, num_sms) if rows <= _FEW_ROWS else []
    ours += _for_many_rows(p, table, num_sms)
    library: list[Schedule] = [LIBRARY]
    # The library cannot add with our rounding: what it saves is less than a second pass over the result costs.
    library_first = not can_stream(p) or (rows >= table.library_from and not p.add)
    return list(dict.fromkeys([*chosen, *(library + ours if library_first else ours + library), reference]))


_FEW_ROWS = 64
_LOOSE = TileSchedule(16, 32, 256, warps=4, stages=4, swap=True)
_BUSY = 60
"""Programs that are enough to read memory at full speed (an H100, ``bicompile bench matmul``, 2026-11-25)."""
_WAITING = 1.15
"""What storing a tile before the next one is loaded costs (an H100, products of K = 768, 2026-11-25)."""
_ROOM = 227 << 10
"""Bytes of shared memory where the tables have streams: sm_90 and sm_100."""


def _for_few_rows(problem: Problem, table: Table, num_sms: int) -> list[Schedule]:
    """The schedule that reads the larger factor fastest: that is what takes the time."""
    p = problem
    mirrored = p.n < p.m
    rows, columns, long_by_k = (p.n, p.m, p.a_by_k) if mirrored else (p.m, p.n, p.b_by_k)

    def cost(entry: tuple[Any, float]) -> float:
        s, share = entry
        down, across = _tiles(rows, s.block_m), _tiles(columns, s.block_n)
        again = 1 + 0.02 * (down - 1) + 0.01 * s.block_m / s.block_n  # what the cache serves
        idle = max(1.0, _BUSY * num_sms / 132 / (p.batch * down * across)) ** 0.3
        wasted = 1 + 0.1 * (s.block_m * down / max(rows, 8) - 1)
        scattered = 128 / s.block_n if isinstance(s, TileSchedule) and not long_by_k else 1.0
        return again * idle * wasted * scattered / share

    usable = [entry for entry in table.few_rows if _can_run(entry[0], p)]
    best = [schedule for schedule, _ in sorted(usable, key=cost)[:1]]
    return [_mirror(schedule) for schedule in best] if mirrored else best


def _for_many_rows(problem: Problem, table: Table, num_sms: int) -> list[Schedule]:
    """The schedule whose waves of tiles take the least time."""
    p = problem

    def cost(entry: tuple[Any, float]) -> float:
        schedule, share = entry
        tiles = p.batch * _tiles(p.m, schedule.block_m) * _tiles(p.n, schedule.block_n)
        waves = _tiles(tiles, num_sms)
        waits = waves > 1 and not (isinstance(schedule, StreamSchedule) and schedule.flatten)
        return waves * schedule.block_m * schedule.block_n / share * (_WAITING if waits else 1.0)

    usable = [entry for entry in table.many_rows if _can_run(entry[0], p)]
    return [schedule for schedule, _ in sorted(usable, key=cost)[:1]]


def _can_run(schedule: Schedule, problem: Problem) -> bool:
    if not isinstance(schedule, StreamSchedule):
        return True
    return can_stream(problem) and fits(schedule, problem.dtype.itemsize, problem.add)


def fits(schedule: StreamSchedule, itemsize: int, add: bool) -> bool:
    """Whether the shared memory is enough for the blocks of every stage, the result and the addend."""
    s = schedule
    loads = s.stages * (s.block_m + s.block_n) * s.block_k * itemsize
    result = s.block_m * s.block_n // s.parts * itemsize
    return loads + result * (2 if add else 1) <= _ROOM


def _tiles(size: int, block: int) -> int:
    return -(-size // block)


def _mirror(schedule: Any) -> Schedule:
    """The schedule that does to columns what ``schedule`` does to rows."""
    return replace(schedule, block_m=schedule.block_n, block_n=schedule.block_m, swap=not schedule.swap)
