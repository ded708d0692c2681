"""``bicompile::windows`` against views, and what a convolution makes of it: one order, however it is multiplied."""

from __future__ import annotations

import ctypes
import itertools
import math
import mmap

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bicompile
from bicompile import convolution as forms
from bicompile import images
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


def written_out(factors: Tensor, x: Tensor, *how: object) -> Tensor:
    """``mm_windows`` by windows that are written out."""
    columns = torch.ops.bicompile.windows(x, *how)
    if how[-1]:
        return torch.ops.bicompile.bmm(factors, columns.view(factors.shape[0], factors.shape[2], columns.shape[1]))
    return torch.ops.bicompile.bmm(factors.expand(len(columns), *factors.shape[1:]), columns)


GROUPED = [(name, groups) for name in CASES for groups in (1, 2, 3) if CASES[name][0][1] % groups == 0]


@pytest.mark.parametrize(
    ("name", "groups", "across"), [(*case, True) for case in GROUPED] + [(name, 1, False) for name in CASES]
)
def test_products_are_those_of_windows_written_out(name: str, groups: int, across: bool):
    shape, *how = CASES[name]
    terms = shape[1] // groups * math.prod(how[0])
    for dtype in FLOATS:
        x = image(shape, dtype)
        strided = torch.stack([x, x], dim=-1)[..., 0]
        for rows in (1, 5, 70):
            factors = torch.randn(groups, rows, terms, generator=torch.Generator().manual_seed(1)).to(dtype)
            for given in (x, strided):
                found = torch.ops.bicompile.mm_windows(factors, given, *how, across)
                assert found.is_contiguous() and same_bits(found, written_out(factors, x, *how, across))
        fake = torch.ops.bicompile.mm_windows(factors.to("meta"), x.to("meta"), *how, across)
        assert fake.shape == found.shape and fake.dtype == dtype


