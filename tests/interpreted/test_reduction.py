"""The GPU's reductions, under Triton's interpreter: every element is counted once, in the order of the reference."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bicompile.lowering.reduction import gpu, gpu_statistics, reference
from bicompile.lowering.reduction.order import gpu_order_for

SHAPES: list[tuple[tuple[int, ...], list[int]]] = [
    ((3, 1), [1]),
    ((2, 33), [1]),
    ((1, 1500), [1]),
    ((1, 9000), [1]),
    ((300, 5), [0]),
    ((9000, 2), [0]),
    ((2, 70, 20), [1]),
    ((3, 7, 10), [0, 2]),
    ((2, 3, 4, 5), [1, 3]),
    ((4, 5), []),
    ((), []),
]


def spread(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normal values over 16 binades."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    return (x * torch.exp2(torch.randint(-8, 8, shape, generator=g).double())).to(dtype)


def layouts(x: Tensor) -> list[Tensor]:
    """``x`` as it is, where no dim is dense, and where another one is; a large one only as it is."""
    if x.numel() > 5000:
        return [x]
    strided = torch.stack([x, x], -1)[..., 0]
    return [x, strided, x.T.contiguous().T] if x.dim() == 2 else [x, strided]


@pytest.mark.parametrize(("shape", "dim"), SHAPES)
def test_sums_have_the_bits_of_their_references(shape: tuple[int, ...], dim: list[int]):
    x = spread(shape, torch.bfloat16)
    expected = reference.mean_square(x, dim, False, torch.float32, reference.gpu_fold)
    for y in layouts(x):
        assert torch.equal(gpu.reduce("mean_square", y, dim, False, torch.float32), expected)


@pytest.mark.parametrize(("shape", "dim"), SHAPES)
def test_variances_have_the_bits_of_their_references(shape: tuple[int, ...], dim: list[int]):
    x = spread(shape, torch.float32)
    expected = reference.var(x, dim, 0.0, True, True, reference.gpu_moments)
    for y in layouts(x):
        for ours, theirs in zip(gpu_statistics.var(y, dim, 0.0, True, True), expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["sum", "prod", "amax", "amin", "mean", "sum_square"])
def test_the_other_folds_have_the_bits_of_their_references(name: str):
    for shape, dim in (((2, 300), [1]), ((300, 2), [0])):
        x = spread(shape, torch.float64)
        x = x.abs() ** 0.01 if name == "prod" else x
        expected = getattr(reference, name)(x, dim, False, torch.float64, reference.gpu_fold)
        assert torch.equal(gpu.reduce(name, x, dim, False, torch.float64), expected)


@pytest.mark.parametrize("ord", [0.0, 1.0, 2.0, math.inf, -math.inf])
def test_norms_have_the_bits_of_their_references(ord: float):
    for shape, dim in (((2, 300), [1]), ((100, 2), [0])):
        x = spread(shape, torch.float32)
        expected = reference.vector_norm(x, ord, dim, False, torch.float32, reference.gpu_fold)
        assert torch.equal(gpu.vector_norm(x, ord, dim, False, torch.float32), expected)


@pytest.mark.parametrize(("shape", "dim"), [case for case in SHAPES if case[0] != (9000, 2)])
def test_logsumexp_is_right(shape: tuple[int, ...], dim: list[int]):
    x = spread(shape, torch.float32)
    expected = torch.logsumexp(x.double(), dim or list(range(x.dim())))
    for y in layouts(x)[:2]:
        ours = gpu_statistics.logsumexp(y, dim, False).double()
        assert torch.allclose(ours, expected, rtol=1e-6, atol=1e-6)


def test_logsumexp_of_special_rows():
    inf = math.inf
    x = torch.full((5, 9000), -inf)
    x[1, 3], x[2, 8500], x[3, 1], x[3, 8999] = inf, math.nan, -500.0, -500.0
    x[4] = -300.0
    ours, stock = gpu_statistics.logsumexp(x, [1], False), torch.logsumexp(x, 1)
    assert torch.allclose(ours, stock, equal_nan=True)


def test_special_rows_stay_among_themselves():
    x = spread((6, 300), torch.float32)
    x[1], x[3] = math.nan, math.inf
    whole = gpu.reduce("sum", x, [1], False, torch.float32)
    for row in (0, 2, 4, 5):
        assert torch.equal(whole[row], gpu.reduce("sum", x[row : row + 1], [1], False, torch.float32)[0])
    assert whole[1].isnan() and whole[3] == math.inf


def test_reductions_of_nothing():
    empty = torch.empty(3, 0)
    assert torch.equal(gpu.reduce("sum", empty, [1], False, torch.float32), torch.zeros(3))
    assert torch.equal(gpu.reduce("prod", empty, [1], False, torch.float32), torch.ones(3))
    assert gpu.reduce("mean", empty, [1], False, torch.float32).isnan().all()
    assert gpu_statistics.var(empty, [1], 1.0, False, False)[0].isnan().all()
    assert torch.equal(gpu_statistics.logsumexp(empty, [1], False), empty.logsumexp(1))
    assert gpu.reduce("amax", empty, [0], False, torch.float32).shape == (0,)
    with pytest.raises(RuntimeError, match="amax: expected at least one element"):
        gpu.reduce("amax", empty, [1], False, torch.float32)


def test_the_order_sees_one_row_only():
    assert gpu_order_for(1, torch.bfloat16) == gpu_order_for(10**7, torch.float32)
    assert gpu_order_for(1, torch.float64).compute == torch.float64
