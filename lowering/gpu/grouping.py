"""Kernels that read their rows twice take as many at a time as the L2 cache holds: the second look finds them there."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .rows import Level

_SHARE = 0.4
"""How much of the cache what is read may fill; what is written wants as much."""
_MULTIPLE = 16
"""Rows of a group: their addresses then are as divisible by 16 as those of the first."""
_USUAL_CACHE = 50 << 20

Step = Callable[..., None]


@functools.cache
def _cache_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return _USUAL_CACHE
    return torch.cuda.get_device_properties(device).L2_cache_size


def rows_in_cache(row_bytes: int, device: torch.device, multiple: int = 1) -> int:
    """How many rows of ``row_bytes`` bytes are taken at a time, a multiple of ``multiple``."""
    multiple *= _MULTIPLE
    rows = int(_cache_bytes(device) * _SHARE) // row_bytes
    return max(multiple, rows // multiple * multiple)


def in_groups(rows: int, group: int, make: Callable[[int], Step]) -> Step:
    """A step over ``rows`` rows from steps over up to ``group`` of them, which ``make`` makes for a number of rows.

    Steps are called with a tuple of tensors whose first dim is the rows, and then with what all rows share.
    """
    whole = make(min(rows, group))
    if rows <= group:
        return whole
    rest = make(rows % group) if rows % group else whole

    def run(by_row: tuple[Tensor, ...], *shared: object) -> None:
        for part in zip(*(t.split(group) for t in by_row), strict=True):
            (whole if len(part[0]) == group else rest)(part, *shared)

    return run


def flat_rows(x: Tensor, rows: Level) -> Tensor:
    """``x``, [..., n], as [rows, n], where its rows lie in one level."""
    return x.as_strided((rows.count, x.shape[-1]), (rows.step, 1))
