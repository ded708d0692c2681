"""Benchmarks: timing in turns, the suites, their result files, and the command that runs them."""

from .command import add_command
from .gpu_timing import gpu_interleaved
from .results import Report, Row, device_name, device_slug
from .timing import Comparison, Timing, compare, interleaved, rotate

__all__ = [
    "Comparison",
    "Report",
    "Row",
    "Timing",
    "add_command",
    "compare",
    "device_name",
    "device_slug",
    "gpu_interleaved",
    "interleaved",
    "rotate",
]
