"""How fast is a batch-invariant matrix product on this GPU, next to torch's own (cuBLAS)?

    python examples/benchmarks/bench_matmul_gpu.py                 # two minutes; rewrites results/<device>/matmul.json
    python examples/benchmarks/bench_matmul_gpu.py --seconds 50    # stops then, and writes what it has
    python examples/benchmarks/bench_matmul_gpu.py --quick         # fewer sizes; writes nothing

Prints one line for each case: medians of calls that took turns, with a cold L2 cache, and the ratio of their times
(above 1: we are faster).  Before a case is timed, its values are checked against torch's, and its rows for the same
bits alone, in the batch, permuted and misaligned.  Shapes named "other" were not
looked at when schedules were first chosen.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a bare checkout

import bicompile.lowering.matmul.op  # noqa: E402, F401  registers the ops
from bicompile.bench import Report, Row, gpu_interleaved  # noqa: E402
from bicompile.testing import same_bits  # noqa: E402

ROWS = (1, 8, 16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192)
LLAMA_8B = ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096))  # K, N; Mistral-7B has the same
OTHERS = {
    "Qwen3-0.6B": ((1024, 4096), (2048, 1024), (1024, 6144), (3072, 1024)),
    "Qwen3-8B": ((4096, 24576), (12288, 4096)),
    "Mistral-7B head": ((4096, 32768),),
}
GPT2 = ((768, 2304), (768, 768), (768, 3072), (3072, 768))  # with bias, weights [K, N]

ops = torch.ops.bicompile


@dataclass(frozen=True)
class Case:
    """``x @ weight (+ bias)`` for one model, shape and number of rows."""

    group: str
    model: str
    dtype: torch.dtype
    rows: int
    depth: int
    columns: int
    bias: bool = False

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"{name} {self.model} {self.depth}->{self.columns} M={self.rows}"

    def operands(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """``x``, the weight as ``[K, N]``, and the bias."""
        options = {"device": "cuda", "dtype": self.dtype}
        x = torch.randn(self.rows, self.depth, **options)
        if self.bias:
            return x, torch.randn(self.depth, self.columns, **options), torch.randn(self.columns, **options)
        return x, torch.randn(self.columns, self.depth, **options).t(), None


def cases(quick: bool) -> list[Case]:
    """Everything that is timed, the headline first."""
    rows = (1, 16, 64, 256, 2048) if quick else ROWS
    found = [Case("bfloat16", "Llama-8B", torch.bfloat16, m, k, n) for k, n in LLAMA_8B for m in rows]
    found += [Case("other shapes", "GPT-2", torch.bfloat16, m, k, n, bias=True) for k, n in GPT2 for m in rows]
    for model, shapes in OTHERS.items():
        found += [Case("other shapes", model, torch.bfloat16, m, k, n) for k, n in shapes for m in rows]
    return found + [Case("float16", "Llama-8B", torch.float16, m, k, n) for k, n in LLAMA_8B for m in rows]


def ours(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product by our op."""
    return ops.mm(x, weight) if bias is None else ops.addmm(bias, x, weight, 1.0, 1.0)


def stock(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product by torch's op."""
    return torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)


