"""What is compiled ahead of time for layer norm and group norm and their gradients."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bicompile.lowering.gpu.ahead import Compilation
from bicompile.lowering.gpu.recording import recorded

from . import gpu, gpu_backward

_SHAPES = [(1, 4096), (100_000, 96), (4096, 768), (4096, 8192), (16, 50257), (2, 10_000_000)]


def aot_cases() -> Iterator[Compilation]:
    """Layer norms of one section and of many; group norms of small and large images."""
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        short = str(dtype).removeprefix("torch.")
        for shape in _SHAPES:
            x, weight = (torch.empty(s, dtype=dtype, device="meta") for s in (shape, shape[1:]))
            for affine in (weight, None):
                name = f"layer norm of {shape[0]}x{shape[1]} in {short}{'' if affine is None else ' with parameters'}"
                yield from recorded(name, _layer_norm, x, affine)
        for image in ((8, 320, 64, 64), (8, 32, 2, 1)):
            x, weight = (torch.empty(s, dtype=dtype, device="meta") for s in (image, image[1:2]))
            yield from recorded(f"group norm of {image} in {short}", _group_norm, x, weight)


def _layer_norm(x: Tensor, weight: Tensor | None) -> None:
    _, mean, rstd = gpu.layer_norm(x, 1, weight, weight, 1e-5)
    gpu_backward.layer_norm_backward(x, x, 1, mean, rstd, weight)
    gpu_backward.layer_norm_backward_params(x, x, 1, mean, rstd, x.dtype)


def _group_norm(x: Tensor, weight: Tensor) -> None:
    _, mean, rstd = gpu.group_norm(x, 16, weight, weight, 1e-5)
    gpu_backward.group_norm_backward(x, x, 16, mean, rstd, weight)
