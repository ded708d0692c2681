"""What does batch invariance cost a whole language model on the CPU?

SmolLM2-135M, whose layers share their compiled graphs: tokens per second of stock PyTorch and of ``batch_invariant``
in one decode step and one prefill, against stock eager and stock ``torch.compile``.  Also what a lowered call costs
beyond its kernel next to Inductor's own extern call.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bicompile.testing import same_bits

from ..results import Report, Row
from ..suite import Settings, Suite
from ..timing import Comparison, compare, interleaved
from .smollm import COMPILERS, PREFILL, compiled, decode, one_function_for_all_layers, prefill, stock

BATCHES = (1, 4, 8)
BASELINES = ("eager", "inductor")
OVERHEAD = "20 products of 8x8 in one graph"
CALLS = {"decode": decode, "prefill": prefill}
AGREE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Logits of two models that agree differ by less than this, relative to their norm."""


@dataclass(frozen=True)
class Case:
    """One call of the model, of ``batch`` sequences."""

    kind: str
    dtype: torch.dtype
    batch: int

    @property
    def group(self) -> str:
        """What is summarised together."""
        return f"{self.kind} {str(self.dtype).removeprefix('torch.')}"

    def __str__(self) -> str:
        return f"{self.group} B={self.batch}"


class Measured(Suite):
    """Decode and prefill against Inductor and eager."""

    name = "model"
    case_seconds = 60.0

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.models: dict[torch.dtype, dict[str, Any]] = {}

    def cases(self) -> Sequence[Case | str]:
        """The overhead of a call, then the model's, dtype by dtype."""
        batches = BATCHES[:2] if self.settings.quick else BATCHES
        return [OVERHEAD, *(Case(kind, dtype, batch) for dtype in AGREE for kind in CALLS for batch in batches)]

    def ready(self, cases: Sequence[Case | str]) -> AbstractContextManager[object]:
        """Dynamo's settings."""
        return one_function_for_all_layers()

    def measure(self, case: Case | str) -> list[Row]:
        """Time one call, in turns."""
        return [self._overhead()] if isinstance(case, str) else self._call(case)

    def _call(self, case: Case) -> list[Row]:
        models, make = self._models(case.dtype), CALLS[case.kind]
        runs = {name: make(one, case.batch) for name, one in models.items()}
        found, rows = runs["ours"](), []
        same = same_bits(found[:1], make(models["ours"], case.batch, rows=1)())
        differences = {name: float((found - run()).norm() / found.norm()) for name, run in runs.items()}
        seconds = self.seconds / 4 if case.kind == "decode" else self.seconds
        timings = interleaved(runs, seconds=seconds, rounds=11)
        tokens = case.batch * (1 if case.kind == "decode" else PREFILL)
        for against in BASELINES:
            if not differences[against] < AGREE[case.dtype]:
                raise AssertionError(f"{case}: logits differ from those of {against} by {differences[against]:.2%}")
            timed = Comparison(timings["ours"], timings[against])
            extra = {"group": case.group, "batch": case.batch, "difference": differences[against]}
            extra |= {"ours_tokens_per_s": tokens * 1e6 / timed.ours.median_us}
            extra |= {"theirs_tokens_per_s": tokens * 1e6 / timed.theirs.median_us}
            rows.append(Row(str(case), against, timed.ratio, same, extra))
        return rows

    def _models(self, dtype: torch.dtype) -> dict[str, Any]:
        """Ours and the baselines; those of another dtype are let go."""
        if dtype not in self.models:
            quick = self.settings.quick
            ours, inductor = (compiled(dtype, backend, quick) for backend in COMPILERS)
            self.models = {dtype: {"ours": ours, "eager": stock(dtype, quick), "inductor": inductor}}
        return self.models[dtype]

    def _overhead(self) -> Row:
        """Twenty tiny products in a chain: nearly all of their time is the way into the kernel."""
        weights = [torch.randn(8, 8) for _ in range(20)]

        def chain(x: Tensor) -> Tensor:
            for weight in weights:
                x = x @ weight
            return x

        x = torch.randn(8, 8)
        ours, theirs = (torch.compile(chain, backend=backend) for backend in COMPILERS)
        found = compare(lambda: ours(x), lambda: theirs(x), seconds=2.0)
        extra = {"ours_us": found.ours.median_us, "theirs_us": found.theirs.median_us}
        return Row(OVERHEAD, "inductor", found.ratio, extra=extra)

    def summarise(self, report: Report) -> None:
        """The worst batch size of each kind and dtype, and the overhead."""
        groups: dict[str, list[float]] = {}
        for row in report.rows:
            if row.case == OVERHEAD:
                report.summarise("call overhead: inductor's / ours (at least 1/2)", row.ratio, 0.5)
            else:
                groups.setdefault(f"{row.extra['group']} / {row.against}", []).append(row.ratio)
        for name, ratios in groups.items():
            bar = 0.95 if name.endswith("inductor") else (2.0 if name.startswith("prefill bfloat16") else None)
            report.summarise(f"{name}, worst batch size", min(ratios), bar)