def check(case: Case, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Raise if the values are wrong; say whether rows keep their bits alone, in parts, permuted and misaligned."""
    got, wanted = ours(x, weight, bias), stock(x, weight, bias).float()
    error = float((got.float() - wanted).norm() / wanted.norm())
    if not error <= 4 * torch.finfo(case.dtype).eps:
        raise AssertionError(f"{case}: differs by {error:.1e} from torch")
    order = torch.randperm(case.rows, device="cuda")
    same = [same_bits(ours(x[order], weight, bias), got[order])]
    for m in {1, case.rows // 2, case.rows - 1} - {0, case.rows}:
        same.append(same_bits(ours(x[:m], weight, bias), got[:m]))
    few = x[-min(case.rows, 40) :]
    shifted = torch.empty(few.numel() + 1, dtype=x.dtype, device="cuda")[1:].view_as(few).copy_(few)
    same.append(same_bits(ours(shifted, weight, bias), got[-len(few) :]))
    return all(same)


def compile_beforehand(wanted: list[Case]) -> None:
    """Run the cases of few rows once, in many processes: compiled kernels and verdicts stay on disk."""
    groups: dict[tuple[object, ...], list[Case]] = {}
    for case in wanted:
        if case.rows <= 256:
            groups.setdefault((case.dtype, case.depth, case.columns, case.bias), []).append(case)
    with multiprocessing.get_context("spawn").Pool(min(14, os.cpu_count() or 1, len(groups))) as pool:
        pool.map(_run, groups.values(), chunksize=1)


def _run(group: list[Case]) -> None:
    for case in group:
        ours(*case.operands())
    torch.cuda.synchronize()


def measure(case: Case, ms: float) -> Row:
    """Check one case, then time it."""
    x, weight, bias = case.operands()
    same = check(case, x, weight, bias)

    def timed(product: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return lambda: product(x, weight, bias)

    timings = gpu_interleaved({"ours": timed(ours), "theirs": timed(stock)}, ms=ms)
    ours_us, theirs_us = timings["ours"].median_us, timings["theirs"].median_us
    extra = {"group": case.group, "rows": case.rows, "bias": case.bias, "ours_us": ours_us, "theirs_us": theirs_us}
    return Row(str(case), "torch eager (cuBLAS)", theirs_us / ours_us, same, extra)


def summarise(report: Report, total: int) -> None:
    """The headline figures of what was measured, out of ``total`` cases, and their bars."""

    def ratios(group: str, most: float = math.inf) -> list[float]:
        return [row.ratio for row in report.rows if row.extra["group"] == group and row.extra["rows"] <= most]

    for group, mean, lowest in (("bfloat16", 0.97, 0.85), ("float16", 0.93, None), ("other shapes", 0.93, None)):
        if ratios(group):
            report.summarise(f"{group}: geometric mean", _mean(ratios(group)), mean)
            report.summarise(f"{group}: lowest", min(ratios(group)), lowest)
    if ratios("bfloat16", 64):
        report.summarise("bfloat16, up to 64 rows: geometric mean", _mean(ratios("bfloat16", 64)), 1.0)
    if biased := [row.ratio for row in report.rows if row.extra["bias"]]:
        report.summarise("with bias: geometric mean", _mean(biased))
    report.summarise("cases measured", len(report.rows), float(total))
    report.summarise("same bits: share of cases", sum(bool(r.same_bits) for r in report.rows) / len(report.rows), 1.0)


def _mean(ratios: list[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer sizes, and no result file")
    parser.add_argument("--ms", type=float, default=20.0, help="milliseconds of calls for each case")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no case after that")
    arguments = parser.parse_args()
    started = time.monotonic()
    compile_beforehand(cases(arguments.quick))
    torch.manual_seed(0)
    report = Report("matmul", "cuda")
    print(f"{'case':52} {'ours us':>9} {'torch us':>9} {'ratio':>6}  same bits")
    wanted = cases(arguments.quick)
    for case in wanted:
        if time.monotonic() - started > arguments.seconds:
            print(f"stopped after {len(report.rows)} of {len(wanted)} cases")
            break
        row = measure(case, arguments.ms)
        report.rows.append(row)
        if not arguments.quick and len(report.rows) % 25 == 0:  # so that a run that is cut off leaves something
            summarise(report, len(wanted))
            report.write()
        times = f"{row.extra['ours_us']:9.1f} {row.extra['theirs_us']:9.1f} {row.ratio:6.2f}"
        print(f"{row.case:52} {times}  {'yes' if row.same_bits else 'NO'}", flush=True)
    summarise(report, len(wanted))
    for name, entry in report.summary.items():
        bar = "" if entry["bar"] is None else f"   (bar {entry['bar']})"
        print(f"{name:44} {entry['value']:.3f}{bar}")
    if not arguments.quick:
        print(f"written: {report.write()}")
    return 0 if all(row.same_bits for row in report.rows) else 1


if __name__ == "__main__":
    sys.exit(main())
