"""What does a fixed order cost sums into indexed places?

Times our scatter ops in turns with PyTorch's own: on a GPU as they are (float atomics, but for the embedding) and
under ``torch.use_deterministic_algorithms(True)``, with a cold L2 cache; on a CPU, where they are deterministic, once.
Before timing, values are compared, and bits with those of a second run and of the same call with its destinations
renamed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

import bicompile  # noqa: F401 (registers the ops)
from bicompile.lowering.gpu.admission import equal_bits

from ..results import Report, Row
from ..suite import Suite

ours = torch.ops.bicompile
aten = torch.ops.aten
VOCABULARY, HIDDEN = 128_256, 4096


def zipf(count: int, below: int, device: str) -> Tensor:
    """``count`` indices as words of a language are spread: the logarithm is uniform."""
    return (below ** torch.rand(count, device=device, dtype=torch.float64)).long().clamp(0, below - 1)


def uniform(count: int, below: int, device: str) -> Tensor:
    return torch.randint(0, below, (count,), device=device)


def half_on_one(count: int, below: int, device: str) -> Tensor:
    """Every other contribution goes to one place, as padding does."""
    return torch.where(torch.rand(count, device=device) < 0.5, 7, uniform(count, below, device))


@dataclass(frozen=True)
class Case:
    """One op on one size.

    Attributes:
        name: for the table.
        ours, stock: the calls, of self, index and values.
        sizes: rows of self, contributions, and columns.
        draw: the kind of index.
        dtype: of self and values.
    """

    name: str
    ours: Callable[[Tensor, Tensor, Tensor], Tensor]
    stock: Callable[[Tensor, Tensor, Tensor], Tensor]
    sizes: tuple[int, int, int]
    draw: Callable[[int, int, str], Tensor]
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        rows, count, columns = self.sizes
        return f"{self.name} {rows}x{columns} from {count} in {str(self.dtype).removeprefix('torch.')}"


def _embedding(self: Tensor, index: Tensor, values: Tensor) -> Tensor:
    return ours.embedding_dense_backward(values, index, len(self), -1, False)


def _embedding_stock(self: Tensor, index: Tensor, values: Tensor) -> Tensor:
    return aten.embedding_dense_backward(values, index, len(self), -1, False)


def _index_add(self: Tensor, index: Tensor, values: Tensor) -> Tensor:
    return ours.index_add(self, 0, index, values, 1.0)


def _index_add_stock(self: Tensor, index: Tensor, values: Tensor) -> Tensor:
    return torch.index_add(self, 0, index, values)


def _scatter_add(self: Tensor, index: Tensor, values: Tensor) -> Tensor:
    return ours.scatter_add(self, 0, index, values)


def _scatter_add_stock(self: Tensor, index: Tensor, values: Tensor) -> Tensor:
    return torch.scatter_add(self, 0, index, values)


def cases(scale: int) -> Iterator[Case]:
    """Everything that is timed, on sizes ``scale`` times smaller than those of a GPU."""
    for n, draw in ((16_384, zipf), (16_384, uniform), (16_384, half_on_one), (2048, zipf), (64, uniform)):
        sizes = (VOCABULARY, max(n // scale, 64), HIDDEN // scale)
        yield Case(f"embedding backward {draw.__name__}", _embedding, _embedding_stock, sizes, draw)
    # A mixture of experts puts each token's results back together.
    experts = (4096 // scale, 32_768 // scale, HIDDEN // scale)
    yield Case("index_add of experts", _index_add, _index_add_stock, experts, uniform)
    # Messages along the edges of a graph.
    edges = (100_000 // scale, 1_000_000 // scale, 64)
    yield Case("index_add of edges", _index_add, _index_add_stock, edges, zipf, torch.float32)
    vector = (1000, 1_000_000 // scale, 1)
    yield Case("index_add of a vector", _index_add, _index_add_stock, vector, uniform, torch.float32)
    for rows, columns in ((16, 65_536), (1024, 4096), (65_536, 16)):
        sizes = (rows, rows, columns // scale)
        yield Case("scatter_add", _scatter_add, _scatter_add_stock, sizes, uniform, torch.float32)


class Measured(Suite):
    """Sums into indexed places against PyTorch's own."""

    name = "scatter"
    case_seconds = 0.04

    def cases(self) -> Sequence[Case]:
        """Smaller on a CPU, and with ``quick``."""
        scale = (1 if self.settings.device == "cuda" else 8) * (2 if self.settings.quick else 1)
        return list(cases(scale))

    @contextmanager
    def ready(self, cases: Sequence[Case]) -> Iterator[None]:
        with torch.inference_mode():
            yield

    def measure(self, case: Case) -> list[Row]:
        """Check one case, then time it: a row for each baseline."""
        device = self.settings.device
        if device == "cuda":
            torch.cuda.empty_cache()
        torch.manual_seed(0)
        rows, count, columns = case.sizes
        self_ = torch.zeros(rows, columns, device=device, dtype=case.dtype)
        values = torch.randn(count, columns, device=device).to(case.dtype)
        index = case.draw(count, rows, device)
        if case.ours is _scatter_add:
            index = index[:, None] + torch.arange(columns, device=device) % 3
            index = index.clamp(max=rows - 1)
        same = check(case, self_, index, values)

        def deterministic() -> Tensor:
            torch.use_deterministic_algorithms(True)
            try:
                return case.stock(self_, index, values)
            finally:
                torch.use_deterministic_algorithms(False)

        runs: dict[str, Callable[[], Tensor]] = {
            "ours": lambda: case.ours(self_, index, values),
            "stock": lambda: case.stock(self_, index, values),
        }
        if device == "cuda" and case.stock is not _embedding_stock:  # which is deterministic as it is
            runs["stock, deterministic"] = deterministic
        timed = self.in_turns(runs, rounds=21)
        mine = timed.pop("ours").median_us
        found = []
        for against, timing in timed.items():
            extra = {"ours_us": mine, "theirs_us": timing.median_us}
            found.append(Row(str(case), against, timing.median_us / mine, same, extra))
        return found

    def summarise(self, report: Report) -> None:
        """Geometric means by op and baseline, of the cases measured so far."""
        for family in ("embedding", "index_add", "scatter_add"):
            for against in ("stock", "stock, deterministic"):
                ratios = [row.ratio for row in report.rows if row.case.startswith(family) and row.against == against]
                if ratios:
                    report.summarise(f"{family} / {against}, geometric mean", statistics.geometric_mean(ratios))


def check(case: Case, self: Tensor, index: Tensor, values: Tensor) -> bool:
    """Raise if the values are wrong; say whether a second run and renamed destinations have the same bits."""
    result, rows = case.ours(self, index, values), len(self)
    exact = torch.scatter_add if index.dim() == 2 else torch.index_add
    if rows < 10_000:
        error = (result.double() - exact(self.double(), 0, index, values.double())).abs().max()
        if not error <= 0.05 * result.abs().max():
            raise AssertionError(f"{case}: differs by {error:.1e} from torch")
    same = equal_bits(case.ours(self, index, values), result)
    return same and equal_bits(case.ours(self.flip(0), rows - 1 - index, values).flip(0), result)
