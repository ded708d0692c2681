"""Are softmax, norms and reductions on a GPU slower for being batch-invariant?

Compiles each function with this backend and with stock Inductor, and times both in turns with a cold L2 cache.  Before
timing, values are compared, and the last row alone with the same row in its batch, bit for bit.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor

import bicompile  # noqa: F401 (registers the backend)
from bicompile.testing import same_bits

from ..results import Report, Row
from ..suite import Suite

BAR = 0.95


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """As the Llama models have it."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, weight)


def softmax(x: Tensor, weight: Tensor) -> Tensor:
    return torch.softmax(x, -1)


def log_softmax(x: Tensor, weight: Tensor) -> Tensor:
    return torch.log_softmax(x, -1)


def row_sum(x: Tensor, weight: Tensor) -> Tensor:
    return x.sum(-1)


def column_sum(x: Tensor, weight: Tensor) -> Tensor:
    return x.sum(0)


@dataclass(frozen=True)
class Family:
    """One function, the shapes it is timed on, the bar its geometric mean is held to, and if rows stay rows."""

    run: Callable[[Tensor, Tensor], Tensor]
    shapes: list[tuple[int, int]]
    bar: float | None = BAR
    has_rows: bool = True

    @property
    def name(self) -> str:
        return self.run.__name__


FAMILIES = (
    Family(rms_norm, [(1, 4096), (64, 8192), (4096, 8192)]),
    Family(layer_norm, [(1, 4096), (64, 8192), (4096, 4096)]),
    Family(softmax, [(1, 152_064), (64, 128_256), (1024, 152_064), (4096, 4096)]),
    Family(log_softmax, [(1, 128_256), (16, 50_257), (4096, 32_000)]),
    Family(row_sum, [(4096, 4096)], bar=None),
    Family(column_sum, [(65_536, 1024)], bar=None, has_rows=False),
)


def inputs(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    x, weight = (torch.randn(s, generator=generator, device="cuda").bfloat16() for s in (shape, shape[1:]))
    return x, weight


def compiled(family: Family) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The function by this backend, and by Inductor."""
    ours = torch.compile(family.run, backend="batch_invariant", dynamic=False)
    return ours, torch.compile(family.run, dynamic=False)


@dataclass(frozen=True)
class Case:
    """One function, by its number in :data:`FAMILIES`, on one shape."""

    number: int
    shape: tuple[int, int]

    @property
    def family(self) -> Family:
        return FAMILIES[self.number]

    def __str__(self) -> str:
        return f"{self.family.name} {self.shape[0]}x{self.shape[1]} bfloat16"


def prepare(case: Case) -> None:
    """Compile what one case needs, in a process of its own; the compilers keep it on disk."""
    with torch.inference_mode():
        x, weight = inputs(case.shape)
        ours, stock = compiled(case.family)
        ours(x, weight)
        stock(x, weight)
        if case.family.has_rows:
            ours(x[-1:], weight)


class Measured(Suite):
    """Reductions of rows, and softmax and norms, against Inductor."""

    name = "reduction"
    case_seconds = 0.04

    def cases(self) -> Sequence[Case]:
        """Each function on each of its shapes; with ``quick`` on the first."""
        most = 1 if self.settings.quick else None
        return [Case(number, shape) for number, family in enumerate(FAMILIES) for shape in family.shapes[:most]]

    @contextmanager
    def ready(self, cases: Sequence[Case]) -> Iterator[None]:
        """Everything is compiled beforehand, in many processes."""
        warnings.filterwarnings("ignore", message="\\s*Online softmax is disabled")
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
        processes = min(16, os.cpu_count() or 1)
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            for case, done in [(case, pool.submit(prepare, case)) for case in cases]:
                if (error := done.exception()) is not None:
                    print(f"{case}: {error}", flush=True)
        with torch.inference_mode():
            yield

    def measure(self, case: Case) -> list[Row]:
        """Check one function on one shape, and time it."""
        torch._dynamo.reset()
        x, weight = inputs(case.shape)
        ours, stock = compiled(case.family)
        whole = ours(x, weight)
        torch.testing.assert_close(whole, stock(x, weight), rtol=2e-2, atol=2e-2 * whole.abs().max().item())
        same = same_bits(ours(x[-1:], weight), whole[-1:]) if case.family.has_rows else None
        timed = self.in_turns({"ours": lambda: ours(x, weight), "stock": lambda: stock(x, weight)}, rounds=31)
        mine, theirs = timed["ours"].median_us, timed["stock"].median_us
        extra = {"family": case.family.name, "ours_us": mine, "theirs_us": theirs}
        return [Row(str(case), "Inductor", theirs / mine, same, extra)]

    def summarise(self, report: Report) -> None:
        """Geometric mean and worst case of each function."""
        for family in FAMILIES:
            ratios = [row.ratio for row in report.rows if row.extra["family"] == family.name]
            if ratios:
                report.summarise(
                    f"{family.name} / Inductor, geometric mean", statistics.geometric_mean(ratios), family.bar
                )
                report.summarise(f"{family.name} / Inductor, worst", min(ratios))
