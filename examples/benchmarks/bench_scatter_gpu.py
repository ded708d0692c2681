"""What does a fixed order cost sums into indexed places on a GPU?

    python examples/benchmarks/bench_scatter_gpu.py [--only embedding] [--ms 40] [--no-write]

Times our scatter ops in turns with PyTorch's own, as they are (float atomics, but for the embedding) and under
``torch.use_deterministic_algorithms(True)``, with a cold L2 cache; a ratio above 1 says that ours is faster.  Before
timing, values are compared, and bits with those of a second run and of the same call with its destinations renamed.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import bicompile  # noqa: F401 (registers the ops)
from bicompile.bench import Report, Row, gpu_interleaved
from bicompile.lowering.gpu.admission import equal_bits

ours = torch.ops.bicompile
aten = torch.ops.aten
VOCABULARY, HIDDEN = 128_256, 4096


def zipf(count: int, below: int) -> Tensor:
    """``count`` indices as words of a language are spread: the logarithm is uniform."""
    return (below ** torch.rand(count, device="cuda", dtype=torch.float64)).long().clamp(0, below - 1)


def uniform(count: int, below: int) -> Tensor:
    return torch.randint(0, below, (count,), device="cuda")


def half_on_one(count: int, below: int) -> Tensor:
    """Every other contribution goes to one place, as padding does."""
    return torch.where(torch.rand(count, device="cuda") < 0.5, 7, uniform(count, below))


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
    draw: Callable[[int, int], Tensor]
    dtype: torch.dtype = torch.bfloat16


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


CASES = (
    *(
        Case(f"embedding backward {draw.__name__}", _embedding, _embedding_stock, (VOCABULARY, n, HIDDEN), draw)
        for n, draw in ((16_384, zipf), (16_384, uniform), (16_384, half_on_one), (2048, zipf), (64, uniform))
    ),
    # A mixture of experts puts each token's results back together.
    Case("index_add of experts", _index_add, _index_add_stock, (4096, 32_768, HIDDEN), uniform),
    # Messages along the edges of a graph.
    Case("index_add of edges", _index_add, _index_add_stock, (100_000, 1_000_000, 64), zipf, torch.float32),
    Case("index_add of a vector", _index_add, _index_add_stock, (1000, 1_000_000, 1), uniform, torch.float32),
    *(
        Case("scatter_add", _scatter_add, _scatter_add_stock, sizes, uniform, torch.float32)
        for sizes in ((16, 16, 65_536), (1024, 1024, 4096), (65_536, 65_536, 16))
    ),
)


def measure(case: Case, ms: float) -> list[Row]:
    """Check one case, time it and print a line for each baseline."""
    torch.manual_seed(0)
    rows, count, columns = case.sizes
    self = torch.zeros(rows, columns, device="cuda", dtype=case.dtype)
    values = torch.randn(count, columns, device="cuda").to(case.dtype)
    index = case.draw(count, rows)
    if case.ours is _scatter_add:
        index = index[:, None] + torch.arange(columns, device="cuda") % 3
        index = index.clamp(max=rows - 1)
    result = case.ours(self, index, values)
    exact = torch.scatter_add if index.dim() == 2 else torch.index_add
    error = (result.double() - exact(self.double(), 0, index, values.double())).abs().max() if rows < 10_000 else None
    assert error is None or error <= 0.05 * result.abs().max(), error
    same = equal_bits(case.ours(self, index, values), result)
    same &= equal_bits(case.ours(self.flip(0), rows - 1 - index, values).flip(0), result)

    def deterministic() -> Tensor:
        torch.use_deterministic_algorithms(True)
        try:
            return case.stock(self, index, values)
        finally:
            torch.use_deterministic_algorithms(False)

    runs: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: case.ours(self, index, values),
        "stock": lambda: case.stock(self, index, values),
    }
    if case.stock is not _embedding_stock:  # which is deterministic as it is
        runs["stock, deterministic"] = deterministic
    timed = gpu_interleaved(runs, ms=ms, rounds=21)
    name = f"{case.name} {rows}x{columns} from {count} in {str(case.dtype).removeprefix('torch.')}"
    mine = timed.pop("ours").median_us
    found = []
    for against, timing in timed.items():
        theirs = timing.median_us
        print(f"{name:68s} ours {mine:8.1f} us  {against:20s} {theirs:9.1f} us  ratio {theirs / mine:5.2f}", flush=True)
        found.append(Row(name, against, theirs / mine, same, {"ours_us": mine, "theirs_us": theirs}))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only cases whose name has this in it")
    parser.add_argument("--ms", type=float, default=40.0, help="how many milliseconds of calls to time in each case")
    parser.add_argument("--no-write", action="store_true", help="print only")
    args = parser.parse_args()
    report = Report("scatter", "cuda")
    with torch.inference_mode():
        for case in CASES:
            if args.only in case.name:
                torch.cuda.empty_cache()
                report.rows += measure(case, args.ms)
                summarise(report)
                if not args.no_write:  # after every case: what is measured is not lost if time runs out
                    report.write()
    for name, entry in report.summary.items():
        print(f"{name}: {entry['value']}")
    if not args.no_write:
        print(report.path)


def summarise(report: Report) -> None:
    """Geometric means by op and baseline, of the cases measured so far."""
    for family in ("embedding", "index_add", "scatter_add"):
        for against in ("stock", "stock, deterministic"):
            ratios = [row.ratio for row in report.rows if row.case.startswith(family) and row.against == against]
            if ratios:
                report.summarise(f"{family} / {against}, geometric mean", statistics.geometric_mean(ratios))


if __name__ == "__main__":
    main()
