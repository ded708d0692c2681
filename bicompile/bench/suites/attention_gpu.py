"""How fast is batch-invariant attention on this GPU, next to torch's own?

Medians of calls that took turns, with a cold L2 cache.  Before a case is timed, its values are checked against
torch's, and its rows for the same bits alone and in the batch, and one query at a time and all at once.  TFLOP/s count
a causal mask as half the products.  Decoding reads keys and values as a cache holds them, [batch, heads, keys, depth].
"""

from __future__ import annotations

import functools
import multiprocessing
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import bicompile.lowering.attention.op  # noqa: F401  registers the ops
from bicompile.testing import same_bits

from ..results import Report, Row
from ..suite import Suite

FLASH, CUDNN, DEFAULT = "FlashAttention", "cuDNN", "default"
BACKENDS = {FLASH: [SDPBackend.FLASH_ATTENTION], CUDNN: [SDPBackend.CUDNN_ATTENTION], DEFAULT: None}
DECODE_KEYS = (2048, 8192, 32768)

ops = torch.ops.bicompile


@dataclass(frozen=True)
class Case:
    """Attention of ``queries`` new tokens to ``keys`` tokens, in bf16.

    Attributes:
        group: the headline it belongs to.
        against: torch's backends it is compared with.
        masked: whether a boolean mask [batch, 1, queries, keys] says what is causal, as transformers gives it.
        backward: whether the gradients are timed, not the output.
    """

    group: str
    batch: int
    queries: int
    keys: int
    heads: int = 32
    kv_heads: int = 8
    depth: int = 128
    against: tuple[str, ...] = (FLASH, CUDNN)
    masked: bool = False
    backward: bool = False

    def __str__(self) -> str:
        sizes = f"B={self.batch} L={self.queries} S={self.keys} H={self.heads}/{self.kv_heads} D={self.depth}"
        return f"{self.group} {sizes}{' bool mask' if self.masked else ''}"

    @property
    def causal(self) -> bool:
        return self.queries > 1 and not self.masked

    def operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q, k, v as views of [batch, length, heads, depth] (a cache: [batch, heads, length, depth]), and the mask."""

        def randn(length: int, heads: int) -> Tensor:
            dims = (heads, length) if self.queries == 1 else (length, heads)
            t = torch.randn(self.batch, *dims, self.depth, device="cuda", dtype=torch.bfloat16)
            return t if self.queries == 1 else t.transpose(1, 2)

        mask = None
        if self.masked:
            mask = torch.ones(self.batch, 1, self.queries, self.keys, dtype=torch.bool, device="cuda")
            mask = mask.tril(self.keys - self.queries)
        return randn(self.queries, self.heads), randn(self.keys, self.kv_heads), randn(self.keys, self.kv_heads), mask

    def terabytes(self) -> float:
        """Keys and values read once."""
        return 2e-12 * 2 * self.batch * self.kv_heads * self.keys * self.depth

    def teraflops(self) -> float:
        """Products of one call, times two."""
        share = 1.0 if self.queries == 1 else 0.5
        products = self.batch * self.heads * self.queries * self.keys * self.depth * share
        return 4e-12 * products * (2.5 if self.backward else 1.0)


def cases(quick: bool) -> list[Case]:
    """Everything that is timed, the headline first."""
    found = [Case("prefill", 4, 2048, 2048), Case("prefill", 1, 8192, 8192)]
    for heads in (32, 64):
        for batch in (1, 16, 64):
            for keys in DECODE_KEYS[:2] if quick else DECODE_KEYS:
                found.append(Case("decode", batch, 1, keys, heads=heads, against=(DEFAULT,)))
    found.append(Case("masked prefill", 4, 2048, 2048, against=(DEFAULT,), masked=True))
    found.append(Case("backward", 4, 2048, 2048, backward=True))
    if not quick:
        found += [
            Case("prefill, other", 16, 512, 512),
            Case("prefill, other", 1, 32768, 32768),
            Case("prefill, other", 4, 2048, 2048, depth=64),
            Case("prefill, other", 1, 1024, 1024),
            Case("prefill, other", 4, 2048, 2048, heads=32, kv_heads=32),
        ]
    return found


def ours(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> tuple[Tensor, Tensor]:
    """Output and lse by our op."""
    out, lse = ops.sdpa(q, k, v, mask, causal, q.shape[3] ** -0.5)
    return out, lse


def stock(backend: str) -> Callable[[Tensor, Tensor, Tensor, Tensor | None, bool], Tensor]:
    """torch's function under one of its backends."""
    wanted = BACKENDS[backend]

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        if wanted is None:
            return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=True)
        with sdpa_kernel(wanted):
            return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=True)

    return run


