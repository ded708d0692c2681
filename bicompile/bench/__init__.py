"""Timing and result files for the benchmarks in ``examples/benchmarks``."""

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
    "interleaved",
    "rotate",
]
