"""Are row reductions, softmax and layer norm slower for being batch-invariant?

    python examples/benchmarks/bench_reduction.py [--seconds 0.3] [--threads 2] [--no-write]

Times each op against stock eager, in turns, caches warm; a ratio above 1 says that ours is faster.  Before timing, the
values are compared, and one row alone with the same row in its batch, bit for bit.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import bicompile.lowering  # noqa: F401 (defines the ops)
from bicompile.bench.results import Report, Row
from bicompile.bench.timing import compare
from bicompile.testing import same_bits

aten, ours = torch.ops.aten, torch.ops.bicompile
HIDDEN = [(1, 576), (8, 576), (512, 576), (1, 4096), (8, 4096), (512, 4096)]
LOGITS = [(1, 49152), (8, 49152), (512, 512), (4096, 128)]
SUMS = [(512, 4096), (1, 49152)]


@dataclass(frozen=True)
class Case:
    """One op on one shape: the input, ours and stock on it, and whether its rows are those of the result."""

    family: str
    name: str
    x: Tensor
    ours: Callable[[Tensor], Tensor]
    stock: Callable[[Tensor], Tensor]
    has_rows: bool = True


def cases(dtype: torch.dtype) -> Iterator[Case]:
    """Every case of one dtype."""
    for m, n in HIDDEN:
        x, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((m, n), (n,), (n,)))
        yield Case("rms", f"mean_square {m}x{n}", x, _mean_square, lambda x: x.float().pow(2).mean(-1, True))
        yield Case(
            "layer_norm",
            f"layer_norm {m}x{n}",
            x,
            lambda x, w=weight, b=bias: ours.layer_norm.default(x, 1, w, b, 1e-5)[0],
            lambda x, w=weight, b=bias: aten.native_layer_norm.default(x, w.shape, w, b, 1e-5)[0],
        )
    for m, n in LOGITS:
        x = torch.randn(m, n).to(dtype)
        for log, stock in ((False, aten._softmax.default), (True, aten._log_softmax.default)):
            yield Case(
                "softmax",
                f"{'log_' * log}softmax {m}x{n}",
                x,
                lambda x, log=log: ours.softmax.default(x, -1, log, x.dtype),
                lambda x, stock=stock: stock(x, -1, False),
            )
    for m, n in SUMS:
        x = torch.randn(m, n).to(dtype)
        for name in ("sum", "mean"):
            for dim in (0, 1):
                yield Case(
                    "sum",
                    f"{name} of dim {dim} of {m}x{n}",
                    x,
                    lambda x, name=name, dim=dim: getattr(ours, name).default(x, [dim], False, x.dtype),
                    lambda x, name=name, dim=dim: getattr(torch, name)(x, dim),
                    has_rows=dim == 1,
                )


def _mean_square(x: Tensor) -> Tensor:
    return ours.mean_square.default(x, [-1], True, torch.float32)


def measure(case: Case, seconds: float) -> Row:
    """Check ``case``, time it and print a line."""
    whole = case.ours(case.x)
    tolerance = {torch.bfloat16: 4e-2, torch.float32: 1e-4}[case.x.dtype]
    torch.testing.assert_close(whole, case.stock(case.x), rtol=tolerance, atol=tolerance)
    rows = range(0, len(case.x), max(1, len(case.x) // 8)) if case.has_rows else ()
    same = all(same_bits(case.ours(case.x[row : row + 1])[0], whole[row]) for row in rows)
    timed = compare(lambda: case.ours(case.x), lambda: case.stock(case.x), seconds=seconds)
    name = f"{case.name} {str(case.x.dtype).removeprefix('torch.')}"
    low, high = timed.ratio_spread
    print(
        f"{name:34s} ours {timed.ours.median_us:9.1f} us  eager {timed.theirs.median_us:9.1f} us  "
        f"ratio {timed.ratio:5.2f} ({low:.2f} to {high:.2f})",
        flush=True,
    )
    extra = {"ours_us": timed.ours.median_us, "theirs_us": timed.theirs.median_us}
    return Row(name, "eager", timed.ratio, same if case.has_rows else None, extra)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.3, help="how long to time each case")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-write", action="store_true", help="print only")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    report, ratios = Report("reduction"), dict[str, list[float]]()
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            for case in cases(dtype):
                row = measure(case, args.seconds)
                report.rows.append(row)
                ratios.setdefault(case.family, []).append(row.ratio)
    for family, values in ratios.items():
        report.summarise(f"{family}, geometric mean of ratios to eager", statistics.geometric_mean(values), 1.0)
    for name, entry in report.summary.items():
        print(f"{name}: {entry['value']} (bar {entry['bar']})")
    if not args.no_write:
        print(report.write())


if __name__ == "__main__":
    main()
