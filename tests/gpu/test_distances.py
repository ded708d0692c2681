"""Distances, bilinear forms and bags of embeddings on a GPU: values, compiled as in eager(), rows in any company."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bicompile
from bicompile.testing import assert_batch_invariant, same_bits


def rows(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to("cuda", dtype)


OTHERS, TABLE, FORM = rows(50, 24, seed=1), rows(90, 24, seed=2), rows(5, 24, 24, seed=3)
BAGS = torch.randint(90, (37, 40), generator=torch.Generator().manual_seed(4)).cuda()

OF_ROWS: dict[str, Callable[..., Tensor]] = {
    "cdist": lambda x: torch.cdist(x, OTHERS.to(x.dtype)),
    "cdist, p=3": lambda x: torch.cdist(x, OTHERS.to(x.dtype), 3.0),
    "bilinear": lambda x: F.bilinear(x, x.flip(1), FORM.to(x.dtype)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OF_ROWS)
def test_rows_keep_their_bits_compiled_and_not(name: str, dtype: torch.dtype):
    fn, x = OF_ROWS[name], rows(37, 24, dtype=dtype)
    exact = fn(x.double())
    with bicompile.eager():
        y = fn(x)
        assert_batch_invariant(fn, x, check_input_grad=True)
    assert (y.double() - exact).norm() < 4 * torch.finfo(dtype).eps * exact.norm()
    assert same_bits(torch.compile(fn, backend="batch_invariant")(x), y)


def test_distances_within_a_batch_are_those_of_float64():
    x = rows(37, 24)
    with bicompile.eager():
        torch.testing.assert_close(F.pdist(x), F.pdist(x.double()).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_keep_their_bits_compiled_and_not(mode: str, dtype: torch.dtype):
    def fn(bags: Tensor, table: Tensor) -> Tensor:
        return F.embedding_bag(bags, table, mode=mode)

    table = TABLE.to(dtype)
    exact = fn(BAGS, table.double())
    with bicompile.eager():
        y = fn(BAGS, table)
        assert_batch_invariant(lambda bags: fn(bags, table), BAGS)
    assert (y.double() - exact).norm() < 4 * torch.finfo(dtype).eps * exact.norm()
    assert same_bits(torch.compile(fn, backend="batch_invariant")(BAGS, table), y)
