"""Convolution and pooling on a GPU: a sample keeps its bits, forward and backward, compiled and not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import bicompile
from bicompile.testing import same_bits

Make = Callable[[], Callable[[Tensor], Tensor]]
CASES: dict[str, tuple[Make, tuple[int, ...]]] = {
    "conv2d": (lambda: nn.Conv2d(16, 24, 3, stride=2, padding=1), (16, 13, 15)),
    "conv2d, grouped": (lambda: nn.Conv2d(8, 12, (3, 2), dilation=(1, 2), groups=2), (8, 9, 8)),
    "conv1d, depthwise": (lambda: nn.Conv1d(32, 32, 4, padding=3, groups=32), (32, 40)),
    "conv3d": (lambda: nn.Conv3d(3, 8, 2), (3, 6, 7, 6)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(8, 6, 3, stride=2, output_padding=1), (8, 7, 6)),
    "avg_pool2d": (lambda: lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False), (3, 11, 9)),
    "adaptive_avg_pool2d": (lambda: lambda x: F.adaptive_avg_pool2d(x, (5, 4)), (3, 11, 9)),
    "max_pool2d": (lambda: lambda x: F.max_pool2d(x, 3, 1, 1), (3, 11, 9)),
    "bilinear": (lambda: lambda x: F.interpolate(x, size=(17, 5), mode="bilinear"), (3, 11, 9)),
}


def forward_and_gradient(fn: Any, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = fn(x)
    y.backward(torch.ones_like(y) / 3)
    assert x.grad is not None
    return [y.detach(), x.grad]


def build(name: str, dtype: torch.dtype) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    make, shape = CASES[name]
    fn, x = make(), torch.randn(6, *shape) * torch.exp2(torch.randint(-6, 6, (6, *shape)))
    return fn.to("cuda", dtype) if isinstance(fn, nn.Module) else fn, x.to("cuda", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_sample_has_same_bits_in_any_batch_and_is_close_to_the_truth(name: str, dtype: torch.dtype):
    fn, x = build(name, dtype)
    with bicompile.eager():
        whole = forward_and_gradient(fn, x)
        for row in (0, 4):
            assert same_bits(forward_and_gradient(fn, x[row : row + 1]), [t[row : row + 1] for t in whole])
        assert same_bits(forward_and_gradient(fn, x.flip(0)), [t.flip(0) for t in whole])
        poisoned = torch.full_like(x, math.nan)
        poisoned[2] = x[2]
        assert same_bits([t[2] for t in forward_and_gradient(fn, poisoned)], [t[2] for t in whole])
    stock = forward_and_gradient(fn, x)
    if isinstance(fn, nn.Module):
        fn = fn.double()
    for truth, theirs, mine in zip(forward_and_gradient(fn, x.double()), stock, whole, strict=True):
        allowed = 3 * (theirs.double() - truth).abs().max() + torch.finfo(dtype).eps * truth.abs().max()
        assert (mine.double() - truth).abs().max() <= allowed


@pytest.mark.parametrize("name", ["conv2d", "adaptive_avg_pool2d"])
def test_compiled_code_has_the_bits_of_eager_code(name: str):
    fn, x = build(name, torch.bfloat16)
    with bicompile.eager():
        whole = forward_and_gradient(fn, x)
    compiled = torch.compile(fn, backend="batch_invariant", fullgraph=True, dynamic=True)
    assert same_bits(forward_and_gradient(compiled, x), whole)
    assert same_bits(forward_and_gradient(compiled, x[3:4]), [t[3:4] for t in whole])
