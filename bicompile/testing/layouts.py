"""The same values at other places in memory.  Where a tensor lies is not a part of the row, so it must not show."""

from __future__ import annotations

import torch
from torch import Tensor

# contiguous: densely packed at an aligned address.
# offset:     densely packed one element past it, so neither base nor rows are aligned.
# strided:    the same columns of a wider buffer, off by one column.
# transposed: the last two dims swapped in memory; every second element of a buffer where there is one dim.
LAYOUTS = ("contiguous", "offset", "strided", "transposed")


def lay_out(t: Tensor, layout: str) -> Tensor:
    """A copy of ``t`` in one of ``LAYOUTS``.  Memory around it holds NaN, or ones where the dtype has no NaN."""
    if layout == "contiguous":
        return t.detach().clone(memory_format=torch.contiguous_format)
    if layout == "offset" or t.dim() == 0:
        place = _surroundings(t, (t.numel() + 2,))[1:-1].view(t.shape)
    elif layout == "strided":
        place = _surroundings(t, (*t.shape[:-1], t.shape[-1] + 3))[..., 1:-2]
    elif layout == "transposed" and t.dim() > 1:
        place = _surroundings(t, (*t.shape[:-2], t.shape[-1], t.shape[-2])).transpose(-1, -2)
    elif layout == "transposed":
        place = _surroundings(t, (2 * t.shape[0],))[::2]
    else:
        raise ValueError(f"lay_out: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
    return place.copy_(t.detach())


def _surroundings(t: Tensor, shape: tuple[int, ...]) -> Tensor:
    buffer = torch.ones(shape, dtype=torch.uint8, device=t.device).to(t.dtype)
    if t.dtype.is_floating_point and t.dtype.itemsize > 1 or t.dtype.is_complex:
        buffer.fill_(float("nan"))
    return buffer
