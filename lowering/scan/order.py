"""The order of a scan: one running value, from the first element of the row, or of a segment of it, to the last."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_ACCUMULATE = {
    torch.float64: torch.float64,
    # Twice the output's precision, as ATen on the CPU: a scan is bound by latency, so it costs nothing.
    torch.float32: torch.float64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}


@dataclass(frozen=True)
class ScanOrder:
    """One running value per row in ``accumulate``; every partial result is the running value, rounded once.

    The rounded results never enter the running value, so a result has the bits of a scan that ends there.
    """

    accumulate: torch.dtype


def order_for(dtype: torch.dtype) -> ScanOrder:
    """The one order of a scan with results in ``dtype``; the length and the number of rows cannot matter."""
    if dtype not in _ACCUMULATE:
        raise ValueError(f"scan: expected float32, float64, bfloat16 or float16, got {dtype}")
    return ScanOrder(accumulate=_ACCUMULATE[dtype])


@dataclass(frozen=True)
class GpuScanOrder:
    """The row is cut into segments of ``segment`` elements, each with one running value in ``accumulate``.

    A running value starts with what came before its segment: the running value of the totals of the segments before,
    which are a row again, in the same order.  Segments are counted from the front, so a result has the bits of a scan
    that ends there.
    """

    segment: int
    accumulate: torch.dtype


def gpu_order_for(dtype: torch.dtype) -> GpuScanOrder:
    """The one order of a scan with results in ``dtype`` on a GPU."""
    return GpuScanOrder(segment=64, accumulate=order_for(dtype).accumulate)
