"""Writes into indexed places on a GPU: of several to one place, the last stays, compiled and not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import bicompile
from bicompile.testing import same_bits

PLACES, WRITES, WIDTH = 300, 20_000, 70


def write(x: Tensor, at: Tensor, values: Tensor) -> list[Tensor]:
    put, copied, scattered = x.clone(), x.clone(), x.clone()
    put[at, :] = values
    copied.index_copy_(0, at, values)
    scattered.scatter_(0, (at[:, None] + torch.arange(WIDTH, device=x.device)) % PLACES, values)
    once = x.index_copy(0, at[:1], values[:1])
    return [put, copied, scattered, once]


def wanted(x: Tensor, at: Tensor, values: Tensor) -> list[Tensor]:
    """The same, with the last write to each place found first."""
    rows, columns = (at[:, None] + torch.arange(WIDTH)) % PLACES, torch.arange(WIDTH).expand(WRITES, WIDTH)
    last = torch.full((PLACES, WIDTH), -1).scatter_reduce(
        0, rows, torch.arange(WRITES)[:, None].expand_as(rows), "amax"
    )
    scattered = torch.where(last < 0, x, values[last.clamp(min=0), columns[0]])
    row = torch.full((PLACES,), -1).scatter_reduce(0, at, torch.arange(WRITES), "amax")
    put = torch.where(row[:, None] < 0, x, values[row.clamp(min=0)])
    once = x.clone()
    once[at[0]] = values[0]
    return [put, put, scattered, once]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_last_write_to_each_place_stays(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    x, values = (torch.randn(n, WIDTH, generator=generator).to(dtype) for n in (PLACES, WRITES))
    at = torch.randint(0, PLACES - 3, (WRITES,), generator=generator)
    expected = wanted(x, at, values)
    given = [t.cuda() for t in (x, at, values)]
    for dynamic in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(write, backend="batch_invariant", dynamic=dynamic, fullgraph=True)
        for _ in range(3):
            assert same_bits([t.cpu() for t in compiled(*given)], expected), dynamic
    with bicompile.eager():
        found = write(*given)
    assert same_bits([t.cpu() for t in found], expected)
