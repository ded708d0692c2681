"""Are row reductions, softmax and layer norm slower for being batch-invariant?

Times each op against stock eager, in turns, caches warm.  Before timing, the values are compared, and rows alone with
the same rows in their batch, bit for bit.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

import bicompile.lowering  # noqa: F401 (defines the ops)
from bicompile.testing import same_bits

from ..results import Report, Row
from ..suite import Suite
from ..timing import Comparison

aten, ours = torch.ops.aten, torch.ops.bicompile
HIDDEN = [(1, 576), (8, 576), (512, 576), (1, 4096), (8, 4096), (512, 4096)]
LOGITS = [(1, 49152), (8, 49152), (512, 512), (4096, 128)]
SUMS = [(512, 4096), (1, 49152)]


@dataclass(frozen=True)
class Case:
    """One op on one shape: ours and stock on it, and whether its rows are those of the result."""

    family: str
    name: str
    shape: tuple[int, int]
    dtype: torch.dtype
    ours: Callable[[Tensor], Tensor]
    stock: Callable[[Tensor], Tensor]
    has_rows: bool = True

    def __str__(self) -> str:
        return f"{self.name} {str(self.dtype).removeprefix('torch.')}"


def cases(dtype: torch.dtype) -> Iterator[Case]:
    """Every case of one dtype."""
    for m, n in HIDDEN:
        weight, bias = (torch.randn(n).to(dtype) for _ in range(2))
        yield Case(
            *("rms", f"mean_square {m}x{n}", (m, n), dtype, _mean_square),
            lambda x: x.float().pow(2).mean(-1, True),
        )
        yield Case(
            "layer_norm",
            f"layer_norm {m}x{n}",
            (m, n),
            dtype,
            functools.partial(_layer_norm, weight, bias),
            functools.partial(_stock_layer_norm, weight, bias),
        )
    for m, n in LOGITS:
        for log, stock in ((False, aten._softmax.default), (True, aten._log_softmax.default)):
            yield Case(
                "softmax",
                f"{'log_' * log}softmax {m}x{n}",
                (m, n),
                dtype,
                functools.partial(_softmax, log),
                functools.partial(_stock_softmax, stock),
            )
    for m, n in SUMS:
        for name in ("sum", "mean"):
            for dim in (0, 1):
                yield Case(
                    "sum",
                    f"{name} of dim {dim} of {m}x{n}",
                    (m, n),
                    dtype,
                    functools.partial(_sum, getattr(ours, name).default, dim),
                    functools.partial(getattr(torch, name), dim=dim),
                    has_rows=dim == 1,
                )


def _mean_square(x: Tensor) -> Tensor:
    return ours.mean_square.default(x, [-1], True, torch.float32)


def _layer_norm(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    return ours.layer_norm.default(x, 1, weight, bias, 1e-5)[0]


def _stock_layer_norm(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    return aten.native_layer_norm.default(x, weight.shape, weight, bias, 1e-5)[0]


def _softmax(log: bool, x: Tensor) -> Tensor:
    return ours.softmax.default(x, -1, log, x.dtype)


def _stock_softmax(op: Callable[..., Tensor], x: Tensor) -> Tensor:
    return op(x, -1, False)


def _sum(op: Callable[..., Tensor], dim: int, x: Tensor) -> Tensor:
    return op(x, [dim], False, x.dtype)


class Measured(Suite):
    """Reductions of rows, softmax and norms against eager."""

    name = "reduction"
    case_seconds = 0.3

    def cases(self) -> Sequence[Case]:
        """Each op on each of its shapes; with ``quick``, on those of up to 8 rows."""
        every = [case for dtype in (torch.float32, torch.bfloat16) for case in cases(dtype)]
        return [case for case in every if not self.settings.quick or case.shape[0] <= 8]

    @contextmanager
    def ready(self, cases: Sequence[Case]) -> Iterator[None]:
        with torch.inference_mode():
            yield

    def measure(self, case: Case) -> list[Row]:
        """Check one case, then time it."""
        x = torch.randn(case.shape).to(case.dtype)
        whole = case.ours(x)
        tolerance = {torch.bfloat16: 4e-2, torch.float32: 1e-4}[case.dtype]
        torch.testing.assert_close(whole, case.stock(x), rtol=tolerance, atol=tolerance)
        rows = range(0, len(x), max(1, len(x) // 8)) if case.has_rows else ()
        same = all(same_bits(case.ours(x[row : row + 1])[0], whole[row]) for row in rows)
        timings = self.in_turns({"ours": lambda: case.ours(x), "theirs": lambda: case.stock(x)}, rounds=15)
        timed = Comparison(**timings)
        low, high = timed.ratio_spread
        extra = {"family": case.family, "ours_us": timed.ours.median_us, "theirs_us": timed.theirs.median_us}
        extra |= {"ratio_low": low, "ratio_high": high}
        return [Row(str(case), "eager", timed.ratio, same if case.has_rows else None, extra)]

    def summarise(self, report: Report) -> None:
        """The geometric mean of each family."""
        ratios: dict[str, list[float]] = {}
        for row in report.rows:
            ratios.setdefault(row.extra["family"], []).append(row.ratio)
        for family, values in ratios.items():
            report.summarise(f"{family}, geometric mean of ratios to eager", statistics.geometric_mean(values), 1.0)
