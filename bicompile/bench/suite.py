"""What every suite of ``bicompile bench`` is made of, and how one is run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from .gpu_timing import gpu_interleaved
from .results import Report, Row
from .timing import Comparison, Timing, interleaved

_WRITE_EVERY = 20.0
"""Seconds between two writings of the result file, so that a run that is cut off leaves what it measured."""


@dataclass(frozen=True)
class Settings:
    """What the command line asks of a suite.

    Attributes:
        device: ``cpu`` or ``cuda``.
        quick: fewer and smaller cases, shorter.
        case_seconds: about how long the calls of one case take, warming up excluded; None for the suite's own.
        layers: of the language models with random weights; None for the suite's own.
        caches: a directory in which the compilers of whole models on a GPU keep their caches; None for a temporary one.
    """

    device: str = "cpu"
    quick: bool = False
    case_seconds: float | None = None
    layers: int | None = None
    caches: Path | None = None


class Suite:
    """One benchmark on one device: its cases, what is measured of each, and the headline figures.

    A case's ``str`` is its name.  Before a case is timed its values are checked, and that its rows keep their bits.
    """

    name: ClassVar[str]
    case_seconds: ClassVar[float]
    """About how long the calls of one case take; with ``quick``, a fifth of it."""
    sweep: ClassVar[str | None] = None
    """The row's further key that a plot goes along, if there is one."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @property
    def seconds(self) -> float:
        """About how long to time the calls of one case."""
        own = self.case_seconds / 5 if self.settings.quick else self.case_seconds
        return own if self.settings.case_seconds is None else self.settings.case_seconds

    def cases(self) -> Sequence[Any]:
        """Everything that is timed, the headline first."""
        raise NotImplementedError

    def ready(self, cases: Sequence[Any]) -> AbstractContextManager[object]:
        """What measuring ``cases`` needs around it, such as kernels that are compiled beforehand."""
        return contextlib.nullcontext()

    def measure(self, case: Any) -> list[Row]:
        """Check one case, then time it: a row for each baseline."""
        raise NotImplementedError

    def summarise(self, report: Report) -> None:
        """Add the headline figures of what was measured so far."""

    def against_each(self, case: Any, timings: Mapping[str, Timing], same: bool, extra: Mapping[str, Any]) -> list[Row]:
        """A row for each of ``timings`` that ``ours`` is held against."""
        rows = []
        for against, theirs in timings.items():
            if against != "ours":
                found = Comparison(timings["ours"], theirs)
                low, high = found.ratio_spread
                times = {"ours_us": found.ours.median_us, "theirs_us": theirs.median_us}
                spread = {"ratio_low": low, "ratio_high": high}
                rows.append(Row(str(case), against, found.ratio, same, {**extra, **times, **spread}))
        return rows

    def in_turns(self, runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, Timing]:
        """Time ``runs`` on the suite's device: at most ``rounds`` turns, in about the seconds of a case."""
        if self.settings.device == "cpu":
            return interleaved(runs, seconds=self.seconds, rounds=rounds)
        return gpu_interleaved(runs, ms=self.seconds * 1e3, rounds=rounds)


def run(
    suite: Suite, cases: Sequence[Any], progress: Callable[[Sequence[Any]], Iterator[Any]], seconds: float, write: bool
) -> Report:
    """Measure ``cases`` one by one.

    Args:
        progress: goes through the cases, and shows how far it is.
        seconds: begin no case after that.
        write: whether to keep what was measured in the results directory, now and then.
    """
    report, start = Report(suite.name, suite.settings.device), time.monotonic()
    written = start
    with suite.ready(cases):
        for case in progress(cases):
            report.rows += suite.measure(case)
            report.summary.clear()
            suite.summarise(report)
            now = time.monotonic()
            if write and now - written > _WRITE_EVERY:
                report.write()
                written = now
            if now - start > seconds:
                break
    return report
