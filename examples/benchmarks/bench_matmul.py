"""How fast is a batch-invariant matrix product on this CPU, next to torch's own (MKL and oneDNN)?

    python examples/benchmarks/bench_matmul.py            # a few minutes; rewrites results/<device>/matmul.json
    python examples/benchmarks/bench_matmul.py --quick    # under a minute; writes nothing

Prints one line for each dtype, layout and shape: medians of calls that took turns, and the ratio of their times
(above 1: we are faster).  Weights are cold: each call takes the next of several copies, together larger than the
last cache.
Before a case is timed, its values are checked against fp64 and its rows for the same bits alone and in the batch.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a bare checkout

import bicompile  # noqa: E402, F401
import bicompile.lowering.matmul.op  # noqa: E402, F401  registers the ops
from bicompile.bench import Comparison, Report, Row, compare, rotate  # noqa: E402
from bicompile.testing import same_bits  # noqa: E402

ROWS = (1, 4, 16, 64, 256, 1024)
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
        return f"{str(self.dtype).removeprefix('torch.')} {self.layout}"

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


def cases(quick: bool) -> list[Case]:
    """Everything that is timed, the headline first."""
    found = []
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
    return found


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


def measure(case: Case, seconds: float) -> tuple[Comparison, bool]:
    """Check one case, then time it."""
    ours = torch.ops.bicompile.bmm.default if case.layout == "bmm" else torch.ops.bicompile.mm.default
    theirs = torch.bmm if case.layout == "bmm" else torch.mm
    x, weights = case.operands()
    same = check(case, ours, x, weights[0])
    pairs = [(x, weight) for weight in weights]
    return compare(rotate(ours, pairs), rotate(theirs, pairs), seconds=seconds, rounds=21), same


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer shapes, shorter, and no result file")
    parser.add_argument("--seconds", type=float, help="time for each case (default 1.5, quick 0.3)")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    report = Report("matmul")
    groups: dict[str, list[float]] = {}
    print(f"{'case':44} {'ours us':>10} {'torch us':>10} {'ratio':>6}  quartiles    same bits")
    for case in cases(arguments.quick):
        timing, same = measure(case, arguments.seconds or (0.3 if arguments.quick else 1.5))
        low, high = timing.ratio_spread
        ours_us, theirs_us = timing.ours.median_us, timing.theirs.median_us
        print(
            f"{case!s:44} {ours_us:10.1f} {theirs_us:10.1f} {timing.ratio:6.2f}  {low:.2f} to {high:.2f}"
            f"  {'yes' if same else 'NO'}",
            flush=True,
        )
        extra = {"ours_us": ours_us, "theirs_us": theirs_us, "ratio_low": low, "ratio_high": high}
        report.rows.append(Row(str(case), "torch eager", timing.ratio, same, extra))
        groups.setdefault(case.group, []).append(timing.ratio)
    bars = {"float32 linear": 0.9, "bfloat16 linear": 0.9}
    for group, ratios in groups.items():
        report.summarise(f"{group}: lowest ratio", min(ratios), bars.get(group))
        report.summarise(f"{group}: geometric mean", math.exp(sum(map(math.log, ratios)) / len(ratios)))
    for name, entry in report.summary.items():
        bar = "" if entry["bar"] is None else f"   (bar {entry['bar']})"
        print(f"{name:40} {entry['value']:.2f}{bar}")
    if not arguments.quick:
        print(f"written: {report.write()}")
    return 0 if all(row.same_bits for row in report.rows) else 1


if __name__ == "__main__":
    sys.exit(main())
