"""How long does the first call of a whole language model take on a GPU?

A Llama of 1.2 billion random bf16 weights: a prefill, and a decode step under CUDA graphs.  Each compiler is a process
of its own with empty caches, Triton's and ours among them, and has the machine to itself; they take turns.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..results import Report, Row
from ..suite import Suite
from .model_gpu import BACKENDS, Worker, layers_of
from .model_worker import CASES, Case

FIRST = ("prefill 1x2048", "decode B=1, CUDA graphs")


class Measured(Suite):
    """First calls against Inductor's."""

    name = "compile"
    case_seconds = 0.0  # a first call is made once

    def cases(self) -> Sequence[Case]:
        """The prefill, then the decode step; with ``quick`` the prefill, of fewer layers."""
        found = [case for case in CASES if case.name in FIRST]
        return found[:1] if self.settings.quick else found

    def measure(self, case: Case) -> list[Row]:
        """One first call of each compiler; with two pairs the second one goes first in its turn."""
        taken: dict[str, list[float]] = {backend: [] for backend in BACKENDS}
        for backend in BACKENDS if self.settings.quick else (*BACKENDS, *reversed(BACKENDS)):
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as caches:
                with Worker(backend, case, layers_of(self.settings), Path(caches)) as worker:
                    taken[backend].append(worker.answer())
        ours, theirs = (statistics.median(taken[backend]) for backend in BACKENDS)
        return [Row(f"first call, {case}", "inductor", theirs / ours, extra={"ours_s": ours, "theirs_s": theirs})]

    def summarise(self, report: Report) -> None:
        """The ratio of each case."""
        for row in report.rows:
            report.summarise(f"{row.case}: inductor's time / ours (at least 1/2)", row.ratio, 0.5)
