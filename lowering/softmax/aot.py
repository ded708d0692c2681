"""What is compiled ahead of time for the softmax and its gradient."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bicompile.lowering.gpu.ahead import Compilation
from bicompile.lowering.gpu.recording import recorded

from . import gpu

_SHAPES = [
    (1, 4096),
    (4096, 64),
    (4096, 1000),
    (4096, 8192),
    (1, 152_064),
    (16, 50257),
    (4096, 32_000),
    (2, 10_000_000),
]


def aot_cases() -> Iterator[Compilation]:
    """Rows of one section and of many, few and many of them."""
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        for shape in _SHAPES:
            x = torch.empty(shape, dtype=dtype, device="meta")
            for log in (False, True):
                name = f"{'log_' * log}softmax of {shape[0]}x{shape[1]} in {str(dtype).removeprefix('torch.')}"
                yield from recorded(name, gpu.softmax, x, 1, log, dtype)
                yield from recorded(f"gradient of {name}", gpu.softmax_backward, x, x, 1, log, dtype)
            yield from recorded(f"statistics of {name}", gpu.softmax_statistics, x, 1)
    x = torch.empty(64, 512, device="meta")
    yield from recorded("safe softmax", gpu.softmax, x, 1, False, torch.float32, True)
