"""What is compiled ahead of time for the reductions: every kernel, with each kind of layout and schedule."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bicompile.lowering.gpu.ahead import Compilation
from bicompile.lowering.gpu.recording import recorded

from . import gpu, gpu_statistics

_LAYOUTS: list[tuple[str, tuple[int, ...], tuple[int, ...], list[int]]] = [
    ("one row", (1, 4096), (4096, 1), [1]),
    ("short rows", (100_000, 96), (96, 1), [1]),
    ("rows", (4096, 4096), (4096, 1), [1]),
    ("full sections", (4096, 8192), (8192, 1), [1]),
    ("a vocabulary", (16, 50257), (50257, 1), [1]),
    ("columns", (1_000_000, 512), (512, 1), [0]),
    ("a few columns", (4096, 24), (24, 1), [0]),
    ("channels", (32, 64, 56, 56), (64 * 56 * 56, 56 * 56, 56, 1), [0, 2, 3]),
    ("everything", (3000, 4096), (4096, 1), []),
    ("strided", (300, 2000), (4000, 2), [1]),
    ("a huge row", (2, 2**31 + 8), (2**31 + 8, 1), [1]),
]


def aot_cases() -> Iterator[Compilation]:
    """Sum, largest element, variance and log-sum-exp over each kind of layout; the other folds over rows."""
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        short = str(dtype).removeprefix("torch.")
        for name, shape, strides, dim in _LAYOUTS:
            x = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
            for op in ("sum", "amax"):
                yield from recorded(f"{op} of {name} in {short}", gpu.reduce, op, x, dim, False, dtype)
            yield from recorded(f"var of {name} in {short}", gpu_statistics.var, x, dim, 1.0, False, True)
            yield from recorded(f"logsumexp of {name} in {short}", gpu_statistics.logsumexp, x, dim, False)
    x = torch.empty(512, 1500, device="meta")
    for op in ("mean", "sum_square", "mean_square", "prod", "amin"):
        yield from recorded(op, gpu.reduce, op, x, [1], False, x.dtype)
    for ord in (0.0, 1.0, 2.0, 2.5):
        yield from recorded(f"norm of order {ord}", gpu.vector_norm, x, ord, [1], False, x.dtype)
