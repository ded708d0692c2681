"""The order of every reduction over a row: sums, products, norms, variances, the sums in a softmax or a layer norm."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ReductionOrder:
    """Which partial results are combined with which.

    The row is cut into sections of ``section`` elements.  In each, lane ``l`` of ``lanes`` combines the elements
    ``k = l, l + lanes, l + 2 * lanes, ...`` in ascending order, starting from the operation's neutral element.  The
    lanes of the sections are combined in ascending order, again from the neutral element.  Then the lanes halve: lane
    ``i`` takes lane ``i + lanes / 2``, and so on down to lane 0.  ``k`` counts the reduced elements in row-major order
    of the tensor's shape, wherever they lie in memory.  Every operation is rounded to ``compute``; the result is
    rounded once more, to the output's dtype.
    """

    lanes: int
    section: int
    compute: torch.dtype


@dataclass(frozen=True)
class GpuReductionOrder:
    """Which partial results are combined with which on a GPU.

    The row is cut into sections of ``section`` elements.  In each, lane ``l`` of ``lanes`` combines the elements
    ``k = l, l + lanes, l + 2 * lanes, ...`` in ascending order, starting from the operation's neutral element.  The
    lanes of each section are combined by a tree: neighbours, then neighbouring pairs, and so on.  The results of the
    sections are a row again, reduced by the same rule until one is left.  ``k`` and the roundings are those of
    ``ReductionOrder``.
    """

    lanes: int
    section: int
    compute: torch.dtype


def order_for(n: int, dtype: torch.dtype) -> ReductionOrder:
    """The order of a reduction of ``n`` elements in ``dtype``; today it is the same for every ``n``."""
    return ReductionOrder(lanes=32, section=4096, compute=_compute(dtype))


def gpu_order_for(n: int, dtype: torch.dtype) -> GpuReductionOrder:
    """The order of a reduction of ``n`` elements in ``dtype`` on a GPU; today it is the same for every ``n``.

    A section is what one program holds in registers: the hidden sizes of most models fit into one.
    """
    return GpuReductionOrder(lanes=1024, section=8192, compute=_compute(dtype))


def _compute(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
