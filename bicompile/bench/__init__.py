"""Timing and result files for the benchmarks in ``examples/benchmarks``."""

from .gpu_timing import gpu_interleaved
from .results import Report, Row, device_name, device_slug
from .timing import Comparison, Timing, compare, interleaved, rotate

__all__ = [
    "Comparison",
    "Report",
    "Row",
    "Timing",
    "compare",
    "device_name",
    "device_slug",
    "gpu_interleaved",
    "interleaved",
    "rotate",
]
