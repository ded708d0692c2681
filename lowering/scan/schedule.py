"""How a scan is run on a GPU: lanes and warps of one program.  A lane is one segment, so no schedule changes a bit."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ScanSchedule:
    """``width`` lanes in one program of ``warps`` warps; each loads ``unroll`` elements before it needs the first."""

    width: int
    warps: int
    unroll: int


def schedule_for(lanes: int) -> ScanSchedule:
    """The schedule for so many lanes: programs of one warp until there are enough of them for every multiprocessor."""
    return ScanSchedule(32, 1, 16) if lanes < 32 * 2048 else ScanSchedule(128, 4, 16)
