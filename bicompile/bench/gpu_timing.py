"""Time several ways to do one thing on a GPU, taking turns, each with a cold L2 cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from .timing import Timing

_FLUSH_BYTES = 256 << 20
"""Larger than any L2 cache; writing them takes about 100 us, in which the CPU queues the next call."""
_LEAD_CYCLES = 2_000_000


def gpu_interleaved(runs: Mapping[str, Callable[[], Any]], ms: float = 100.0, rounds: int = 200) -> dict[str, Timing]:
    """Time each of ``runs`` in turns, with CUDA events around each single call and L2 overwritten before it.

    The GPU is kept behind the CPU, so what is measured is the GPU's time, unless a call keeps the CPU busy for longer
    than the GPU (about 100 us more than the call itself).

    Args:
        runs: name to a call without arguments, on the current CUDA device.
        ms: about how many milliseconds of calls in all, warming up and overwriting L2 excluded.
        rounds: how many turns each gets, at most; never fewer than 7, however slow the calls are.

    Returns:
        name to its timing; every timing has the same number of rounds.
    """
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    once = {}
    for name, run in runs.items():
        run()
        once[name] = _taken({name: run}, [name] * 3, flush)[name][-1]
    rounds = max(7, min(rounds, int(ms * 1e-3 / sum(once.values()))))
    names = list(runs)
    turns: list[str] = []
    for turn in range(rounds):
        first = turn % len(names)
        turns += names[first:] + names[:first]
    return {name: Timing(tuple(seconds)) for name, seconds in _taken(runs, turns, flush).items()}


def _taken(runs: Mapping[str, Callable[[], Any]], turns: list[str], flush: torch.Tensor) -> dict[str, list[float]]:
    """The seconds of each call, by name, for the calls in ``turns``."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in turns]
    torch.cuda._sleep(_LEAD_CYCLES)
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
