"""The inverse of the error function: values up to the ends, gradients, the bits of compiled code and of parts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import bicompile
from bicompile.testing import same_bits

EPS = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}


def between(dtype: torch.dtype) -> Tensor:
    """Numbers in (-1, 1), many of them close to 0, 1 and -1."""
    near = torch.logspace(-7 if dtype == torch.float32 else -15, -1, 500, dtype=torch.float64)
    x = torch.cat([torch.linspace(-0.999, 0.999, 999, dtype=torch.float64), near, 1 - near, near - 1]).to(dtype)
    return x[x.abs() < 1]


@pytest.mark.parametrize("dtype", EPS)
def test_values_are_those_of_torch(dtype: torch.dtype):
    x = between(dtype)
    exact = torch.erfinv(x.double())
    with bicompile.eager():
        got = torch.erfinv(x)
    assert got.dtype == dtype
    assert ((got.double() - exact).abs() / exact.abs()).nan_to_num(0.0).max() <= 3 * EPS[dtype]


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
def test_ends_zeros_and_what_has_no_value(dtype: torch.dtype):
    x = torch.tensor([1.0, -1.0, 0.0, -0.0, 2.0, -math.inf, math.nan], dtype=dtype)
    with bicompile.eager():
        got = torch.erfinv(x)
        of_integers = torch.erfinv(torch.tensor([0, 1, 2]))
    assert same_bits(got[:4], torch.tensor([math.inf, -math.inf, 0.0, -0.0], dtype=dtype)) and got[4:].isnan().all()
    torch.testing.assert_close(of_integers, torch.erfinv(torch.tensor([0, 1, 2])), equal_nan=True)


def test_gradients_are_those_of_torch():
    x = torch.linspace(-0.9, 0.9, 19, dtype=torch.float64, requires_grad=True)
    (wanted,) = torch.autograd.grad(torch.erfinv(x).sum(), x)
    with bicompile.eager():
        torch.testing.assert_close(torch.autograd.grad(torch.erfinv(x).sum(), x)[0], wanted)


def test_compiled_code_and_parts_have_the_bits_of_eager():
    x = between(torch.float32)
    with bicompile.eager():
        wanted = torch.erfinv(x)
        parts = torch.cat([torch.erfinv(part) for part in x.split(7)])
    assert same_bits(parts, wanted)
    assert same_bits(torch.compile(torch.erfinv, backend="batch_invariant")(x), wanted)
