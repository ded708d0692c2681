"""The GPU's scans, under Triton's interpreter: the bits of their references."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bicompile.lowering.scan import gpu, reference


def drawn(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("shape", "dim"),
    [((3, 20), 1), ((2, 64), 1), ((2, 200), 1), ((1, 4200), 1), ((150, 2), 0), ((2, 70, 3), 1), ((), 0)],
)
def test_sums_and_products_have_the_bits_of_their_references(shape: tuple[int, ...], dim: int, dtype: torch.dtype):
    x = drawn(shape, dtype)
    strided = torch.stack([x, x], -1)[..., 0]
    assert torch.equal(gpu.cumsum(strided, dim, dtype), reference.gpu_cumsum(x, dim, dtype))
    if x.numel() < 1000:
        near_one = 1 + x / 1000
        assert torch.equal(gpu.cumprod(near_one, dim, dtype), reference.gpu_cumprod(near_one, dim, dtype))


@pytest.mark.parametrize("n", [20, 200])
def test_log_sum_exps_are_right(n: int):
    x = drawn((2, n), torch.float32)
    x[0, 0], x[1, 5], x[1, n - 1] = -math.inf, -math.inf, math.inf
    assert torch.allclose(gpu.logcumsumexp(x, 1), torch.logcumsumexp(x, 1), rtol=1e-6, atol=1e-6)


def test_a_result_has_the_bits_of_a_scan_that_ends_there():
    x = drawn((1, 300), torch.float32)
    whole = gpu.cumsum(x, 1, x.dtype)
    for n in (1, 63, 64, 65, 130):
        assert torch.equal(gpu.cumsum(x[:, :n], 1, x.dtype), whole[:, :n])


def test_nothing_gives_nothing():
    for shape in ((0, 4), (4, 0)):
        assert gpu.cumsum(torch.empty(shape), 1, torch.float64).shape == shape
