"""What is compiled ahead of time for the scans."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bicompile.lowering.gpu.ahead import Compilation
from bicompile.lowering.gpu.recording import recorded

from . import gpu


def aot_cases() -> Iterator[Compilation]:
    """Rows of one segment, of many, and rows that lie side by side."""
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        for shape, dim in (((1, 152_064), 1), ((100_000, 50), 1), ((4096, 1000), 0), ((8, 500, 64), 1)):
            x = torch.empty(shape, dtype=dtype, device="meta")
            for op, arguments in ((gpu.cumsum, (dtype,)), (gpu.cumprod, (dtype,)), (gpu.logcumsumexp, ())):
                name = f"{op.__name__} over dim {dim} of {shape} in {str(dtype).removeprefix('torch.')}"
                yield from recorded(name, op, x, dim, *arguments)
