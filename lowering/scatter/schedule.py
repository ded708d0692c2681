"""How a scatter is run on a GPU: what one program owns, and which of two walks takes contributions.

Every schedule adds a destination's contributions one after the other, so none can change a bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RowSchedule:
    """How slices that share one index are added.

    Attributes:
        block: columns of one program.
        warps: warps of one program.
        ahead: contributions whose loads are in flight together.
        long: from about this many contributions on, a destination is left to programs of their own; 0 for never.
        long_block: columns of one of those, which has one warp.
        long_ahead: contributions that it adds at once; those of four such groups are loaded meanwhile.
    """

    block: int
    warps: int
    ahead: int
    long: int
    long_block: int
    long_ahead: int


@dataclass(frozen=True)
class ElementSchedule:
    """How elements with an index each are added.

    Attributes:
        walk: ``columns``: a thread goes down each column and adds in memory; ``sorted``: a thread takes all
            contributions to one destination, which a stable sort has put side by side.
        block: columns or destinations of one program.
        ahead: contributions whose loads are in flight together.
    """

    walk: Literal["columns", "sorted"]
    block: int
    ahead: int


REFERENCE = RowSchedule(block=128, warps=1, ahead=1, long=0, long_block=32, long_ahead=1)
REFERENCE_ELEMENTS = ElementSchedule("sorted", block=128, ahead=1)

# A step down a column waits for memory; a sort reads and writes each key a few times.
_STEP_US = 0.7
_SORT_US = 60.0
_SORT_US_PER_KEY = 0.0006


def row_schedule_for(width: int, itemsize: int) -> RowSchedule:
    """The schedule for slices of ``width`` elements of ``itemsize`` bytes."""
    block = 32
    while block < min(width, 2048 // itemsize):
        block *= 2
    warps = max(1, min(4, block * itemsize // 512))
    return RowSchedule(block, warps, ahead=4, long=64, long_block=32, long_ahead=8)


def element_schedule_for(length: int, columns: int, num_sms: int) -> ElementSchedule:
    """The schedule for ``columns`` columns of ``length`` indices each, on a GPU of ``num_sms`` multiprocessors."""
    waves = -(-columns // (num_sms * 1024))
    down = length * waves * _STEP_US
    sort = _SORT_US + length * columns * _SORT_US_PER_KEY
    if down <= sort:
        return ElementSchedule("columns", block=32, ahead=4)
    return ElementSchedule("sorted", block=128, ahead=8)
