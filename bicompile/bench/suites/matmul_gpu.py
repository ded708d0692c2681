"""How fast is a batch-invariant matrix product on this GPU, next to torch's own (cuBLAS)?

And next to one fixed tile for every number of rows, which is how batch invariance is had elsewhere.  Medians of calls
that took turns, with a cold L2 cache.  Before a case is timed, its values are checked against torch's, and its rows
for the same bits alone, in the batch, permuted and misaligned.  Shapes named "other" were not looked at when schedules
were first chosen.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import bicompile.lowering.matmul.op  # noqa: F401  registers the ops
from bicompile.lowering.matmul.problem import problem_of
from bicompile.lowering.matmul.schedule import TileSchedule
from bicompile.testing import same_bits

from ..results import Report, Row
from ..suite import Suite

ROWS = (1, 8, 16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192)
LLAMA_8B = ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096))  # K, N; Mistral-7B has the same
OTHERS = {
    "Qwen3-0.6B": ((1024, 4096), (2048, 1024), (1024, 6144), (3072, 1024)),
    "Qwen3-8B": ((4096, 24576), (12288, 4096)),
    "Mistral-7B head": ((4096, 32768),),
}
GPT2 = ((768, 2304), (768, 768), (768, 3072), (3072, 768))  # with bias, weights [K, N]

CUBLAS = "torch eager (cuBLAS)"
FIXED = TileSchedule(128, 128, 64, warps=8, stages=3)
"""The tile of the batch-invariant products that serving engines ship in Triton, run by our kernel."""

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

    @property
    def series(self) -> str:
        """The name without the number of rows."""
        return f"{str(self.dtype).removeprefix('torch.')} {self.model} {self.depth}->{self.columns}"

    def __str__(self) -> str:
        return f"{self.series} M={self.rows}"

    def operands(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """``x``, the weight as ``[K, N]``, and the bias."""
        options: Any = {"device": "cuda", "dtype": self.dtype}
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


def fixed_tile(x: Tensor, weight: Tensor, bias: Tensor | None) -> Callable[[], Tensor]:
    """The product by :data:`FIXED`, made ready."""
    from bicompile.lowering.matmul.gpu import runner_of

    runner = runner_of(FIXED, problem_of(x, weight, x.dtype, tf32=False, add=bias is not None), x.device.index)

    def run() -> Tensor:
        out = x.new_empty(x.shape[0], weight.shape[1])
        runner(x, weight, None if bias is None else bias.expand_as(out), out)
        return out

    return run


def check(case: Case, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Raise if the values are wrong; say whether rows keep their bits alone, in parts, permuted and misaligned."""
    got, wanted = ours(x, weight, bias), stock(x, weight, bias).float()
    for name, result in (("ours", got), ("the fixed tile", fixed_tile(x, weight, bias)())):
        error = float((result.float() - wanted).norm() / wanted.norm())
        if not error <= 4 * torch.finfo(case.dtype).eps:
            raise AssertionError(f"{case}: {name} differs by {error:.1e} from torch")
    order = torch.randperm(case.rows, device="cuda")
    same = [same_bits(ours(x[order], weight, bias), got[order])]
    for m in {1, case.rows // 2, case.rows - 1} - {0, case.rows}:
        same.append(same_bits(ours(x[:m], weight, bias), got[:m]))
    few = x[-min(case.rows, 40) :]
    shifted = torch.empty(few.numel() + 1, dtype=x.dtype, device="cuda")[1:].view_as(few).copy_(few)
    same.append(same_bits(ours(shifted, weight, bias), got[-len(few) :]))
    return all(same)


def compile_beforehand(wanted: Sequence[Case]) -> None:
    """Run the cases of few rows once, in many processes: compiled kernels and verdicts stay on disk."""
    groups: dict[tuple[object, ...], list[Case]] = {}
    for case in wanted:
        if case.rows <= 256:
            groups.setdefault((case.dtype, case.depth, case.columns, case.bias), []).append(case)
    with multiprocessing.get_context("spawn").Pool(min(14, os.cpu_count() or 1, len(groups))) as pool:
        pool.map(_run, groups.values(), chunksize=1)


def _run(group: list[Case]) -> None:
    for case in group:
        operands = case.operands()
        ours(*operands)
        fixed_tile(*operands)()
    torch.cuda.synchronize()


class Measured(Suite):
    """Products of language models' layers: ours, cuBLAS, and one fixed tile."""

    name = "matmul"
    case_seconds = 0.02
    sweep = "rows"

    def cases(self) -> Sequence[Case]:
        """Everything that is timed, the headline first."""
        return cases(self.settings.quick)

    @contextmanager
    def ready(self, cases: Sequence[Case]) -> Iterator[None]:
        """Kernels are compiled and admitted beforehand."""
        compile_beforehand(cases)
        yield

    def measure(self, case: Case) -> list[Row]:
        """Check one case, then time it."""
        x, weight, bias = case.operands()
        same = check(case, x, weight, bias)

        def timed(product: Callable[..., Tensor]) -> Callable[[], Tensor]:
            return lambda: product(x, weight, bias)

        runs = {"ours": timed(ours), CUBLAS: timed(stock), f"fixed {FIXED}": fixed_tile(x, weight, bias)}
        timings = self.in_turns(runs, rounds=200)
        ours_us, rows = timings.pop("ours").median_us, []
        for against, timing in timings.items():
            extra = {"group": case.group, "series": case.series, "rows": case.rows, "bias": case.bias}
            extra |= {"ours_us": ours_us, "theirs_us": timing.median_us}
            rows.append(Row(str(case), against, timing.median_us / ours_us, same, extra))
        return rows

    def summarise(self, report: Report) -> None:
        """Geometric means and worst cases, and their bars."""
        measured = [row for row in report.rows if row.against == CUBLAS]

        def ratios(group: str, most: float = math.inf) -> list[float]:
            return [row.ratio for row in measured if row.extra["group"] == group and row.extra["rows"] <= most]

        for group, mean, lowest in (("bfloat16", 0.97, 0.85), ("float16", 0.93, None), ("other shapes", 0.93, None)):
            if ratios(group):
                report.summarise(f"{group}: geometric mean", statistics.geometric_mean(ratios(group)), mean)
                report.summarise(f"{group}: lowest", min(ratios(group)), lowest)
        if few := ratios("bfloat16", 64):
            report.summarise("bfloat16, up to 64 rows: geometric mean", statistics.geometric_mean(few), 1.0)
        if biased := [row.ratio for row in measured if row.extra["bias"]]:
            report.summarise("with bias: geometric mean", statistics.geometric_mean(biased))
        if fixed := [row.ratio for row in report.rows if row.against != CUBLAS]:
            report.summarise("against a fixed tile: geometric mean", statistics.geometric_mean(fixed))
        report.summarise("cases measured", len(measured), float(len(self.cases())))
        report.summarise("same bits: share of cases", sum(bool(r.same_bits) for r in measured) / len(measured), 1.0)
