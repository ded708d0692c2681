"""The scatter kernels' logic: their bits are the reference's."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bicompile.lowering.scatter import gpu, reference
from bicompile.lowering.scatter.schedule import (
    REFERENCE,
    ElementSchedule,
    RowSchedule,
    element_schedule_for,
    row_schedule_for,
)
from bicompile.testing import same_bits

# Not bfloat16, to which the interpreter does not round to nearest.
DTYPES = (torch.float32, torch.float64, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def spread(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Normal values over 16 binades."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    return (x * torch.exp2(torch.randint(-8, 8, shape, generator=g).double())).to(dtype)


def indices(shape: tuple[int, ...], count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, count, shape, generator=torch.Generator().manual_seed(seed))


@every_dtype
@pytest.mark.parametrize("shape", [(5, 70), (3, 5, 7), (2, 5, 40)], ids=str)
def test_index_add_is_that_of_the_reference(shape: tuple[int, ...], dtype: torch.dtype):
    dim = len(shape) - 2
    for n, alpha in ((0, 1.0), (1, 1.0), (23, 0.3)):
        self, at = spread(shape, dtype, 0), indices((n,), 5)
        source = spread((*shape[:dim], n, *shape[dim + 1 :]), dtype, 1)
        expected = reference.index_add(self, dim, at, source, alpha)
        assert same_bits(gpu.index_add(self, dim, at, source, alpha), expected)
        across = self.transpose(-1, -2).contiguous().transpose(-1, -2)
        assert same_bits(gpu.index_add(across, dim, at.int(), source, alpha), expected)


@pytest.mark.parametrize(
    "schedule",
    [REFERENCE, RowSchedule(32, 1, 8, 16, 32, 4), RowSchedule(64, 2, 2, 4, 64, 8), RowSchedule(128, 1, 3, 128, 32, 4)],
    ids=str,
)
def test_every_row_schedule_has_the_same_bits(schedule: RowSchedule):
    """Segments of 1 to 100 contributions: whole stretches, ragged ends, both."""
    at = torch.cat([torch.full((count,), d) for d, count in enumerate((1, 2, 7, 8, 9, 33, 100))])
    at = at[torch.randperm(len(at), generator=torch.Generator().manual_seed(0))]
    self, source = spread((9, 40), torch.float32, 0), spread((len(at), 40), torch.float32, 1)
    expected = reference.index_add(self, 0, at, source)
    result = gpu.walk_rows(self[None], at, source[None], 9, schedule=schedule)
    assert same_bits(result[0], expected)


@pytest.mark.parametrize("scale", [False, True])
def test_embedding_backward_is_that_of_the_reference(scale: bool):
    for shape, padding in (((30,), -1), ((4, 9), 2), ((0,), -1), ((), 0)):
        grad, at = spread((*shape, 37), torch.float32, 0), indices(shape, 6, 1)
        result = gpu.embedding_dense_backward(grad, at, 6, padding, scale)
        assert same_bits(result, reference.embedding_dense_backward(grad, at, 6, padding, scale))


@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("reduce", ["sum", "prod", "mean", "amax", "amin"])
def test_scatter_reduce_is_that_of_the_reference(reduce: str, include_self: bool):
    self, src = spread((6, 3, 4), torch.float32, 0), spread((10, 3, 4), torch.float32, 1)
    for at in (indices((9, 2, 4), 6), indices((9, 1, 1), 6).expand(9, 3, 4), indices((0, 3, 4), 6)):
        case: tuple[Any, ...] = (self, 0, at, src, reduce, include_self)
        assert same_bits(gpu.scatter_reduce(*case), reference.scatter_reduce(*case))
    case = (self, -1, indices((5, 2, 6), 4), spread((6, 2, 7), torch.float32, 2), reduce, include_self)
    assert same_bits(gpu.scatter_reduce(*case), reference.scatter_reduce(*case))
    case = (self[0, 0, 0], 0, indices((), 1), src[0, 0, 0], reduce, include_self)
    assert same_bits(gpu.scatter_reduce(*case), reference.scatter_reduce(*case))


@every_dtype
@pytest.mark.parametrize("walk", ["columns", "sorted"])
def test_both_walks_over_elements_have_the_same_bits(walk: Any, dtype: torch.dtype):
    at, src = indices((61, 5), 4), spread((61, 5), dtype, 1)
    total = spread((4, 5), dtype, 2)
    running = total.to(torch.float64 if dtype == torch.float64 else torch.float32, copy=True).reshape(-1)
    schedule = ElementSchedule(walk, 32, 4)
    gpu.walk_elements(running, (at * 5 + torch.arange(5)).reshape(-1).int(), src, "add", schedule)
    assert same_bits(running.view(4, 5).to(dtype), reference.scatter_add(total, 0, at, src))


def test_nothing_but_the_destination_changes():
    """-0 stays -0 where nothing is added, and every NaN is the canonical one."""
    self = torch.tensor([[-0.0], [-0.0], [-math.nan]]).expand(3, 40)
    result = gpu.index_add(self, 0, torch.tensor([1]), torch.zeros(1, 40), 1.0)
    assert same_bits(result, torch.tensor([[-0.0], [0.0], [math.nan]]).expand(3, 40).contiguous())


def test_schedules_cover_every_size():
    for width in (1, 2, 31, 33, 4096):
        for itemsize in (2, 4, 8):
            assert row_schedule_for(width, itemsize).block >= 32
    assert element_schedule_for(4, 100_000, 132).walk == "columns"
    assert element_schedule_for(1_000_000, 1, 132).walk == "sorted"
