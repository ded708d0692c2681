"""Are softmax, norms and reductions on a GPU slower for being batch-invariant?

    python examples/benchmarks/bench_reduction_gpu.py [--only layer_norm] [--ms 40] [--seconds 600] [--no-write]

Compiles each function with this backend and with stock Inductor, and times both in turns with a cold L2 cache; a ratio
above 1 says that ours is faster.  Before timing, values are compared, and the last row alone with the same row in its
batch, bit for bit.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
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


def prepare(number: int, shape: tuple[int, int]) -> None:
    """Compile what one case needs, in a process of its own; the compilers keep it on disk."""
    family = FAMILIES[number]
    with torch.inference_mode():
        x, weight = inputs(shape)
        ours, stock = compiled(family)
        ours(x, weight)
        stock(x, weight)
        if family.has_rows:
            ours(x[-1:], weight)


def measure(family: Family, shape: tuple[int, int], ms: float) -> Row:
    """Check one function on one shape, time it and print a line."""
    x, weight = inputs(shape)
    ours, stock = compiled(family)
    whole = ours(x, weight)
    torch.testing.assert_close(whole, stock(x, weight), rtol=2e-2, atol=2e-2 * whole.abs().max().item())
    same = same_bits(ours(x[-1:], weight), whole[-1:]) if family.has_rows else None
    timed = gpu_interleaved({"ours": lambda: ours(x, weight), "stock": lambda: stock(x, weight)}, ms=ms, rounds=31)
    mine, theirs = timed["ours"].median_us, timed["stock"].median_us
    name = f"{family.name} {shape[0]}x{shape[1]} bfloat16"
    print(f"{name:32s} ours {mine:8.1f} us  Inductor {theirs:8.1f} us  ratio {theirs / mine:5.2f}  {same}", flush=True)
    return Row(name, "Inductor", theirs / mine, same, {"ours_us": mine, "theirs_us": theirs})


def summarise(report: Report, family: Family) -> None:
    """Add or renew the headline figures of one function."""
    ratios = [row.ratio for row in report.rows if row.case.startswith(f"{family.name} ")]
    report.summarise(f"{family.name} / Inductor, geometric mean", statistics.geometric_mean(ratios), family.bar)
    report.summarise(f"{family.name} / Inductor, worst", min(ratios))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only functions whose name has this in it")
    parser.add_argument("--ms", type=float, default=40.0, help="how many milliseconds of calls to time in each case")
    parser.add_argument("--seconds", type=float, default=600.0, help="start no case after timing for so long")
    parser.add_argument("--processes", type=int, default=min(16, os.cpu_count() or 1), help="to compile in beforehand")
    parser.add_argument("--no-write", action="store_true", help="print only")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="\\s*Online softmax is disabled")
    families = [(i, family) for i, family in enumerate(FAMILIES) if args.only in family.name]
    cases = [(i, shape) for i, family in families for shape in family.shapes]
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
        for case, done in [(case, pool.submit(prepare, *case)) for case in cases]:
            if (error := done.exception()) is not None:
                print(f"{FAMILIES[case[0]].name} {case[1]}: {error}", flush=True)
    report, end = Report("reduction", "cuda"), time.monotonic() + args.seconds
    with torch.inference_mode():
        for i, shape in cases:
            if time.monotonic() > end:
                print(f"out of time before {FAMILIES[i].name} {shape}")
                break
            torch._dynamo.reset()
            report.rows.append(measure(FAMILIES[i], shape, args.ms))
            summarise(report, FAMILIES[i])
            if not args.no_write:
                report.write()
    for name, entry in report.summary.items():
        print(f"{name}: {entry['value']} (bar {entry['bar']})")
    if not args.no_write:
        print(report.path)


if __name__ == "__main__":
    main()
