"""Numbers made of sizes: where shapes are symbols, they have the bits that they have as constants."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import sympy
import torch
from torch import Tensor

import bicompile
from bicompile.lowering.elementwise.codegen_sizes import is_number_of_sizes
from bicompile.testing import same_bits

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "x + columns": lambda x: x + x.shape[1],
    "x / columns": lambda x: x / x.shape[1],
    "x * (1 / columns)": lambda x: x * (1 / x.shape[1]),
    "x * -(rows / columns)": lambda x: x * -(x.shape[0] / x.shape[1]),
    "x / sqrt(columns)": lambda x: x / math.sqrt(x.shape[1]),
    "x + sqrt(columns)": lambda x: x + math.sqrt(x.shape[1]),
    "x * columns**-0.5": lambda x: x * x.shape[1] ** -0.5,
    "x * (0.3 * columns)": lambda x: x * ((0.1 + 0.2) * x.shape[1]),
    "x - (columns + 0.3)": lambda x: x - (x.shape[1] + 0.3),
    "1 / columns - x": lambda x: 1 / x.shape[1] - x,
    "where": lambda x: torch.where(x > 0, x, 1 / x.shape[1]),
    "full": lambda x: x * torch.full((), 1 / x.shape[1], dtype=x.dtype),
    "to an integer": lambda x: x + torch.full((3, 1), x.shape[1] / 2, dtype=torch.float64).to(torch.int64),
    "index": lambda x: x * torch.arange(x.shape[1], device=x.device).to(x.dtype),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_made_of_sizes_are_what_constants_are(dtype: torch.dtype):
    x = torch.randn(3, 333).to(dtype)

    def everything(x: Tensor) -> list[Tensor]:
        return [fn(x) for fn in FUNCTIONS.values()]

    static = torch.compile(everything, backend="batch_invariant", dynamic=False)(x)
    torch._dynamo.reset()
    dynamic = torch.compile(everything, backend="batch_invariant", dynamic=True)(x)
    eps = torch.finfo(dtype).eps
    for (name, fn), one, other in zip(FUNCTIONS.items(), static, dynamic, strict=True):
        assert same_bits(one, other), name
        torch.testing.assert_close(one.double(), fn(x).double(), rtol=eps, atol=eps * 333, msg=name)


def test_an_index_is_rounded_to_the_half_precision_that_it_is_converted_to():
    """Or the bits would follow whether it is computed on the way or first written to memory."""

    def fn(x: Tensor) -> Tensor:
        return torch.arange(1000).to(torch.bfloat16).float() + x

    for dynamic in (False, True):
        torch._dynamo.reset()
        found = torch.compile(fn, backend="batch_invariant", dynamic=dynamic)(torch.zeros(1000))
        assert same_bits(found, fn(torch.zeros(1000)))


@pytest.mark.parametrize("compare", [torch.eq, torch.ne, torch.lt, torch.le, torch.gt, torch.ge])
def test_comparing_half_precisions_with_sizes_is_refused(compare: Callable[..., Tensor]):
    """With static shapes 333 is rounded to 332, as in PyTorch; with dynamic ones it would not be."""
    half = torch.full((3, 333), 332.0).bfloat16()

    def fn(x: Tensor) -> Tensor:
        return compare(x, x.shape[1])

    static = torch.compile(fn, backend="batch_invariant", dynamic=False)(half)
    assert same_bits(static, fn(half))
    torch._dynamo.reset()
    dynamic = torch.compile(fn, backend="batch_invariant", dynamic=True)
    with pytest.raises(bicompile.UnsupportedOpError, match="compare in float32"):
        dynamic(half)
    assert same_bits(dynamic(half.float()), fn(half.float()))


def test_numbers_are_told_from_indices():
    size, index = sympy.Symbol("s3", integer=True), sympy.Symbol("i0", integer=True)
    assert is_number_of_sizes(1 / size) and not is_number_of_sizes(size + index)
    assert not is_number_of_sizes(sympy.Float(0.5)) and not is_number_of_sizes(2)
