"""What does batch-invariant attention cost, next to PyTorch's own on the CPU?

    python examples/benchmarks/bench_attention.py [--threads 2] [--seconds 0.5] [--no-write]

Prints, and writes to ``results/<device>/attention.json``, the time of ``F.scaled_dot_product_attention`` over that of
``bicompile::sdpa`` as a compiled graph calls it: above 1 we are faster.  9 query heads over 3 key heads of depth 64,
the shape of SmolLM2-135M.  Calls take turns, and operands rotate, so that none of them is in the L2 cache yet.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import bicompile.lowering.attention.op  # noqa: F401 (registers bicompile::sdpa)
from bicompile.bench import Report, Row, compare, rotate
from bicompile.testing import same_bits

HEADS, KV_HEADS, DEPTH = 9, 3, 64
PREFILL = ((1, 128), (1, 512), (1, 2048), (4, 512))
BATCHES, KEYS = (1, 4, 8), (128, 512, 2048, 4096)
DTYPES = (torch.float32, torch.bfloat16)
L2_BYTES = 2 * 2**20  # more than one core of the machines we measure on has


@dataclass(frozen=True)
class Case:
    """Attention of ``queries`` new tokens to ``keys`` tokens."""

    kind: str
    dtype: torch.dtype
    batch: int
    queries: int
    keys: int
    masked: bool = False

    @property
    def name(self) -> str:
        mask = " bool mask" if self.masked else ""
        return f"{self.kind} {self.dtype_name} B={self.batch} L={self.queries} S={self.keys}{mask}"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def causal(self) -> bool:
        return self.kind == "prefill"

    def arguments(self, batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Query, key, value and mask of random sequences."""
        shapes = ((HEADS, self.queries), (KV_HEADS, self.keys), (KV_HEADS, self.keys))
        q, k, v = (torch.randn(batch, *shape, DEPTH).to(self.dtype) for shape in shapes)
        return q, k, v, torch.ones(batch, 1, self.queries, self.keys, dtype=torch.bool) if self.masked else None

    def ours(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out: Tensor = torch.ops.bicompile.sdpa.default(q, k, v, mask, self.causal, DEPTH**-0.5)[0]
        return out

    def theirs(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal, enable_gqa=True)

    def check(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
        """Assert that our error is at most twice theirs, against a wider dtype."""
        wide = torch.float64 if self.dtype == torch.float32 else torch.float32
        truth = self.theirs(q.to(wide), k.to(wide), v.to(wide), mask)
        ours, theirs = ((f(q, k, v, mask).to(wide) - truth).norm().item() for f in (self.ours, self.theirs))
        assert ours <= 2 * theirs, f"{self.name}: error {ours}, that of torch {theirs}"

    def first_row_keeps_its_bits(self) -> bool:
        """Whether the first sequence of a batch has the bits that it has alone."""
        q, k, v, mask = self.arguments(self.batch + 1)
        alone = self.ours(q[:1], k[:1], v[:1], None if mask is None else mask[:1])
        return same_bits(self.ours(q, k, v, mask)[:1], alone)


def cases() -> Iterator[Case]:
    """Prefill, then decode with and without a mask, in every dtype."""
    for dtype in DTYPES:
        for batch, length in PREFILL:
            yield Case("prefill", dtype, batch, length, length)
        for batch in BATCHES:
            for keys in KEYS:
                yield Case("decode", dtype, batch, 1, keys)
                yield Case("decode", dtype, batch, 1, keys, masked=True)


def measure(case: Case, seconds: float) -> Row:
    """Check the values, then time the two in turns."""
    first = case.arguments(case.batch)
    case.check(*first)
    size = sum(t.numel() * t.element_size() for t in first[:3])
    sets = [first, *(case.arguments(case.batch) for _ in range(min(math.ceil(L2_BYTES / size), 15)))]
    found = compare(rotate(case.ours, sets), rotate(case.theirs, sets), seconds=seconds)
    low, high = found.ratio_spread
    extra = {"ours_us": found.ours.median_us, "theirs_us": found.theirs.median_us, "ratio_low": low, "ratio_high": high}
    return Row(case.name, "F.scaled_dot_product_attention", found.ratio, case.first_row_keeps_its_bits(), extra)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each case")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report, groups = Report("attention"), dict[str, list[float]]()
    with torch.inference_mode():
        for case in cases():
            row = measure(case, options.seconds)
            report.rows.append(row)
            groups.setdefault(f"{case.kind} {case.dtype_name}", []).append(row.ratio)
            times = f"{row.extra['ours_us']:9.0f} us, stock {row.extra['theirs_us']:9.0f} us"
            print(f"{row.case:44s} {times}, ratio {row.ratio:5.2f}, same bits: {row.same_bits}", flush=True)
    for name, ratios in groups.items():
        report.summarise(f"{name}, geometric mean", statistics.geometric_mean(ratios), bar=1.0)
        report.summarise(f"{name}, worst", min(ratios))
    for name, entry in report.summary.items():
        print(f"{name}: {entry['value']}")
    if not options.no_write:
        print(f"wrote {report.write()}")


if __name__ == "__main__":
    main()