@pytest.mark.parametrize(("name", "groups"), GROUPED)
def test_transposed_products_are_those_of_windows_written_out(name: str, groups: int):
    shape, *how = CASES[name]
    for dtype in FLOATS:
        x = image(shape, dtype)
        strided = torch.stack([x, x], dim=-1)[..., 0]
        terms = torch.ops.bicompile.windows(x, *how, True)
        terms = terms.view(groups, len(terms) // groups, terms.shape[1]).transpose(1, 2)
        for rows in (1, 5, 70):
            factors = torch.randn(groups, rows, terms.shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
            for given in (x, strided):
                found = torch.ops.bicompile.mm_windows_transposed(factors, given, *how)
                assert found.is_contiguous() and same_bits(found, torch.ops.bicompile.bmm(factors, terms))
        fake = torch.ops.bicompile.mm_windows_transposed(factors.to("meta"), x.to("meta"), *how)
        assert fake.shape == found.shape and fake.dtype == dtype


LARGE = {
    "tiles of rows and columns": (600, (2, 30, 24, 40), [3, 3], [1, 1], [1, 1]),
    "two of every three": (40, (2, 70, 13, 61), [3, 5], [2, 3], [0, 2]),
    "lines longer than a tile": (70, (1, 40, 3, 1100), [2, 3], [1, 1], [1, 1]),
    "lines of one": (70, (2, 200, 40, 1), [3, 1], [1, 1], [1, 0]),
}


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("name", LARGE)
def test_large_products_are_those_of_windows_written_out(name: str, across: bool):
    rows, shape, kernel, stride, padding = LARGE[name]
    how = (kernel, stride, [1, 1], padding, padding, [1, 1], across)
    for dtype in FLOATS:
        x = image(shape, dtype)
        factors = torch.randn(1, rows, shape[1] * math.prod(kernel), generator=torch.Generator().manual_seed(1)).to(
            dtype
        )
        found = torch.ops.bicompile.mm_windows(factors, x, *how)
        assert same_bits(found, written_out(factors, x, *how))
        whole = found if across else found.transpose(0, 1).flatten(1)[None]
        one = torch.ops.bicompile.mm_windows(factors, x[-1:].contiguous(), *how)[0]
        assert same_bits(whole[0, :, -one.shape[-1] :].contiguous(), one)
        terms = torch.ops.bicompile.windows(x, *how[:-1], True).T[None]
        transposed = torch.ops.bicompile.mm_windows_transposed(whole.contiguous(), x, *how[:-1])
        assert same_bits(transposed, torch.ops.bicompile.bmm(whole.contiguous(), terms))


@pytest.mark.parametrize("stride", [1, 2])
def test_products_read_no_memory_behind_the_image(stride: int):
    """The image ends where a page does, and the next one may not be read."""
    page, libc = mmap.PAGESIZE, ctypes.CDLL(None, use_errno=True)
    memory = mmap.mmap(-1, 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for dtype in FLOATS:
        count = 2 * 3 * 5 * 9
        x = torch.frombuffer(memory, dtype=dtype, count=count, offset=page - count * dtype.itemsize).view(2, 3, 5, 9)
        x.copy_(torch.randn(x.shape))
        how = ([3, 3], [stride, stride], [1, 1], [1, 1], [0, 0], [1, 1])
        factors = torch.randn(1, 7, 27).to(dtype)
        expected = [written_out(factors, x.clone(), *how, across) for across in (False, True)]
        terms = torch.ops.bicompile.windows(x.clone(), *how, True)
        expected.append(torch.ops.bicompile.bmm(expected[1], terms.T[None]))
        assert libc.mprotect(ctypes.c_void_p(start + page), page, 0) == 0
        try:
            found = [torch.ops.bicompile.mm_windows(factors, x, *how, across) for across in (False, True)]
            found.append(torch.ops.bicompile.mm_windows_transposed(found[1], x, *how))
        finally:
            assert libc.mprotect(ctypes.c_void_p(start + page), page, mmap.PROT_READ | mmap.PROT_WRITE) == 0
        assert all(map(same_bits, found, expected))


def test_products_that_do_not_fit_are_refused():
    x, how = torch.ones(1, 4, 5, 5), ([3, 3], *_PLAIN)
    for device in ("cpu", "meta"):
        for shape, across in (((1, 7, 35), False), ((2, 7, 18), False), ((2, 7, 17), True), ((7, 36), False)):
            with pytest.raises(RuntimeError, match="bicompile::mm_windows: expected factors"):
                torch.ops.bicompile.mm_windows(torch.ones(shape, device=device), x.to(device), *how, across)
        with pytest.raises(RuntimeError, match="bicompile::mm_windows: expected one dtype"):
            double = torch.ones(1, 7, 36, device=device, dtype=torch.float64)
            torch.ops.bicompile.mm_windows(double, x.to(device), *how, False)
        for shape in ((1, 7, 8), (3, 7, 9), (7, 9)):
            with pytest.raises(RuntimeError, match="bicompile::mm_windows_transposed: expected factors"):
                torch.ops.bicompile.mm_windows_transposed(torch.ones(shape, device=device), x.to(device), *how)
    torch.library.opcheck(torch.ops.bicompile.mm_windows.default, (torch.ones(1, 7, 36), x, *how, False))
    torch.library.opcheck(torch.ops.bicompile.mm_windows_transposed.default, (torch.ones(2, 7, 9), x, *how))


@pytest.mark.parametrize(
    ("sizes", "strides"), [((5,), [3]), ((4, 5), [2, 3]), ((2, 3, 5), [1, 2, 2]), ((0, 4), [2, 2])]
)
def test_phases_are_interleaved(sizes: tuple[int, ...], strides: list[int]):
    for dtype in FLOATS:
        phases = image((math.prod(strides), 2, 3, *sizes), dtype)
        whole = torch.ops.bicompile.interleaved(phases, strides)
        for number, phase in enumerate(itertools.product(*map(range, strides))):
            index = [slice(f, None, s) for f, s in zip(phase, strides, strict=True)]
            assert same_bits(whole[(slice(None), slice(None), *index)].contiguous(), phases[number])
        assert same_bits(whole, images.interleaved(phases, strides))
        meta = torch.ops.bicompile.interleaved(phases.to("meta"), strides)
        assert meta.shape == whole.shape == images.interleaved(phases.to("meta"), strides).shape
    for device in ("cpu", "meta"):
        for bad in (strides[1:], [s + 1 for s in strides]):
            with pytest.raises(RuntimeError, match="bicompile::interleaved: expected contiguous phases"):
                torch.ops.bicompile.interleaved(phases.to(device), bad)


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
