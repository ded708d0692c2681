"""Resizing with antialiasing: values, gradients, what lies outside of a window, and a row's bits in any company."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bicompile
from bicompile.testing import assert_batch_invariant, same_bits

SIZES = ((5, 4), (16, 16), (33, 9), (1, 1), (7, 40))


def resized(x: Tensor, size: tuple[int, int], mode: str, align_corners: bool = False) -> Tensor:
    return F.interpolate(x, size, mode=mode, align_corners=align_corners, antialias=True)


def pictures(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("align_corners", (False, True))
@pytest.mark.parametrize("mode", ("bilinear", "bicubic"))
def test_values_and_gradients_are_those_of_torch(mode: str, align_corners: bool):
    def value_and_gradient(size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        y = resized(x, size, mode, align_corners)
        return y.detach(), torch.autograd.grad(y, x, weights[..., : size[0], : size[1]])[0]

    x, weights = pictures(2, 3, 16, 11).requires_grad_(), pictures(2, 3, 40, 40)
    for size in SIZES:
        wanted = value_and_gradient(size)
        with bicompile.eager():
            torch.testing.assert_close(value_and_gradient(size), wanted)


@pytest.mark.parametrize("mode", ("bilinear", "bicubic"))
def test_a_given_factor_counts(mode: str):
    resize = functools.partial(F.interpolate, scale_factor=(0.37, 1.7), mode=mode, antialias=True)
    for recompute in (False, True):
        x = pictures(1, 2, 16, 11)
        wanted = resize(x, recompute_scale_factor=recompute)
        with bicompile.eager():
            torch.testing.assert_close(resize(x, recompute_scale_factor=recompute), wanted)


def test_nan_shows_where_it_shows_in_torch():
    x = pictures(1, 1, 16, 11)
    x[..., 3, 4] = float("nan")
    for size in SIZES:
        wanted = resized(x, size, "bilinear").isnan()
        with bicompile.eager():
            assert torch.equal(resized(x, size, "bilinear").isnan(), wanted)


@pytest.mark.parametrize("mode", ("bilinear", "bicubic"))
def test_a_picture_has_the_same_bits_in_any_batch(mode: str):
    x = pictures(5, 3, 16, 11, dtype=torch.float32)
    resize = functools.partial(resized, size=(5, 14), mode=mode)
    with bicompile.eager():
        assert_batch_invariant(resize, x, check_input_grad=True)
        wanted = resize(x)
    assert same_bits(torch.compile(resize, backend="batch_invariant", dynamic=True)(x), wanted)
