"""Distances, bilinear forms and bags of embeddings: values, gradients, and a row's bits in any company."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bicompile
from bicompile.testing import assert_batch_invariant, same_bits

ORDERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, math.inf)


def rows(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


GRADIENT = rows(1000, seed=9)


def value_and_gradients(fn: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in inputs]
    y = fn(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, GRADIENT[: y.numel()].view(y.shape).to(y.dtype))]


@pytest.mark.parametrize("p", ORDERS)
def test_distances_are_those_of_torch(p: float):
    x, y = rows(2, 5, 7), rows(2, 4, 7, seed=1)
    y[0, 2] = x[0, 3]  # a distance of 0
    cases = ((lambda a, b: torch.cdist(a, b, p), (x, y)), (lambda a: F.pdist(a, p), (x[0],)))
    for fn, inputs in cases:
        wanted = value_and_gradients(fn, *inputs)
        with bicompile.eager():
            torch.testing.assert_close(value_and_gradients(fn, *inputs), wanted)
    empty = rows(3, 0)
    with bicompile.eager():
        assert not torch.cdist(empty, empty, p).any()


def test_distances_and_forms_of_a_row_have_the_same_bits_in_any_batch():
    x, others, form = rows(7, 6).float(), rows(30, 6, seed=1).float(), torch.nn.Bilinear(6, 6, 5)
    with bicompile.eager():
        for p in (2.0, 3.0):
            assert_batch_invariant(lambda x, p=p: torch.cdist(x, others, p), x, check_input_grad=True)
        assert_batch_invariant(lambda x: form(x, x.flip(1)), x, check_input_grad=True)


def test_stock_distances_follow_the_batch():
    """Control: from 26 rows on PyTorch takes them from a matrix product."""
    x, y = rows(30, 40, dtype=torch.float32), rows(3, 40, seed=1, dtype=torch.float32)
    assert not same_bits(torch.cdist(x, y)[:1], torch.cdist(x[:1], y))
    with bicompile.eager():
        assert same_bits(torch.cdist(x, y)[:1], torch.cdist(x[:1], y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_distances_have_the_bits_of_eager(dtype: torch.dtype):
    x, y = rows(6, 9, dtype=dtype), rows(4, 9, seed=1, dtype=dtype)
    compiled = torch.compile(lambda a, b: torch.cdist(a, b), backend="batch_invariant")
    with bicompile.eager():
        wanted = value_and_gradients(torch.cdist, x, y)
    assert same_bits(value_and_gradients(compiled, x, y), wanted)


def test_bilinear_forms_are_those_of_torch():
    form = torch.nn.Bilinear(5, 4, 3, dtype=torch.float64)
    x, y = rows(2, 6, 5), rows(2, 6, 4, seed=1)
    wanted = value_and_gradients(form, x, y)
    with bicompile.eager():
        torch.testing.assert_close(value_and_gradients(form, x, y), wanted)
        half = form.bfloat16()(x.bfloat16(), y.bfloat16())
    assert (half.double() - wanted[0]).norm() < 2**-6 * wanted[0].norm()


INDICES = torch.tensor([3, 1, 1, 7, 0, 2, 3, 3, 9, 1])
OFFSETS = torch.tensor([0, 3, 3, 8])  # the second bag is empty


@pytest.mark.parametrize("padding", [None, 3])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_are_those_of_torch(mode: str, padding: int | None):
    table, weights = rows(10, 6), rows(10, seed=2)

    def fn(table: Tensor, weights: Tensor) -> Tensor:
        weighted = {"per_sample_weights": weights} if mode == "sum" else {}
        bags = F.embedding_bag(INDICES, table, OFFSETS, mode=mode, padding_idx=padding, **weighted)
        last = F.embedding_bag(INDICES, table, torch.tensor([0, 4, 10]), mode=mode, include_last_offset=True)
        return torch.cat([bags, last, F.embedding_bag(INDICES.view(2, 5).int(), table, mode=mode) * weights[0]])

    wanted = value_and_gradients(fn, table, weights)
    with bicompile.eager():
        torch.testing.assert_close(value_and_gradients(fn, table, weights), wanted)


def test_gradients_of_bags_are_scaled_by_how_often_an_index_comes():
    """As those of F.embedding are; PyTorch's own takes another index's count for some (2.13)."""
    table = rows(10, 6)
    with bicompile.eager():
        bags = value_and_gradients(
            lambda t: F.embedding_bag(INDICES, t, OFFSETS, mode="sum", scale_grad_by_freq=True), table
        )
    ends = [*OFFSETS[1:].tolist(), len(INDICES)]

    def by_hand(table: Tensor) -> Tensor:
        every = F.embedding(INDICES, table, scale_grad_by_freq=True)
        return torch.stack([every[start:end].sum(0) for start, end in zip(OFFSETS.tolist(), ends, strict=True)])

    torch.testing.assert_close(bags, value_and_gradients(by_hand, table))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_a_bag_has_the_same_bits_in_any_company(mode: str):
    table = rows(50, 6, dtype=torch.bfloat16)
    bags = torch.randint(50, (7, 40), generator=torch.Generator().manual_seed(3))
    with bicompile.eager():
        assert_batch_invariant(lambda bags: F.embedding_bag(bags, table, mode=mode), bags)
        whole = F.embedding_bag(bags, table, mode=mode)
        joined = torch.cat([INDICES, bags[2], bags[5][:0], bags[4]])
        apart = F.embedding_bag(joined, table, torch.tensor([0, 10, 50, 50]), mode=mode)
    assert same_bits(apart[[1, 3]], whole[[2, 4]])


def test_compiled_bags_have_the_bits_of_eager():
    bag = torch.nn.EmbeddingBag(10, 6)

    def fn(table: Tensor) -> Tensor:
        return F.embedding_bag(INDICES, table, OFFSETS)

    with bicompile.eager():
        wanted = value_and_gradients(fn, bag.weight)
    compiled = torch.compile(fn, backend="batch_invariant")
    assert same_bits(value_and_gradients(compiled, bag.weight), wanted)
