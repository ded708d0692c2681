"""Convolutions as matrix products: a sample keeps its bits, forward and backward, compiled and not."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor

import bicompile
from bicompile.convolution import NORMAL_FORMS
from bicompile.testing import same_bits

aten = torch.ops.aten

MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.Conv1d(5, 7, 3, padding=1), (5, 19)),
    "2d strided": (lambda: nn.Conv2d(5, 7, 3, stride=2, padding=1), (5, 9, 11)),
    "2d of many positions": (lambda: nn.Conv2d(3, 4, 3, padding=1), (3, 14, 12)),
    "2d grouped, dilated": (lambda: nn.Conv2d(4, 6, (3, 2), dilation=(1, 2), groups=2), (4, 9, 8)),
    "2d depthwise": (lambda: nn.Conv2d(6, 12, 3, padding=1, groups=6), (6, 7, 8)),
    "2d pointwise": (lambda: nn.Conv2d(40, 7, 1, bias=False), (40, 5, 5)),
    "2d reflected": (lambda: nn.Conv2d(3, 4, 3, padding="same", padding_mode="reflect"), (3, 6, 7)),
    "3d": (lambda: nn.Conv3d(3, 4, 2), (3, 4, 5, 4)),
    "1d transposed": (lambda: nn.ConvTranspose1d(5, 6, 4, stride=2, padding=1), (5, 9)),
    "2d transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2), (4, 5, 6)),
}


def forward_and_gradient(fn: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """The result for ``x``, and the gradient of ``x`` for a gradient of ones over numbers that no rounding hides."""
    x = x.clone().requires_grad_()
    y = fn(x)
    y.backward(torch.ones_like(y) / 3)
    assert x.grad is not None
    return [y.detach(), x.grad]


def batch_of(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, *shape, generator=generator)
    return (x * torch.exp2(torch.randint(-6, 6, x.shape, generator=generator))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_sample_has_same_bits_in_any_batch(name: str, dtype: torch.dtype):
    make, shape = MODULES[name]
    torch.manual_seed(0)
    module, x = make().to(dtype), batch_of(shape, dtype)
    order = torch.tensor([3, 0, 4, 2, 1])
    with bicompile.eager():
        whole = forward_and_gradient(module, x)
        for row in (0, 2, 4):
            assert same_bits(forward_and_gradient(module, x[row : row + 1]), [t[row : row + 1] for t in whole])
        assert same_bits(forward_and_gradient(module, x[order]), [t[order] for t in whole])
        poisoned = torch.full_like(x, math.nan)
        poisoned[2] = x[2]
        assert same_bits([t[2] for t in forward_and_gradient(module, poisoned)], [t[2] for t in whole])
        if x.dim() == 4:
            last = x.contiguous(memory_format=torch.channels_last)
            assert same_bits([t.contiguous() for t in forward_and_gradient(module, last)], whole)


# Inductor's codegen for the CPU takes long for two dims of dynamic size.
@pytest.mark.parametrize(
    ("name", "dynamic"), [("1d", True), ("2d strided", False), ("2d depthwise", False), ("2d transposed", False)]
)
def test_compiled_code_has_the_bits_of_eager_code(name: str, dynamic: bool):
    make, shape = MODULES[name]
    torch.manual_seed(0)
    module, x = make().to(torch.bfloat16), batch_of(shape, torch.bfloat16)
    with bicompile.eager():
        whole = forward_and_gradient(module, x)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="batch_invariant", fullgraph=True, dynamic=dynamic)
    assert same_bits(forward_and_gradient(compiled, x), whole)
    assert same_bits(forward_and_gradient(compiled, x[3:4]), [t[3:4] for t in whole])


def _arguments() -> list[tuple[Any, ...]]:
    kinds = itertools.product((1, 2, 3), (1, 3), (1, 2), (0, 1), (1, 2), (1, 2, 4), (False, True))
    return [kind for kind in kinds if not (kind[0] == 3 and kind[4] == 2)]


def test_values_and_strides_are_those_of_stock():
    """In float64, where rounding does not hide a wrong index; every combination of arguments."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    for dims, kernel, stride, padding, dilation, groups, transposed in _arguments():
        sizes, kernels = (9, 8, 7)[:dims], (kernel,) * dims
        x = draw(2, 4, *sizes)
        weight = draw(4, 8 // groups, *kernels) if transposed else draw(8, 4 // groups, *kernels)
        for extra in (0, 1) if transposed and stride > 1 else (0,):
            rest = [stride] * dims, [padding] * dims, [dilation] * dims, transposed, [extra] * dims, groups
            arguments = (x, weight, draw(8), *rest)
            expected, result = aten.convolution(*arguments), NORMAL_FORMS[aten.convolution.default](*arguments)
            torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)
            assert result.stride() == expected.stride()
            arguments = (draw(*expected.shape), x, weight, [8], *rest, [True] * 3)
            gradients = NORMAL_FORMS[aten.convolution_backward.default](*arguments)
            for ours, stock in zip(gradients, aten.convolution_backward(*arguments), strict=True):
                torch.testing.assert_close(ours, stock, rtol=1e-9, atol=1e-9)


def test_zeros_between_the_elements_of_a_transposed_convolution_meet_no_weight():
    """An infinite one makes infinities where it meets an element, and no NaN where there is none."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.rand(2, 3, 4, 5, generator=generator), torch.rand(3, 2, 3, 3, generator=generator)
    weight[1, 0, 1, 2] = math.inf
    expected = torch.nn.functional.conv_transpose2d(x, weight, stride=2, padding=1)
    with bicompile.eager():
        found = torch.nn.functional.conv_transpose2d(x, weight, stride=2, padding=1)
    assert expected.isinf().any() and not expected.isnan().any()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_is_no_worse_than_that_of_stock(dtype: torch.dtype):
    torch.manual_seed(0)
    module, x = nn.Conv2d(64, 32, 3, padding=1).to(dtype), torch.randn(2, 64, 8, 8).to(dtype)
    wide = nn.Conv2d(64, 32, 3, padding=1).double()
    wide.load_state_dict(module.state_dict())
    exact = forward_and_gradient(wide, x.double())
    stock = forward_and_gradient(module, x)
    with bicompile.eager():
        ours = forward_and_gradient(module, x)
    for truth, theirs, mine in zip(exact, stock, ours, strict=True):
        assert (mine.double() - truth).abs().max() <= 2 * (theirs.double() - truth).abs().max()


def test_gradients_of_weight_and_bias_are_the_same_twice_and_close_to_stock():
    torch.manual_seed(0)
    module, x = nn.Conv2d(6, 8, 3, groups=2), torch.randn(3, 6, 9, 9)

    def gradients() -> list[Tensor]:
        module.zero_grad()
        module(x).square().sum().backward()
        return [p.grad.clone() for p in module.parameters() if p.grad is not None]

    stock = gradients()
    with bicompile.eager():
        ours = gradients()
        assert same_bits(gradients(), ours)
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)


def test_weight_gradient_is_listed_as_cross_batch():
    module, x = nn.Conv2d(4, 6, 3), torch.randn(3, 4, 9, 9, requires_grad=True)
    certificate = bicompile.explain(module, x)
    kinds = {(node.kind, node.op) for node in certificate.nodes}
    assert ("lowered", "bicompile.mm_windows.default") in kinds
    assert ("cross-batch", "bicompile.mm_windows_transposed.default") in kinds
    assert not any(kind == "refused" for kind, _ in kinds)
