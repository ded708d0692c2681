"""The GPU's layer norm and group norm, under Triton's interpreter: the bits of their references."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bicompile.lowering.norm import gpu, gpu_backward, gpu_rms, reference
from bicompile.lowering.reduction import reference as reduction
from bicompile.lowering.reduction.reference import gpu_fold, gpu_moments

EPS = 1e-5


def drawn(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def laid_out(x: Tensor, dense: bool) -> Tensor:
    return x if dense else torch.stack([x, x], -1)[..., 0]


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize(("shape", "dims"), [((3, 33), 1), ((2, 3, 8), 2), ((1, 9000), 1), ((1, 1), 1)])
@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm_and_its_gradients(shape: tuple[int, ...], dims: int, affine: bool, dense: bool):
    dtype = torch.float16 if affine else torch.float32  # the interpreter truncates to bfloat16
    x, grad = drawn(shape, dtype, 0), drawn(shape, dtype, 1)
    weight, bias = (drawn(shape[-dims:], torch.float32, s) if affine else None for s in (2, 3))
    ours = gpu.layer_norm(laid_out(x, dense), dims, weight, bias, EPS)
    for found, expected in zip(ours, reference.layer_norm(x, dims, weight, bias, EPS, gpu_moments), strict=True):
        assert torch.equal(found, expected)
    rows = (grad, x, dims, *ours[1:])
    found = gpu_backward.layer_norm_backward(laid_out(grad, dense), laid_out(x, dense), dims, *ours[1:], weight)
    assert torch.equal(found, reference.layer_norm_backward(*rows, weight, gpu_fold))
    if x.numel() > 1000:
        return  # sums over the rows take one program for every few columns
    parameters = gpu_backward.layer_norm_backward_params(laid_out(grad, dense), x, dims, *ours[1:], torch.float32)
    for got, expected in zip(
        parameters, reference.layer_norm_backward_params(*rows, torch.float32, gpu_fold), strict=True
    ):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(("shape", "groups"), [((2, 6, 7), 3), ((2, 4), 2), ((1, 4, 45, 50), 1), ((1, 2, 3, 4), 2)])
def test_group_norm_and_its_gradients(shape: tuple[int, ...], groups: int):
    x, grad = drawn(shape, torch.float32, 0), drawn(shape, torch.float32, 1)
    weight, bias = drawn(shape[1:2], torch.float32, 2), drawn(shape[1:2], torch.float16, 3)
    ours = gpu.group_norm(x, groups, weight, bias, EPS)
    for found, expected in zip(ours, reference.group_norm(x, groups, weight, bias, EPS, gpu_moments), strict=True):
        assert torch.equal(found, expected)
    rows = (grad, x, groups, *ours[1:])
    found = gpu_backward.group_norm_backward(*rows, weight)
    assert torch.equal(found, reference.group_norm_backward(*rows, weight, gpu_fold))
    parameters = gpu_backward.group_norm_backward_params(*rows, torch.float32)
    for got, expected in zip(
        parameters, reference.group_norm_backward_params(*rows, torch.float32, gpu_fold), strict=True
    ):
        assert torch.equal(got, expected)


def test_parameters_of_many_rows():
    x, grad = drawn((150, 3), torch.float32, 0), drawn((150, 3), torch.float32, 1)
    mean, rstd = x.mean(1), 1 / x.std(1)
    found = gpu_backward.layer_norm_backward_params(grad, x, 1, mean, rstd, torch.float32)
    expected = reference.layer_norm_backward_params(grad, x, 1, mean, rstd, torch.float32, gpu_fold)
    for got, known in zip(found, expected, strict=True):
        assert torch.equal(got, known)


def test_nothing_gives_nothing():
    x = torch.empty(0, 5)
    y, mean, rstd = gpu.layer_norm(x, 1, None, None, EPS)
    assert y.shape == (0, 5) and mean.shape == rstd.shape == (0, 1)
    assert gpu_backward.layer_norm_backward(x, x, 1, mean, rstd, None).shape == (0, 5)
    weight, bias = gpu_backward.layer_norm_backward_params(x, x, 1, mean, rstd, torch.float32)
    assert torch.equal(weight, torch.zeros(5)) and torch.equal(bias, torch.zeros(5))


@pytest.mark.parametrize("n", [33, 9000])
def test_rms_norm(n: int):
    x, weight = drawn((2, n), torch.float16, 0), drawn((n,), torch.float16, 1)
    root = 1 / (reduction.mean_square(x, [1], True, torch.float32, gpu_fold) + EPS).sqrt()
    scaled = x.float() * root
    assert torch.equal(gpu_rms.rms_norm(x, weight, EPS, True), weight * scaled.half())
    assert torch.equal(gpu_rms.rms_norm(laid_out(x, False), weight, EPS, False), (scaled * weight).half())
    assert torch.equal(gpu_rms.rms_norm(x, None, EPS, False), scaled.half())
