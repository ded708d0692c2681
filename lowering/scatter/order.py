"""The order of a scatter: a destination's contributions, in the order in which they stand in the source."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_ACCUMULATE = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}


@dataclass(frozen=True)
class ScatterOrder:
    """One running value per destination, in ``accumulate``, rounded once at the end.

    It starts from the destination's initial value and takes the contributions of that destination in ascending
    (row-major) order of their position in the source.  No other destination has a part in it.
    """

    accumulate: torch.dtype


def order_for(dtype: torch.dtype) -> ScatterOrder:
    """The one order of a scatter of values in ``dtype``; how many there are, and where they go, cannot matter."""
    if dtype not in _ACCUMULATE:
        raise ValueError(f"scatter: expected float32, float64, bfloat16 or float16, got {dtype}")
    return ScatterOrder(accumulate=_ACCUMULATE[dtype])
