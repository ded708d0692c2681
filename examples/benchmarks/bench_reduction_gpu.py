"""Are softmax, norms and reductions on a GPU slower for being batch-invariant?

    python examples/benchmarks/bench_reduction_gpu.py [--only layer_norm] [--ms 40] [--no-write]

Compiles each function with this backend and with stock Inductor, and times both in turns with a cold L2 cache; a ratio
above 1 says that ours is faster.  Inductor compiles for the very shape, ours for any.  Before timing, values are
compared, and rows alone with the same rows in their batch, bit for bit.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor

import bicompile  # noqa: F401 (registers the backend)
from bicompile.bench.gpu_timing import gpu_interleaved
from bicompile.bench.results import Report, Row
from bicompile.testing import same_bits

BAR = 0.95
HIDDEN = [(1, 1024), (8192, 1024), (1, 4096), (64, 4096), (4096, 4096), (1, 8192), (64, 8192), (4096, 8192)]
LOGITS = [(1, 32_000), (4096, 32_000), (16, 50_257), (1024, 50_257), (1, 128_256), (64, 128_256), (1024, 152_064)]
SCORES = [(4096, 1024), (100_000, 128)]


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


FAMILIES = (
    Family(rms_norm, HIDDEN),
    Family(layer_norm, [*HIDDEN, (1024, 50_257)]),
    Family(softmax, [*LOGITS, *SCORES]),
    Family(log_softmax, LOGITS),
    Family(row_sum, [(1, 152_064), (4096, 4096), (1_000_000, 128)], bar=None),
    Family(column_sum, [(4096, 4096), (65_536, 1024), (1_000_000, 64)], bar=None, has_rows=False),
)


def measure(family: Family, ours: Callable[..., Tensor], shape: tuple[int, int], ms: float) -> Row:
    """Check one function on one shape, time it and print a line."""
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(shape, generator=generator, device="cuda").bfloat16()
    weight = torch.randn(shape[1], generator=generator, device="cuda").bfloat16()
    stock = torch.compile(family.run, dynamic=False)
    whole = ours(x, weight)
    torch.testing.assert_close(whole, stock(x, weight), rtol=2e-2, atol=2e-2 * whole.abs().max().item())
    same = None
    if family.has_rows:
        last = shape[0] - 1
        same = same_bits(ours(x[last:], weight)[0], whole[last])
        same &= same_bits(ours(x[: min(3, shape[0])], weight), whole[:3])
    timed = gpu_interleaved({"ours": lambda: ours(x, weight), "stock": lambda: stock(x, weight)}, ms=ms, rounds=51)
    mine, theirs = timed["ours"].median_us, timed["stock"].median_us
    name = f"{family.run.__name__} {shape[0]}x{shape[1]}"
    print(f"{name:28s} ours {mine:8.1f} us  Inductor {theirs:8.1f} us  ratio {theirs / mine:5.2f}", flush=True)
    return Row(name, "Inductor", theirs / mine, same, {"ours_us": mine, "theirs_us": theirs})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only functions whose name has this in it")
    parser.add_argument("--ms", type=float, default=40.0, help="how many milliseconds of calls to time in each case")
    parser.add_argument("--no-write", action="store_true", help="print only")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="\\s*Online softmax is disabled")
    report = Report("reduction", "cuda")
    with torch.inference_mode():
        for family in FAMILIES:
            if args.only not in family.run.__name__:
                continue
            torch._dynamo.reset()
            ours = torch.compile(family.run, backend="batch_invariant", dynamic=True)
            rows = []
            for shape in family.shapes:
                torch.cuda.empty_cache()
                rows.append(measure(family, ours, shape, args.ms))
            report.rows += rows
            ratios = [row.ratio for row in rows]
            name = family.run.__name__
            report.summarise(f"{name} / Inductor, geometric mean", statistics.geometric_mean(ratios), family.bar)
            report.summarise(f"{name} / Inductor, worst", min(ratios), None)
    for name, entry in report.summary.items():
        print(f"{name}: {entry['value']} (bar {entry['bar']})")
    if not args.no_write:
        print(report.write())


if __name__ == "__main__":
    main()
