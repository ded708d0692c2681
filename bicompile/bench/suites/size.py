"""How does the cost of batch invariance grow with the size of a language model?

Llamas of two layers with random weights and growing width, in bf16 on a GPU and fp32 on a CPU, compiled with this
backend and with stock Inductor, and stock eager: the three take turns.  Each size is given whole sequences, and one
token of each, as in a decode step whose attention is left out.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import bicompile
from bicompile.testing import same_bits

from ..results import Report, Row
from ..suite import Suite
from ..timing import interleaved
from .llama import model, tokens

WIDTHS = {"cpu": (256, 512, 1024), "cuda": (512, 1024, 2048, 4096)}
LENGTHS = {"cpu": (1, 128), "cuda": (1, 1024)}
LAYERS, BATCH = 2, 4
AGREE = {torch.bfloat16: 0.1, torch.float32: 1e-3}
"""Logits of two models that agree differ by less than this, relative to their norm."""


@dataclass(frozen=True)
class Case:
    """``BATCH`` sequences of ``length`` tokens through a model of ``width``."""

    width: int
    length: int
    layers: int

    @property
    def group(self) -> str:
        """What is summarised together, and has a line in the plot."""
        return f"{BATCH} x {self.length} tokens"

    def __str__(self) -> str:
        return f"{self.group}, width {self.width}"


class Measured(Suite):
    """Growing Llamas against eager and Inductor."""

    name = "size"
    case_seconds = 6.0
    sweep = "weights"

    def cases(self) -> Sequence[Case]:
        """The smallest model first."""
        quick, device = self.settings.quick, self.settings.device
        layers = LAYERS if self.settings.layers is None else self.settings.layers
        widths = WIDTHS[device][:2] if quick else WIDTHS[device]
        return [Case(width, length, layers) for width in widths for length in LENGTHS[device]]

    @torch.inference_mode()
    def measure(self, case: Case) -> list[Row]:
        """Check one size, then time it."""
        device = self.settings.device
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        torch._dynamo.reset()  # a size is a recompilation to Dynamo, which counts them
        llama = model(case.layers, device, dtype, case.width)
        ids = tokens(BATCH, case.length, device)
        forwards = {
            "ours": torch.compile(llama, backend="batch_invariant"),
            "eager": llama,
            "inductor": torch.compile(llama, backend="inductor"),
        }
        runs: dict[str, Callable[[], Tensor]] = {
            name: functools.partial(_logits, forward, ids) for name, forward in forwards.items()
        }
        got, expected = runs["ours"](), runs["eager"]()
        if not (difference := float((got - expected).norm() / expected.norm())) < AGREE[dtype]:
            raise AssertionError(f"{case}: logits differ from eager's by {difference:.2%}")
        same = same_bits(_logits(forwards["ours"], ids.flip(0)).flip(0), got)
        weights = sum(weight.numel() for weight in llama.parameters())
        extra = {"group": case.group, "series": case.group, "weights": weights}
        # Many calls follow each other, as in use: what counts of CPU and GPU is the one that is slower.
        wait = torch.cuda.synchronize if device == "cuda" else None
        timings = interleaved(runs, seconds=self.seconds, rounds=100, synchronize=wait)
        return self.against_each(case, timings, same, extra)

    def summarise(self, report: Report) -> None:
        """Against each baseline: the smallest and the largest model, and the mean."""
        groups: dict[str, list[float]] = {}
        for row in report.rows:
            groups.setdefault(f"{row.extra['group']} / {row.against}", []).append(row.ratio)
        for name, ratios in groups.items():
            report.summarise(f"{name}, smallest model", ratios[0])
            report.summarise(f"{name}, largest model", ratios[-1])
            report.summarise(f"{name}, geometric mean", statistics.geometric_mean(ratios))


def _logits(forward: Callable[..., object], ids: Tensor) -> Tensor:
    """``[batch, length, vocabulary]``."""
    return forward(input_ids=ids, use_cache=False).logits  # type: ignore[attr-defined]


assert bicompile  # registers the backend's name where the package is not installed