def check(case: Case, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Raise if the values are wrong; say whether rows keep their bits alone, and queries theirs one at a time."""
    out, _ = ours(q, k, v, mask, case.causal)
    wanted = stock(case.against[0])(q, k, v, mask, case.causal).float()
    error = float((out.float() - wanted).norm() / wanted.norm())
    if not error <= 2 * torch.finfo(torch.bfloat16).eps:
        raise AssertionError(f"{case}: differs by {error:.1e} from torch")
    last = slice(case.batch - 1, case.batch)
    own = mask[last] if mask is not None else None
    same = [same_bits(ours(q[last], k[last], v[last], own, case.causal)[0], out[last])]
    for i in (0, case.queries // 3, case.queries - 1):
        seen = i + 1 if case.queries > 1 else case.keys
        one = ours(q[:, :, i : i + 1], k[:, :, :seen], v[:, :, :seen], None, False)[0]
        same.append(same_bits(one, out[:, :, i : i + 1]))
    return all(same)


def calls(case: Case, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    runs: dict[str, Callable[[], object]] = {}
    if not case.backward:
        runs["ours"] = lambda: ours(q, k, v, mask, case.causal)
        for name in case.against:
            runs[name] = functools.partial(stock(name), q, k, v, mask, case.causal)
        return runs
    scale = case.depth**-0.5
    out, lse = ours(q, k, v, mask, case.causal)
    grad = torch.randn_like(out)
    runs["ours"] = lambda: ops.sdpa_backward(grad, q, k, v, mask, out, lse, case.causal, scale, False)
    for name in case.against:
        leaves = leaf_q, leaf_k, leaf_v = [t.detach().requires_grad_() for t in (q, k, v)]
        result = stock(name)(leaf_q, leaf_k, leaf_v, mask, case.causal)
        runs[name] = functools.partial(torch.autograd.grad, result, leaves, grad, retain_graph=True)
    return runs


def prepare(case: Case) -> None:
    """Compile and admit what a case needs; runs in a process of its own, and leaves both on disk."""
    for run in calls(case, *case.operands()).values():
        run()
    torch.cuda.synchronize()


def small(found: Sequence[Case]) -> list[Case]:
    """One case, with fewer rows, for each set of kernels that ``found`` needs."""
    wanted: dict[tuple[object, ...], Case] = {}
    for case in found:
        decodes = case.queries == 1
        load = case.batch * case.keys if decodes else 0
        few = case if decodes and load <= 65536 else replace(case, batch=1, queries=1 if decodes else 512, keys=512)
        wanted.setdefault((few.group, few.depth, few.masked, few.batch * few.keys), few)
    return list(wanted.values())


HEADLINES = (
    ("prefill against FlashAttention", "prefill", FLASH, 1.3),
    ("prefill against cuDNN", "prefill", CUDNN, 0.75),
    ("decode", "decode", DEFAULT, 0.95),
    ("masked prefill", "masked prefill", DEFAULT, None),
    ("backward against FlashAttention", "backward", FLASH, None),
    ("backward against cuDNN", "backward", CUDNN, None),
)
"""Name, group and backend of each headline figure, and its bar."""


class Measured(Suite):
    """Prefill, decode and backward against torch's backends."""

    name = "attention"
    case_seconds = 0.02

    def cases(self) -> Sequence[Case]:
        """Everything that is timed, the headline first."""
        return cases(self.settings.quick)

    @contextmanager
    def ready(self, cases: Sequence[Case]) -> Iterator[None]:
        """Kernels are compiled and admitted beforehand."""
        with multiprocessing.get_context("spawn").Pool(8) as pool:
            pool.map(prepare, small(cases), chunksize=1)
        yield

    def measure(self, case: Case) -> list[Row]:
        """Check one case, then time it: one row for each of torch's backends."""
        operands = case.operands()
        same = check(case, *operands)
        timings = self.in_turns(calls(case, *operands), rounds=200)
        us = timings["ours"].median_us
        decodes = case.queries == 1
        rate = ("ours_tb_s", case.terabytes()) if decodes else ("ours_tflops", case.teraflops())
        rows = []
        for name in case.against:
            theirs = timings[name].median_us
            extra = {"group": case.group, "ours_us": us, "theirs_us": theirs, rate[0]: rate[1] / us * 1e6}
            rows.append(Row(str(case), f"torch SDPA ({name})", theirs / us, same, extra))
        return rows

    def summarise(self, report: Report) -> None:
        """The headline figures and their bars, of the cases that were measured."""
        for name, group, against, bar in HEADLINES:
            ratios = [r.ratio for r in report.rows if r.extra["group"] == group and f"({against})" in r.against]
            if ratios:
                report.summarise(f"{name}: lowest", min(ratios), bar)
                report.summarise(f"{name}: geometric mean", statistics.geometric_mean(ratios))
        report.summarise(
            "same bits: share of cases", sum(bool(r.same_bits) for r in report.rows) / len(report.rows), 1.0
        )
