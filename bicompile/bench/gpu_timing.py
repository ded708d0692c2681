"""Time several ways to do one thing on a GPU, taking turns, each with a cold L2 cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .timing import Timing

_FLUSH_BYTES = 256 << 20
"""Larger than any L2 cache; writing them takes about 100 us."""
_CALLS_QUEUED = 50
"""Four entries of the device's queue each, which holds about 1000."""
_CYCLES_PER_SECOND = 2e9


def gpu_interleaved(runs: Mapping[str, Callable[[], Any]], ms: float = 100.0, rounds: int = 200) -> dict[str, Timing]:
    """Time each of ``runs`` in turns, with CUDA events around each single call and L2 overwritten before it.

    The GPU sleeps while the CPU queues the calls, so that what is measured is the GPU's time alone, of calls that
    launch a few kernels each: it can queue about a thousand.

    Args:
        runs: name to a call without arguments, on the current CUDA device, that does not wait for the device.
        ms: about how many milliseconds of calls in all, warming up and overwriting L2 excluded.
        rounds: how many turns each gets, at most; never fewer than 7, however slow the calls are.

    Returns:
        name to its timing; every timing has the same number of rounds.
    """
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    once, queueing = {}, 0.0
    for name, run in runs.items():
        run()
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        queueing = max(queueing, time.perf_counter() - start)
        once[name] = min(_taken({name: run}, [name] * 3, flush, queueing)[name])
    rounds = max(7, min(rounds, int(ms * 1e-3 / sum(once.values()))))
    names = list(runs)
    turns: list[str] = []
    for turn in range(rounds):
        first = turn % len(names)
        turns += names[first:] + names[:first]
    taken: dict[str, list[float]] = {name: [] for name in names}
    for first in range(0, len(turns), _CALLS_QUEUED):
        for name, seconds in _taken(runs, turns[first : first + _CALLS_QUEUED], flush, queueing).items():
            taken[name] += seconds
    return {name: Timing(tuple(seconds)) for name, seconds in taken.items()}


def _taken(
    runs: Mapping[str, Callable[[], Any]], turns: list[str], flush: torch.Tensor, queueing: float
) -> dict[str, list[float]]:
    """The seconds of each call in ``turns``, by name; the CPU needs ``queueing`` seconds to queue one."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in turns]
    torch.cuda._sleep(int(_CYCLES_PER_SECOND * (queueing + 50e-6) * len(turns)))
    for name, (start, end) in zip(turns, events, strict=True):
        flush.zero_()
        start.record()
        runs[name]()
        end.record()
    torch.cuda.synchronize()
    taken: dict[str, list[float]] = {name: [] for name in turns}
    for name, (start, end) in zip(turns, events, strict=True):
        taken[name].append(max(start.elapsed_time(end) * 1e-3, 1e-7))
    return taken
