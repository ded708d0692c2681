"""How a row kernel is run on a GPU: rows and warps of one program.  A schedule cannot change a bit."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RowSchedule:
    """``rows`` rows in one program of ``warps`` warps; a program holds one section of each of its rows."""

    rows: int
    warps: int


@dataclass(frozen=True)
class ColumnsSchedule:
    """``width`` rows that lie side by side, and ``block`` of their lanes, in one program of ``warps`` warps."""

    width: int
    block: int
    warps: int


MANY = 512
"""Programs that fill the GPUs we know with a few on each of their multiprocessors."""


def row_schedule_for(num_rows: int, lanes: int, chunks: int, sections: int) -> RowSchedule:
    """The schedule for ``num_rows`` rows of ``sections`` sections of ``chunks`` chunks of ``lanes`` lanes."""
    elements = lanes * chunks
    if lanes >= 1024:
        # Few programs: more warps for each shorten the time to the answer.  Many: fewer keep more rows in flight.
        few = num_rows * sections < MANY
        return RowSchedule(1, _between(4, elements // (512 if few else 1024), 8))
    rows = max(1, 2048 // elements)
    while rows > 1 and num_rows < rows * MANY:
        rows //= 2
    return RowSchedule(rows, _between(1, rows * elements // 512, 4))


def long_row_warps_for(num_rows: int, row_bytes: int) -> int | None:
    """The warps of a program that takes one of ``num_rows`` rows of several sections, section after section, twice.

    None where the rows are too few to keep a GPU busy.  The second look should find ``row_bytes`` bytes in the cache:
    of larger programs, fewer rows are under way at a time.  Where not even theirs fit, more of them hide more waiting.
    """
    fits = row_bytes <= 200 << 10
    if num_rows < (MANY // 2 if fits else MANY):
        return None
    return 16 if fits and row_bytes >= 48 << 10 else 8


def columns_schedule_for(width: int, lanes: int, itemsize: int) -> ColumnsSchedule:
    """The schedule for rows of ``itemsize`` bytes an element, ``width`` of them side by side, and ``lanes`` lanes."""
    side = 8
    while side < min(width, 128 // itemsize):
        side *= 2
    return ColumnsSchedule(side, min(lanes, 8), 2)


def merging_schedule_for(width: int, lanes: int) -> ColumnsSchedule:
    """The schedule that folds the results of ``lanes`` blocks, all of them in one program."""
    side = 8
    while side < width and side * lanes < 4096 and side < 256:
        side *= 2
    return ColumnsSchedule(side, lanes, _between(1, side * lanes // 1024, 8))


def _between(low: int, value: int, high: int) -> int:
    """The power of two at or below ``value``, within the limits."""
    while low * 2 <= min(value, high):
        low *= 2
    return low
