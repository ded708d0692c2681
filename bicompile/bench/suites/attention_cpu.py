"""What does batch-invariant attention cost, next to PyTorch's own on the CPU?

``F.scaled_dot_product_attention`` against ``bicompile::sdpa`` as a compiled graph calls it: 9 query heads over 3 key
heads of depth 64, the shape of SmolLM2-135M.  Calls take turns, and operands rotate, so that none of them is in the L2
cache yet.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import bicompile.lowering.attention.op  # noqa: F401 (registers bicompile::sdpa)
from bicompile.testing import same_bits

from ..results import Report, Row
from ..suite import Suite
from ..timing import Comparison, rotate

HEADS, KV_HEADS, DEPTH = 9, 3, 64
PREFILL = ((1, 128), (1, 512), (1, 2048), (4, 512))
BATCHES, KEYS = (1, 4, 8), (128, 512, 2048, 4096)
DTYPES = (torch.float32, torch.bfloat16)
L2_BYTES = 2 * 2**20  # more than one core of the machines we measure on has


@dataclass(frozen=True)
class Case:
    """Attention of ``queries`` new tokens to ``keys`` tokens."""

    kind: str
    dtype: torch.dtype
    batch: int
    queries: int
    keys: int
    masked: bool = False

    def __str__(self) -> str:
        mask = " bool mask" if self.masked else ""
        return f"{self.kind} {self.dtype_name} B={self.batch} L={self.queries} S={self.keys}{mask}"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def causal(self) -> bool:
        return self.kind == "prefill"

    def arguments(self, batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Query, key, value and mask of random sequences."""
        shapes = ((HEADS, self.queries), (KV_HEADS, self.keys), (KV_HEADS, self.keys))
        q, k, v = (torch.randn(batch, *shape, DEPTH).to(self.dtype) for shape in shapes)
        return q, k, v, torch.ones(batch, 1, self.queries, self.keys, dtype=torch.bool) if self.masked else None

    def ours(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out: Tensor = torch.ops.bicompile.sdpa.default(q, k, v, mask, self.causal, DEPTH**-0.5)[0]
        return out

    def theirs(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal, enable_gqa=True)

    def check(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
        """Assert that our error is at most twice theirs, against a wider dtype."""
        wide = torch.float64 if self.dtype == torch.float32 else torch.float32
        truth = self.theirs(q.to(wide), k.to(wide), v.to(wide), mask)
        ours, theirs = ((f(q, k, v, mask).to(wide) - truth).norm().item() for f in (self.ours, self.theirs))
        assert ours <= 2 * theirs, f"{self}: error {ours}, that of torch {theirs}"

    def first_row_keeps_its_bits(self) -> bool:
        """Whether the first sequence of a batch has the bits that it has alone."""
        q, k, v, mask = self.arguments(self.batch + 1)
        alone = self.ours(q[:1], k[:1], v[:1], None if mask is None else mask[:1])
        return same_bits(self.ours(q, k, v, mask)[:1], alone)


def cases(quick: bool) -> Iterator[Case]:
    """Prefill, then decode with and without a mask, in every dtype; or a few small ones."""
    for dtype in DTYPES:
        for batch, length in PREFILL[:1] if quick else PREFILL:
            yield Case("prefill", dtype, batch, length, length)
        for batch in BATCHES[:1] if quick else BATCHES:
            for keys in KEYS[:2] if quick else KEYS:
                yield Case("decode", dtype, batch, 1, keys)
                yield Case("decode", dtype, batch, 1, keys, masked=True)


class Measured(Suite):
    """Prefill and decode against PyTorch's own."""

    name = "attention"
    case_seconds = 0.5

    def cases(self) -> Sequence[Case]:
        return list(cases(self.settings.quick))

    @contextmanager
    def ready(self, cases: Sequence[Case]) -> Iterator[None]:
        with torch.inference_mode():
            yield

    def measure(self, case: Case) -> list[Row]:
        """Check the values, then time the two in turns."""
        first = case.arguments(case.batch)
        case.check(*first)
        size = sum(t.numel() * t.element_size() for t in first[:3])
        sets = [first, *(case.arguments(case.batch) for _ in range(min(math.ceil(L2_BYTES / size), 15)))]
        timings = self.in_turns({"ours": rotate(case.ours, sets), "theirs": rotate(case.theirs, sets)}, rounds=15)
        found = Comparison(**timings)
        low, high = found.ratio_spread
        extra = {"group": f"{case.kind} {case.dtype_name}", "ours_us": found.ours.median_us}
        extra |= {"theirs_us": found.theirs.median_us, "ratio_low": low, "ratio_high": high}
        same = case.first_row_keeps_its_bits()
        return [Row(str(case), "F.scaled_dot_product_attention", found.ratio, same, extra)]

    def summarise(self, report: Report) -> None:
        """Geometric mean and worst case of prefill and decode in each dtype."""
        groups: dict[str, list[float]] = {}
        for row in report.rows:
            groups.setdefault(row.extra["group"], []).append(row.ratio)
        for name, ratios in groups.items():
            report.summarise(f"{name}, geometric mean", statistics.geometric_mean(ratios), bar=1.0)
            report.summarise(f"{name}, worst", min(ratios))
