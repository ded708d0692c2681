"""``bicompile::windows`` against views, and what a convolution makes of it: one order, however it is multiplied."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bicompile
from bicompile import windows as forms
from bicompile.lowering.matmul import reference as products
from bicompile.lowering.windows.reference import windows as reference
from bicompile.testing import same_bits

_PLAIN = ([1, 1], [1, 1], [0, 0], [0, 0], [1, 1])
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Shape, kernel, stride, dilation, zeros before and after, and the distance between elements.
CASES = {
    "1d": ((2, 3, 11), [3], [2], [1], [0], [0], [1]),
    "1d, one position": ((2, 3, 5), [3], [1], [2], [0], [0], [1]),
    "1d, all zeros at a tap": ((2, 3, 2), [7], [1], [1], [3], [3], [1]),
    "2d": ((3, 2, 6, 40), [3, 2], [1, 1], [1, 1], [0, 0], [0, 0], [1, 1]),
    "2d, padded": ((3, 2, 6, 40), [3, 3], [1, 1], [1, 1], [1, 2], [2, 0], [1, 1]),
    "2d, cut": ((3, 2, 6, 9), [2, 3], [1, 2], [1, 1], [-1, 1], [1, -2], [1, 1]),
    "2d, strided, dilated": ((2, 3, 9, 12), [2, 3], [2, 3], [3, 2], [1, 4], [0, 3], [1, 1]),
    "2d, spread": ((2, 3, 4, 5), [3, 4], [1, 1], [1, 1], [2, 1], [1, 3], [2, 3]),
    "2d, spread, strided": ((2, 3, 5, 5), [3, 2], [2, 4], [1, 3], [0, 2], [1, 1], [3, 2]),
    "2d, spread, cut": ((2, 3, 5, 5), [2, 2], [1, 1], [1, 1], [-1, -2], [-1, 2], [2, 2]),
    "3d": ((2, 2, 4, 5, 6), [2, 1, 3], [1, 2, 1], [1, 1, 2], [1, 0, 2], [0, 1, 2], [1, 2, 1]),
    "no rows": ((0, 2, 5, 5), [3, 3], *_PLAIN),
    "no channels": ((2, 0, 5, 5), [3, 3], *_PLAIN),
}


def image(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_windows_are_those_of_views(name: str, across: bool):
    shape, *how = CASES[name]
    for dtype in FLOATS:
        x = image(shape, dtype)
        strided = torch.stack([x, x], dim=-1)[..., 0]
        for given in (x, strided, x.transpose(1, 2).contiguous().transpose(1, 2)):
            found = torch.ops.bicompile.windows(given, *how, across)
            assert found.is_contiguous() and same_bits(found, reference(x, *how, across))
        fake = torch.ops.bicompile.windows(x.to("meta"), *how, across)
        assert fake.shape == found.shape and fake.dtype == dtype


def test_bits_are_copied_as_they_are():
    """NaN with its payload, infinities, denormals and signs of zeros."""
    bits = torch.tensor([0x7FC12345, -0x12345, -(2**31), 1, 0x7F800000, 0], dtype=torch.int32)
    x = bits.view(torch.float32).repeat(4).view(1, 1, 4, 6)
    found = torch.ops.bicompile.windows(x, [2, 2], *_PLAIN, False)
    assert torch.equal(found.view(torch.int32), reference(x, [2, 2], *_PLAIN, False).view(torch.int32))


@pytest.mark.parametrize(
    ("shape", "kernel", "stride"),
    [((2, 3), [1], [1]), ((2, 3, 4), [5], [1]), ((2, 3, 4, 4), [2], [1]), ((2, 3, 4), [2], [1, 1])],
)
def test_bad_arguments_are_refused(shape: tuple[int, ...], kernel: list[int], stride: list[int]):
    one = [1] * len(kernel)
    for device in ("cpu", "meta"):
        with pytest.raises(RuntimeError, match="bicompile::windows: expected x"):
            x = torch.ones(shape, device=device)
            torch.ops.bicompile.windows(x, kernel, stride, one, [0] * len(kernel), [0] * len(kernel), one, False)
    for bad in ((torch.ones(1, 2, 3, dtype=torch.int64), [1]), (torch.ones(1, 2, 3), [0])):
        with pytest.raises(RuntimeError, match="bicompile::windows: expected"):
            torch.ops.bicompile.windows(bad[0], [2], bad[1], [1], [0], [0], [1], False)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("size", "kernel"), [(5, 3), (14, 3), (12, 1)], ids=["few", "many", "many, pointwise"])
def test_a_convolution_has_the_order_of_products(size: int, kernel: int, dtype: torch.dtype):
    """Over (channel, kernel position), in blocks: 225 and 208 terms are more than one."""
    channels = 25 if kernel == 3 else 208
    x, weight = image((2, channels, size, size), dtype), image((3, channels, kernel, kernel), dtype)
    columns = reference(x, [kernel] * 2, *_PLAIN, False)
    expected = torch.stack([products.mm(sample.T, weight.flatten(1).T).T for sample in columns])
    with bicompile.eager():
        assert same_bits(F.conv2d(x, weight).flatten(2), expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_few_and_many_positions_have_the_same_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    x, weight = image((3, 70, 4, 6), dtype), image((5, 70, 2, 3), dtype)
    found = []
    for many in (1, math.inf):
        monkeypatch.setattr(forms, "_MANY_POSITIONS", many)
        with bicompile.eager():
            found.append(F.conv2d(x, weight, padding=1))
    assert same_bits(*found)
