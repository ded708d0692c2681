"""What does batch invariance cost a whole language model on a GPU?

A Llama of 1.2 billion random bf16 weights, against stock Inductor with the same settings: the time of a prefill, and
of a decode step with a static cache under CUDA graphs; and whether the first sequence's logits have the same bits in
all of them.

Every case of either compiler is a process of its own.  They compile at the same time, and then take turns on the GPU.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..results import Report, Row
from ..suite import Settings, Suite
from . import model_worker
from .model_worker import CASES, DYNAMIC, Case

TURNS = 5
AGREE = 0.1
"""Logits of two bf16 models that agree differ by less than this, relative to their norm."""
BACKENDS = ("batch_invariant", "inductor")
REFERENCE = CASES[0]


class Worker:
    """A process that has compiled one case with one compiler, and answers questions about it."""

    def __init__(self, backend: str, case: Case, layers: int, caches: Path) -> None:
        own = caches / backend
        names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "BICOMPILE_CACHE_DIR")
        environment = {**os.environ, **{name: str(own / name.lower()) for name in names}}
        command = [sys.executable, "-m", model_worker.__name__, backend, case.name, str(layers)]
        self.name = f"{case.name}, {backend}"
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )

    def answer(self) -> Any:
        """The next answer."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(model_worker.ANSWER):
                return json.loads(line.removeprefix(model_worker.ANSWER))
        self.errors.seek(0)
        raise RuntimeError(f"{self.name}: the worker ended\n{self.errors.read()[-4000:]}")

    def ask(self, question: str) -> Any:
        """Ask, and wait for the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(question + "\n")
        self.process.stdin.flush()
        return self.answer()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.errors.close()


@dataclass(frozen=True)
class Bits:
    """The bits of the first sequence's logits: a prefill's, or a decoder's from its first token to its last."""

    case: Case

    def __str__(self) -> str:
        return f"logits of {self.case}"


class Measured(Suite):
    """A Llama's prefill and decode against Inductor."""

    name = "model"
    case_seconds = model_worker.TURN_MS * 1e-3 * TURNS

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.workers: dict[tuple[str, Case], Worker] = {}

    def cases(self) -> Sequence[Case | Bits]:
        """Every case timed, then the bits of all; with ``quick`` a prefill and a decode."""
        timed = (CASES[0], CASES[2]) if self.settings.quick else CASES
        return [*timed, *(Bits(case) for case in timed), *([] if self.settings.quick else [Bits(DYNAMIC)])]

    @contextlib.contextmanager
    def ready(self, cases: Sequence[Case | Bits]) -> Iterator[None]:
        """All workers, started at once."""
        wanted = [(backend, case) for case in cases if isinstance(case, Case) for backend in BACKENDS]
        checked = [case.case for case in cases if isinstance(case, Bits)]
        wanted += [("batch_invariant", case) for case in [*checked, *([REFERENCE] if checked else [])]]
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary, contextlib.ExitStack() as stack:
            caches, layers = self.settings.caches or Path(temporary), layers_of(self.settings)
            for key in dict.fromkeys(wanted):
                self.workers[key] = stack.enter_context(Worker(*key, layers, caches))
            for worker in self.workers.values():
                print(f"first call of {worker.name}: {worker.answer():.1f} s", flush=True)
            yield

    def measure(self, case: Case | Bits) -> list[Row]:
        """Both compilers' times, or our bits."""
        return [self._same_bits(case.case) if isinstance(case, Bits) else self._timed(case)]

    def _timed(self, case: Case) -> Row:
        """Both compilers' times, in turns, on a GPU that nobody else uses meanwhile."""
        ours, theirs = (self.workers[backend, case] for backend in BACKENDS)
        mine, other = (torch.tensor(worker.ask("sample")) for worker in (ours, theirs))
        difference = ((mine - other).norm() / other.norm()).item()
        if not difference < AGREE:
            raise AssertionError(f"{case}: logits differ from Inductor's by {difference:.1%}")
        taken: dict[Worker, list[float]] = {ours: [], theirs: []}
        for turn in range(TURNS):
            for worker in (ours, theirs) if turn % 2 else (theirs, ours):
                taken[worker] += worker.ask("time")
        ours_us, theirs_us = (statistics.median(taken[worker]) for worker in (ours, theirs))
        extra = {"ours_us": ours_us, "theirs_us": theirs_us, "difference": difference}
        return Row(str(case), "inductor", theirs_us / ours_us, None, extra)

    def _same_bits(self, case: Case) -> Row:
        found, reference = (self.workers["batch_invariant", c].ask("bits") for c in (case, REFERENCE))
        same = all(found.get(part, reference[part]) == reference[part] for part in ("last", "prefix"))
        same = same and found.get("permuted", True)
        return Row(str(Bits(case)), str(REFERENCE), float(same), same)

    def summarise(self, report: Report) -> None:
        """Every time's ratio, and whether all bits were the same."""
        for row in report.rows:
            if row.against == "inductor":
                report.summarise(f"{row.case} / Inductor", row.ratio, 0.95)
        if same := [row.same_bits for row in report.rows if row.same_bits is not None]:
            name = "bits: alone = in batch = permuted, prefill = decode, static = dynamic"
            report.summarise(name, float(all(same)), 1.0)


def layers_of(settings: Settings) -> int:
    """How many layers the model has."""
    if settings.layers is not None:
        return settings.layers
    return 2 if settings.quick else 16
