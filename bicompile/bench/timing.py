"""Time several ways to do one thing, taking turns, so that a busy machine slows all of them alike.

A machine that others use drifts by tens of percent within a minute; a ratio of two medians taken in turns does not.
Quote ratios, and their spread.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, one number for each round, in the order of the rounds."""

    seconds: tuple[float, ...]

    @property
    def median_us(self) -> float:
        """The median over rounds, in microseconds."""
        return statistics.median(self.seconds) * 1e6

    @property
    def spread_us(self) -> tuple[float, float]:
        """The quartiles over rounds, in microseconds."""
        return _quartiles([second * 1e6 for second in self.seconds])


@dataclass(frozen=True)
class Comparison:
    """Ours against theirs, from one interleaved run."""

    ours: Timing
    theirs: Timing

    @property
    def ratio(self) -> float:
        """Their median time over our median time: above 1 when we are faster."""
        return self.theirs.median_us / self.ours.median_us

    @property
    def ratio_spread(self) -> tuple[float, float]:
        """The quartiles of the ratios taken round by round."""
        pairs = zip(self.theirs.seconds, self.ours.seconds, strict=True)
        return _quartiles([theirs / ours for theirs, ours in pairs])


def interleaved(
    runs: Mapping[str, Callable[[], Any]],
    *,
    seconds: float = 1.0,
    rounds: int = 15,
    synchronize: Callable[[], None] | None = None,
) -> dict[str, Timing]:
    """Time each of ``runs`` in turns.

    Args:
        runs: name to a call without arguments.
        seconds: about how long the whole may take, warming up excluded.
        rounds: how many turns each gets, at most; never fewer than 3, however slow the calls are.
        synchronize: waits for the device, where calls return before their work is done.

    Returns:
        name to its timing; every timing has the same number of rounds.
    """
    wait = synchronize or (lambda: None)
    once = {name: _warm_up(run, wait) for name, run in runs.items()}
    rounds = max(3, min(rounds, int(seconds / sum(once.values()))))
    slot = seconds / rounds / len(runs)
    calls = {name: max(1, min(10_000, int(slot / cost))) for name, cost in once.items()}
    taken: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(rounds):
        # Each is first equally often: who goes first may meet a cold cache or a busy neighbour.
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            taken[name].append(_time(runs[name], calls[name], wait))
    return {name: Timing(tuple(values)) for name, values in taken.items()}


def compare(
    ours: Callable[[], Any],
    theirs: Callable[[], Any],
    *,
    seconds: float = 1.0,
    rounds: int = 15,
    synchronize: Callable[[], None] | None = None,
) -> Comparison:
    """Time two calls in turns; see :func:`interleaved`."""
    runs = {"ours": ours, "theirs": theirs}
    timings = interleaved(runs, seconds=seconds, rounds=rounds, synchronize=synchronize)
    return Comparison(**timings)


def rotate(function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> Callable[[], Any]:
    """A call that takes the next of ``arguments`` each time, so that none is still in the cache from its last use."""
    turns = itertools.cycle(arguments)
    return lambda: function(*next(turns))


def _warm_up(run: Callable[[], Any], wait: Callable[[], None]) -> float:
    """Call once, and say how many seconds the fastest of a few more calls took, or the first of them if it is slow."""
    run()
    wait()
    once = _time(run, 1, wait)
    if once < 1.0:
        once = min(once, *(_time(run, 1, wait) for _ in range(3)))
    return max(once, 1e-7)


def _time(run: Callable[[], Any], calls: int, wait: Callable[[], None]) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    wait()
    return (time.perf_counter() - start) / calls


def _quartiles(values: list[float]) -> tuple[float, float]:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high
