"""How fast is a batch-invariant matrix product on this CPU, next to torch's own (MKL and oneDNN)?

Single products against eager, for each dtype, layout and shape.  Weights are cold: each call takes the next of several
copies, together larger than the last cache.  Then a feed-forward block of SmolLM2 over the number of its rows, compiled
by each compiler for dynamic shapes, against eager and Inductor.  Before a case is timed, its values are checked
against fp64 and its rows for the same bits alone and in the batch.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import bicompile
import bicompile.lowering.matmul.op  # registers the ops
from bicompile.testing import same_bits

from ..results import Report, Row
from ..suite import Suite
from ..timing import Comparison, rotate

ROWS = (1, 4, 16, 64, 256, 1024)
SWEEP = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
SHAPES = ((576, 1536), (1536, 576), (4096, 4096))  # K, N: SmolLM2's feed-forward, and a large one
HEAD = (576, 49152)  # SmolLM2's tied embedding
COLD_BYTES = 80_000_000  # more than twice the last cache


@dataclass(frozen=True)
class Case:
    """Products of one shape: ``linear`` weights are ``[N, K]`` as in ``nn.Linear``, ``plain`` ones ``[K, N]``."""

    dtype: torch.dtype
    layout: str
    batch: int
    rows: int
    depth: int
    columns: int

    @property
    def group(self) -> str:
        """What is summarised together."""
        return f"{_name(self.dtype)} {self.layout}"

    @property
    def series(self) -> str:
        """The name without the number of rows."""
        batch = f" B={self.batch}" if self.layout == "bmm" else ""
        return f"{self.group}{batch} K={self.depth} N={self.columns}"

    def __str__(self) -> str:
        batch = f"B={self.batch} " if self.layout == "bmm" else ""
        return f"{self.group} {batch}M={self.rows} K={self.depth} N={self.columns}"

    def operands(self) -> tuple[Tensor, list[Tensor]]:
        """The left operand, and copies enough of the right one for every call to find it cold."""
        bytes_each = self.batch * self.depth * self.columns * self.dtype.itemsize
        copies = max(2, min(64, COLD_BYTES // bytes_each + 1))
        x = torch.randn(self.batch, self.rows, self.depth, dtype=self.dtype)
        shape = (self.columns, self.depth) if self.layout == "linear" else (self.depth, self.columns)
        weights = [torch.randn(self.batch, *shape, dtype=self.dtype) for _ in range(copies)]
        if self.layout == "bmm":
            return x, weights
        return x[0], [weight[0].t() if self.layout == "linear" else weight[0] for weight in weights]


@dataclass(frozen=True)
class Block:
    """SmolLM2's feed-forward block on ``rows`` tokens."""

    dtype: torch.dtype
    rows: int

    @property
    def group(self) -> str:
        """What is summarised together."""
        return f"{_name(self.dtype)} feed-forward"

    series = "576 -> 1536 -> 576"

    def __str__(self) -> str:
        return f"{self.group} {self.series} M={self.rows}"

    def operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The tokens ``[rows, 576]``, and the weights of gate, up and down."""
        shapes = ((self.rows, 576), (1536, 576), (1536, 576), (576, 1536))
        x, *weights = (torch.randn(shape, dtype=torch.float32) for shape in shapes)
        gate, up, down = (weight / weight.shape[1] ** 0.5 for weight in weights)
        return x.to(self.dtype), gate.to(self.dtype), up.to(self.dtype), down.to(self.dtype)


def feed_forward(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """As the Llama models have it."""
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def cases(quick: bool) -> list[Case | Block]:
    """Everything that is timed, the headline first."""
    found: list[Case | Block] = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for layout in ("linear", "plain"):
            rows = ROWS if layout == "linear" and not quick else (1, 4, 64) if quick else (1, 4, 16, 256)
            for depth, columns in SHAPES[:1] if quick else SHAPES if layout == "linear" else SHAPES[::2]:
                found += [
                    Case(dtype, layout, 1, m, depth, columns) for m in rows if _is_feasible(dtype, layout, m, depth)
                ]
        if not quick and dtype != torch.float16:
            found += [Case(dtype, "linear", 1, m, *HEAD) for m in (1, 4, 8)]
        found += [Case(dtype, "bmm", 72, 32, 64, 32), Case(dtype, "bmm", 9, 128, 64, 128)]
    for dtype in (torch.float32, torch.bfloat16):
        found += [Block(dtype, m) for m in (SWEEP[::6] if quick else SWEEP)]
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_feasible(dtype: torch.dtype, layout: str, rows: int, depth: int) -> bool:
    """Whether stock takes less than a second for a call: it has no fast kernel for float16 on many CPUs."""
    return dtype != torch.float16 or rows <= 4 or (layout == "linear" and rows * depth <= 64 * 4096)


def check(case: Case, ours: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor) -> bool:
    """Raise if the values are wrong; say whether single rows have the bits that they have in the batch."""
    columns = slice(0, 512)
    got, stock = ours(x, weight), torch.matmul(x, weight)
    exact = x.double() @ weight[..., columns].double()
    error, theirs = ((y[..., columns].double() - exact).norm() / exact.norm() for y in (got, stock))
    if not error <= 2 * theirs + torch.finfo(case.dtype).eps / 1024:
        raise AssertionError(f"{case}: error {error:.2e} against fp64, stock {theirs:.2e}")
    some = {0, case.rows // 2, case.rows - 1}
    return all(same_bits(ours(x[..., i : i + 1, :], weight), got[..., i : i + 1, :]) for i in some)


class Measured(Suite):
    """Products against eager, and a feed-forward block against eager and Inductor."""

    name = "matmul"
    case_seconds = 1.5
    sweep = "rows"

    def cases(self) -> Sequence[Case | Block]:
        """Everything that is timed, the headline first."""
        return cases(self.settings.quick)

    def measure(self, case: Case | Block) -> list[Row]:
        """Check one case, then time it."""
        return self._products(case) if isinstance(case, Case) else self._blocks(case)

    def _products(self, case: Case) -> list[Row]:
        ours = torch.ops.bicompile.bmm.default if case.layout == "bmm" else torch.ops.bicompile.mm.default
        theirs = torch.bmm if case.layout == "bmm" else torch.mm
        x, weights = case.operands()
        same = check(case, ours, x, weights[0])
        pairs = [(x, weight) for weight in weights]
        return self._rows(case, same, {"ours": rotate(ours, pairs), "torch eager": rotate(theirs, pairs)})

    @torch.inference_mode()
    def _blocks(self, case: Block) -> list[Row]:
        ours, inductor = _compiled("batch_invariant"), _compiled("inductor")
        operands = case.operands()
        got, exact = ours(*operands), feed_forward(*(t.double() for t in operands))
        error, theirs = ((y.double() - exact).norm() / exact.norm() for y in (got, feed_forward(*operands)))
        if not error <= 2 * theirs:
            raise AssertionError(f"{case}: error {error:.2e} against fp64, stock {theirs:.2e}")
        x, *weights = operands
        some = {0, case.rows // 2, case.rows - 1}
        same = all(same_bits(ours(x[i : i + 1], *weights), got[i : i + 1]) for i in some)
        functions = {"ours": ours, "torch eager": feed_forward, "Inductor": inductor}
        return self._rows(case, same, {name: functools.partial(f, *operands) for name, f in functions.items()})

    def _rows(self, case: Case | Block, same: bool, runs: dict[str, Callable[[], object]]) -> list[Row]:
        timings, rows = self.in_turns(runs, rounds=21), []
        for against in list(runs)[1:]:
            found = Comparison(timings["ours"], timings[against])
            low, high = found.ratio_spread
            extra = {"group": case.group, "series": case.series, "rows": case.rows}
            extra |= {"ours_us": found.ours.median_us, "theirs_us": found.theirs.median_us}
            rows.append(Row(str(case), against, found.ratio, same, extra | {"ratio_low": low, "ratio_high": high}))
        return rows

    def summarise(self, report: Report) -> None:
        """Lowest ratio and geometric mean of each dtype and layout."""
        groups: dict[str, list[float]] = {}
        for row in report.rows:
            against = " / Inductor" if row.against == "Inductor" else ""
            groups.setdefault(row.extra["group"] + against, []).append(row.ratio)
        bars = {"float32 linear": 0.9, "bfloat16 linear": 0.9}
        for group, ratios in groups.items():
            report.summarise(f"{group}: lowest ratio", min(ratios), bars.get(group))
            report.summarise(f"{group}: geometric mean", statistics.geometric_mean(ratios))


@functools.cache
def _compiled(backend: str) -> Callable[..., Tensor]:
    """The block, in one graph for all numbers of rows but one row."""
    return torch.compile(feed_forward, backend=backend, dynamic=True)


assert bicompile  # registers the backend's name where the package is not installed
