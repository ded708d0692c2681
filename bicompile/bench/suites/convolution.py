"""What does it cost that a convolution is a matrix product in one order?

Layers of vision and speech models, compiled with this backend and with stock Inductor, and stock eager: the three take
turns.  PyTorch's own are those of oneDNN and cuDNN.  On a GPU ours write out the windows, on a CPU they need not.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import bicompile
from bicompile.testing import same_bits

from ..results import Report, Row
from ..suite import Suite

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "3x3, 64 channels, 28x28": (lambda: nn.Conv2d(64, 64, 3, padding=1), (64, 28, 28)),
    "3x3, 256 channels, 14x14": (lambda: nn.Conv2d(256, 256, 3, padding=1), (256, 14, 14)),
    "3x3, 512 channels, 7x7": (lambda: nn.Conv2d(512, 512, 3, padding=1), (512, 7, 7)),
    "1x1, 256 to 64 channels, 28x28": (lambda: nn.Conv2d(256, 64, 1), (256, 28, 28)),
    "7x7 stem, 112x112": (lambda: nn.Conv2d(3, 64, 7, stride=2, padding=3), (3, 112, 112)),
    "patches of 16x16, 224x224": (lambda: nn.Conv2d(3, 192, 16, stride=16), (3, 224, 224)),
    "depthwise 3x3, 128 channels, 28x28": (lambda: nn.Conv2d(128, 128, 3, padding=1, groups=128), (128, 28, 28)),
    "transposed 4x4, 64 to 32 channels, 16x16": (lambda: nn.ConvTranspose2d(64, 32, 4, 2, 1), (64, 16, 16)),
    "1d, 5 taps, 128 channels, 400": (lambda: nn.Conv1d(128, 128, 5, padding=2), (128, 400)),
}
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}
BATCH = 8
AGREE = {torch.bfloat16: 2e-2, torch.float32: 1e-5}
"""Results that agree differ by less than this, relative to their norm."""


@dataclass(frozen=True)
class Case:
    """One layer in one dtype, on ``BATCH`` samples."""

    layer: str
    dtype: torch.dtype

    @property
    def dtype_name(self) -> str:
        """Such as ``bfloat16``."""
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return f"{self.layer} {self.dtype_name}"


class Measured(Suite):
    """Convolutions against eager and Inductor."""

    name = "convolution"
    case_seconds = 3.0

    def cases(self) -> Sequence[Case]:
        """Dtype by dtype."""
        layers = list(LAYERS)[:1] if self.settings.quick else LAYERS
        return [Case(layer, dtype) for dtype in DTYPES[self.settings.device] for layer in layers]

    @torch.inference_mode()
    def measure(self, case: Case) -> list[Row]:
        """Check one layer, then time it."""
        torch._dynamo.reset()
        make, shape = LAYERS[case.layer]
        module = make().to(self.settings.device, case.dtype)
        x = torch.randn(BATCH, *shape, device=self.settings.device, dtype=case.dtype)
        forwards: dict[str, Callable[[Tensor], Tensor]] = {
            "ours": torch.compile(module, backend="batch_invariant"),
            "eager": module,
            "inductor": torch.compile(module, backend="inductor"),
        }
        got, expected = forwards["ours"](x), forwards["eager"](x)
        if not (difference := float((got - expected).norm() / expected.norm())) < AGREE[case.dtype]:
            raise AssertionError(f"{case}: results differ from eager's by {difference:.2%}")
        same = same_bits(forwards["ours"](x.flip(0)).flip(0), got)
        runs = {name: functools.partial(forward, x) for name, forward in forwards.items()}
        return self.against_each(case, self.in_turns(runs, rounds=300), same, {"group": case.dtype_name})

    def summarise(self, report: Report) -> None:
        """Mean and worst of each dtype, against each baseline."""
        groups: dict[str, list[float]] = {}
        for row in report.rows:
            groups.setdefault(f"{row.extra['group']} / {row.against}", []).append(row.ratio)
        for name, ratios in groups.items():
            report.summarise(f"{name}, geometric mean", statistics.geometric_mean(ratios))
            report.summarise(f"{name}, worst", min(ratios))


assert bicompile  # registers the backend's name where the package is not installed
