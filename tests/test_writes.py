"""Writes into indexed places: of several to one place, the last stays."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import bicompile
from bicompile.decompositions import decomposition_table
from bicompile.testing import same_bits

aten = torch.ops.aten


def indices(shape: tuple[int, ...], count: int, seed: int = 0, least: int = 0) -> Tensor:
    return torch.randint(least, count, shape, generator=torch.Generator().manual_seed(seed))


def one_by_one(self: Tensor, at: Sequence[Tensor | None], values: Tensor) -> Tensor:
    """``index_put``, one write after the other."""
    places = torch.arange(self.numel()).reshape(self.shape)[tuple(slice(None) if i is None else i for i in at)]
    out = self.clone().reshape(-1)
    for place, value in zip(places.reshape(-1).tolist(), values.expand(places.shape).reshape(-1), strict=True):
        out[place] = value
    return out.reshape(self.shape)


def scatter_one_by_one(self: Tensor, dim: int, index: Tensor, src: Tensor) -> Tensor:
    out = self.clone()
    for position in itertools.product(*map(range, index.shape)):
        at = list(position)
        at[dim] = int(index[position])
        out[tuple(at)] = src[position]
    return out


GRID = torch.zeros(4, 5, 6)
PUTS: dict[str, tuple[list[Tensor | None], tuple[int, ...]]] = {
    "one dim": ([indices((70,), 4)], (70, 5, 6)),
    "negative": ([None, indices((3, 8), 5, 1, -5)], (4, 3, 8, 6)),
    "two dims": ([None, indices((40,), 5, 2), indices((40,), 6, 3)], (4, 40)),
    "apart": ([indices((8, 1), 4, 4), None, indices((9,), 6, 5)], (8, 9, 5)),
    "broadcast values": ([None, indices((30,), 5, 6)], (30, 1)),
    "int32": ([indices((50,), 4, 7).int()], (50, 1, 6)),
}


@pytest.mark.parametrize(("dtype", "dynamic"), [(torch.bfloat16, True), (torch.int64, False)], ids=str)
def test_the_last_write_to_each_place_stays(dtype: torch.dtype, dynamic: bool):
    grid = GRID.to(dtype)
    values = {name: (torch.randn(shape) * 100).to(dtype) for name, (_, shape) in PUTS.items()}
    at, src = indices((9, 3, 6), 4, 8), (torch.randn(10, 5, 6) * 100).to(dtype)
    source = (torch.randn(4, 20, 6) * 100).to(dtype)

    def write(grid: Tensor, values: dict[str, Tensor], src: Tensor, source: Tensor) -> list[Tensor]:
        out = [aten.index_put.default(grid, PUTS[name][0], x) for name, x in values.items()]
        copied, scattered, put = grid.clone(), grid.clone(), grid.clone()
        copied.index_copy_(1, PUTS["broadcast values"][0][1][:20], source)
        scattered.scatter_(0, at, src)
        put[:, PUTS["two dims"][0][1], PUTS["two dims"][0][2]] = values["two dims"]
        return [*out, copied, scattered, put]

    expected = [one_by_one(grid, PUTS[name][0], x) for name, x in values.items()]
    expected += [
        one_by_one(grid, [None, PUTS["broadcast values"][0][1][:20]], source),
        scatter_one_by_one(grid, 0, at, src),
        one_by_one(grid, PUTS["two dims"][0], values["two dims"]),
    ]
    given = grid, values, src, source
    assert same_bits(torch.compile(write, backend="batch_invariant", dynamic=dynamic)(*given), expected)
    with bicompile.eager():
        assert same_bits(write(*given), expected)


def traced(fn: Callable[..., Any], *args: Any) -> list[Any]:
    gm = make_fx(fn, decomposition_table=decomposition_table())(*args)
    return [node.target for node in gm.graph.nodes if node.op == "call_function"]


def test_writes_that_cannot_meet_are_left_alone():
    x, one, many = torch.zeros(5, 3), torch.tensor([2]), torch.tensor([2, 2])
    assert traced(lambda x, at, v: x.index_put([at], v), x, one, torch.ones(1, 3)) == [aten.index_put.default]
    assert traced(lambda x, at, v: x.index_put([at], v), x, many, torch.ones(3)) == [aten.index_put.default]
    assert traced(lambda x, at, v: x.index_put([at], v), x, x[:, 0] > 1, torch.ones(0, 3)) == [aten.index_put.default]
    assert traced(lambda x, at, v: x.scatter(0, at[:, None], v), x, one, torch.ones(1, 3)) == [
        aten.unsqueeze.default,
        aten.scatter.src,
    ]
    assert aten.scatter_reduce.two in traced(lambda x, at, v: x.index_put([at], v), x, many, torch.ones(2, 3))


def test_a_mask_beside_other_indices_is_refused_unless_there_is_one_value():
    x, mask, at = torch.zeros(4, 3), torch.tensor([True, False, True, True]), torch.tensor([0, 0, 1])
    put = torch.compile(lambda x, v: x.index_put([mask, at], v), backend="batch_invariant")
    with pytest.raises(bicompile.UnsupportedOpError, match="a mask beside others"):
        put(x, torch.ones(3))
    with bicompile.eager(), pytest.raises(bicompile.UnsupportedOpError, match="a mask beside others"):
        x.index_put([mask, at], torch.ones(3))
    with bicompile.eager():
        assert x.index_put([mask, at], torch.tensor(7.0)).sum() == 21


def test_gradients_are_those_of_torch():
    at = torch.tensor([1, 1, 0])

    def put(x: Tensor, v: Tensor) -> Tensor:
        return x.index_put([at], v)

    for fn in (put, torch.compile(put, backend="batch_invariant")):
        x, v = torch.randn(4, 2, requires_grad=True), torch.randn(3, 2, requires_grad=True)
        fn(x, v).backward(torch.arange(8.0).view(4, 2))
        assert x.grad is not None and v.grad is not None
        assert x.grad[:2].count_nonzero() == 0 and v.grad.tolist() == [[2, 3], [2, 3], [0, 1]]


@pytest.mark.parametrize("reduce", ["add", "multiply"])
def test_a_scatter_that_computes_is_lowered(reduce: str):
    x, at, src = torch.randn(4, 3), indices((30, 3), 4), torch.randn(30, 3)
    found = torch.compile(lambda: x.scatter(0, at, src, reduce=reduce), backend="batch_invariant")()
    whole = {"add": "sum", "multiply": "prod"}[reduce]
    assert same_bits(found, torch.ops.bicompile.scatter_reduce(x, 0, at, src, whole, True))
    with pytest.raises(bicompile.UnsupportedOpError, match="scatter"):
        torch.compile(lambda: x.scatter(0, at, 2.0, reduce=reduce), backend="batch_invariant")()
