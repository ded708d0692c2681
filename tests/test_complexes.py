"""Complex sums and products: values, gradients, the bits of compiled code, and a row's bits in any company."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bicompile
from bicompile.errors import UnsupportedOpError
from bicompile.testing import assert_batch_invariant, same_bits


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.complex64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _in_place(a: Tensor, b: Tensor) -> Tensor:
    return a.clone().mul_(b).add_(1j)


FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "product": lambda a, b: a * b,
    "with a conjugate": lambda a, b: a * b.conj(),
    "with a real tensor": lambda a, b: b.imag * a,
    "with a wider real tensor": lambda a, b: a * b.real.double(),
    "with an integer tensor": lambda a, b: a * torch.arange(a.shape[-1]),
    "with numbers": lambda a, b: (1 + 2j) * a * 3.5 - 2j,
    "a real tensor and an imaginary number": lambda a, b: a.real * 2j + b.real,
    "sum": lambda a, b: a + b.real + 1.5,
    "a real tensor that is longer": lambda a, b: a[0] + b.real,
    "with alpha": lambda a, b: torch.add(torch.sub(a, b, alpha=2), b, alpha=0.5j),
    "negative": lambda a, b: -a,
    "over a dim": lambda a, b: a.sum(0) + b.sum(-1, keepdim=True),
    "over all": lambda a, b: a.sum() * b,
    "from parts": lambda a, b: torch.complex(a.real, b.imag[0]),
    "polar": lambda a, b: torch.polar(a.real.abs(), b.real) * a,
    "in place": _in_place,
}


@pytest.mark.parametrize("dtype", (torch.complex64, torch.complex128))
@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_are_those_of_torch(name: str, dtype: torch.dtype):
    a, b = numbers(5, 7, dtype=dtype), numbers(5, 7, seed=1, dtype=dtype)
    wanted = FUNCTIONS[name](a, b)
    with bicompile.eager():
        got = FUNCTIONS[name](a, b)
    assert got.dtype == wanted.dtype
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("dynamic", (False, True))
def test_compiled_code_has_the_bits_of_eager(dynamic: bool):
    def all_of_them(a: Tensor, b: Tensor) -> list[Tensor]:
        return [fn(a, b) for fn in FUNCTIONS.values()]

    compiled = torch.compile(all_of_them, backend="batch_invariant", dynamic=dynamic)
    for rows in (1, 6):
        a, b = numbers(rows, 37), numbers(rows, 37, seed=1)
        with bicompile.eager():
            wanted = all_of_them(a, b)
        for name, x, y in zip(FUNCTIONS, compiled(a, b), wanted, strict=True):
            assert same_bits(x, y), name


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary embedding by complex numbers, as Llama's first code has it; ``x`` [..., T, D], ``angles`` [T, D / 2]."""
    pairs = torch.view_as_complex(x.to(angles.dtype).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2).type_as(x)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_rotated_row_has_the_same_bits_in_any_batch(dtype: torch.dtype):
    x, weight, angles = torch.randn(6, 5, 9).to(dtype), torch.randn(74, 9).to(dtype), torch.randn(5, 37) * 9

    def query(x: Tensor) -> Tensor:
        return rotated(F.linear(x, weight), angles)

    with bicompile.eager():
        assert_batch_invariant(query, x, check_input_grad=True)
    compiled = torch.compile(query, backend="batch_invariant", dynamic=True)
    assert_batch_invariant(compiled, x, check_input_grad=True)


def test_gradients_of_a_rotation_are_those_of_torch():
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    angles = torch.randn(5, 4, dtype=torch.float64)
    weights = torch.randn(2, 5, 8, dtype=torch.float64)
    wanted = torch.autograd.grad(rotated(x, angles), (x,), weights)
    with bicompile.eager():
        torch.testing.assert_close(torch.autograd.grad(rotated(x, angles), (x,), weights), wanted)


def test_gradients_of_a_factor_that_rows_share_are_those_of_torch_compiled_or_not():
    def turned(x: Tensor, factor: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(x) * torch.view_as_complex(factor))

    x, factor = (torch.randn(*shape, 2, dtype=torch.float64, requires_grad=True) for shape in ((6, 5), (5,)))
    wanted = torch.autograd.grad(turned(x, factor).sin().sum(), (x, factor))
    with bicompile.eager():
        got = torch.autograd.grad(turned(x, factor).sin().sum(), (x, factor))
    torch.testing.assert_close(got, wanted)
    compiled = torch.compile(lambda x, factor: turned(x, factor).sin().sum(), backend="batch_invariant")
    assert same_bits(torch.autograd.grad(compiled(x, factor), (x, factor)), got)


def test_stock_products_follow_the_batch():
    """Control: vector and scalar code round otherwise."""
    a, b = numbers(64, 37), numbers(64, 37, seed=1)
    assert not same_bits(torch.cat([x * y for x, y in zip(a, b, strict=True)]), (a * b).flatten())


@pytest.mark.parametrize("fn", (torch.exp, torch.sqrt, torch.tanh, torch.abs, lambda x: x / x, lambda x: x.prod(-1)))
def test_other_functions_of_complex_numbers_are_refused(fn: Callable[[Tensor], Tensor]):
    x = numbers(3, 5)
    with bicompile.eager(), pytest.raises(UnsupportedOpError):
        fn(x)
    with pytest.raises(UnsupportedOpError):
        torch.compile(fn, backend="batch_invariant")(x)
