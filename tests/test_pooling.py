"""Pooling and resizing: sums over windows in one order, so a sample keeps its bits, forward and backward."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bicompile
from bicompile.pooling import NORMAL_FORMS
from bicompile.testing import same_bits

aten = torch.ops.aten
SHAPES = {1: (3, 19), 2: (3, 11, 9), 3: (2, 6, 7, 5)}

FUNCTIONS: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "avg_pool1d": (1, lambda x: F.avg_pool1d(x, 3, 2, 1)),
    "avg_pool2d": (2, lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False)),
    "avg_pool2d, large window": (2, lambda x: F.avg_pool2d(x, 9, 1)),
    "avg_pool3d": (3, lambda x: F.avg_pool3d(x, 2)),
    "adaptive_avg_pool1d": (1, lambda x: F.adaptive_avg_pool1d(x, 5)),
    "adaptive_avg_pool2d": (2, lambda x: F.adaptive_avg_pool2d(x, (5, 12))),
    "adaptive_avg_pool3d": (3, lambda x: F.adaptive_avg_pool3d(x, (4, 3, 2))),
    "global average": (2, lambda x: F.adaptive_avg_pool2d(x, 1)),
    "lp_pool2d": (2, lambda x: F.lp_pool2d(x, 2, 3)),
    "max_pool1d": (1, lambda x: F.max_pool1d(x, 3, 1)),
    "max_pool2d": (2, lambda x: F.max_pool2d(x, 3, 1, 1)),
    "max_pool3d": (3, lambda x: F.max_pool3d(x, 3, 1)),
    "adaptive_max_pool2d": (2, lambda x: F.adaptive_max_pool2d(x, (5, 4))),
    "adaptive_max_pool3d": (3, lambda x: F.adaptive_max_pool3d(x, (4, 3, 2))),
    "linear": (1, lambda x: F.interpolate(x, scale_factor=2, mode="linear")),
    "bilinear": (2, lambda x: F.interpolate(x, size=(17, 5), mode="bilinear", align_corners=True)),
    "bicubic": (2, lambda x: F.interpolate(x, size=(17, 5), mode="bicubic")),
    "trilinear": (3, lambda x: F.interpolate(x, scale_factor=2, mode="trilinear")),
    "area": (2, lambda x: F.interpolate(x, size=(5, 4), mode="area")),
    "nearest": (2, lambda x: F.interpolate(x, size=(17, 5), mode="nearest")),
    "replicated edges": (2, lambda x: F.pad(x, (3, 2, 1, 4), mode="replicate")),
    "local response norm": (2, lambda x: F.local_response_norm(x, 2)),
    "instance norm": (2, F.instance_norm),
    "unfold": (2, lambda x: x.unfold(2, 4, 2).unfold(3, 3, 1)),
    "fold": (2, lambda x: F.fold(F.unfold(x, 3), x.shape[2:], 3)),
}


def forward_and_gradient(fn: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """The result for ``x``, and the gradient of ``x`` for a gradient that differs from place to place."""
    x = x.clone().requires_grad_()
    y = fn(x)
    count = math.prod(y.shape[1:])
    y.backward((torch.arange(count, dtype=torch.float64) % 7 / 3 + 1).to(y.dtype).view(y.shape[1:]).expand(y.shape))
    assert x.grad is not None
    return [y.detach(), x.grad]


def batch_of(dims: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, *SHAPES[dims], generator=generator)
    return (x * torch.exp2(torch.randint(-6, 6, x.shape, generator=generator))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_sample_has_same_bits_in_any_batch(name: str, dtype: torch.dtype):
    dims, fn = FUNCTIONS[name]
    x, order = batch_of(dims, dtype), torch.tensor([3, 0, 4, 2, 1])
    with bicompile.eager():
        whole = forward_and_gradient(fn, x)
        for row in (0, 4):
            assert same_bits(forward_and_gradient(fn, x[row : row + 1]), [t[row : row + 1] for t in whole])
        assert same_bits(forward_and_gradient(fn, x[order]), [t[order] for t in whole])
        poisoned = torch.full_like(x, math.nan)
        poisoned[2] = x[2]
        assert same_bits([t[2] for t in forward_and_gradient(fn, poisoned)], [t[2] for t in whole])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_are_those_of_stock(name: str):
    """In float64, where rounding does not hide a wrong index."""
    dims, fn = FUNCTIONS[name]
    x = batch_of(dims, torch.float64)
    stock = forward_and_gradient(fn, x)
    with bicompile.eager():
        ours = forward_and_gradient(fn, x)
    torch.testing.assert_close(ours, stock, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("name", "dynamic"), [("avg_pool2d", False), ("adaptive_avg_pool1d", True)])
def test_compiled_code_has_the_bits_of_eager_code(name: str, dynamic: bool):
    dims, fn = FUNCTIONS[name]
    x = batch_of(dims, torch.bfloat16)
    with bicompile.eager():
        whole = forward_and_gradient(fn, x)
    compiled = torch.compile(fn, backend="batch_invariant", fullgraph=True, dynamic=dynamic)
    assert same_bits(forward_and_gradient(compiled, x), whole)
    assert same_bits(forward_and_gradient(compiled, x[3:4]), [t[3:4] for t in whole])


def test_every_argument_of_avg_pool_means_what_it_does_in_stock():
    generator = torch.Generator().manual_seed(0)
    for dims, op, backward in (
        (2, aten.avg_pool2d, aten.avg_pool2d_backward),
        (3, aten.avg_pool3d, aten.avg_pool3d_backward),
    ):
        x = torch.randn(2, 3, *(9, 8, 7)[:dims], generator=generator, dtype=torch.float64)
        for kernel, stride, *rest in itertools.product(
            (2, 3), (1, 2, 3), (0, 1), (False, True), (False, True), (None, 5)
        ):
            arguments: tuple[Any, ...] = ([kernel] * dims, [stride] * dims, [rest[0]] * dims, *rest[1:])
            expected = op(x, *arguments)
            torch.testing.assert_close(NORMAL_FORMS[op.default](x, *arguments), expected)
            grad = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
            ours = NORMAL_FORMS[backward.default](grad, x, *arguments)
            torch.testing.assert_close(ours, backward(grad, x, *arguments))


def test_error_is_no_worse_than_that_of_stock():
    x = batch_of(2, torch.bfloat16)
    for name in ("avg_pool2d", "avg_pool2d, large window", "adaptive_avg_pool2d"):
        fn = FUNCTIONS[name][1]
        exact, stock = forward_and_gradient(fn, x.double()), forward_and_gradient(fn, x)
        with bicompile.eager():
            ours = forward_and_gradient(fn, x)
        for truth, theirs, mine in zip(exact, stock, ours, strict=True):
            assert (mine.double() - truth).abs().max() <= 2 * (theirs.double() - truth).abs().max()


def test_a_window_far_larger_than_the_image_costs_no_more_than_the_image():
    """EfficientNet pools so; with the window's own size in memory, this test would ask for 16 TB."""
    x = torch.randn(2, 3, 5, 8, requires_grad=True)
    stock = F.avg_pool2d(x, 1_000_000, ceil_mode=True)
    with bicompile.eager():
        ours = F.avg_pool2d(x, 1_000_000, ceil_mode=True)
        (gradient,) = torch.autograd.grad(ours.sum(), x)
    torch.testing.assert_close(ours, stock)
    torch.testing.assert_close(gradient, torch.autograd.grad(stock.sum(), x)[0])
