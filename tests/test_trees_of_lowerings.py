"""The lowerings add as their orders say, in every batch; stock PyTorch changes its order with the batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from summing import (
    ATTENTION,
    POSITIVE,
    POSITIVE_ATTENTION,
    PRODUCTS,
    REDUCTIONS,
    SCANS,
    SCATTERS,
    Sum,
    assert_same_tree,
    attention_gradients,
    check_triples,
    counted,
    declared_tree,
    ones,
    tree_in_batch,
    tree_of,
)
from torch import Tensor

from bicompile.lowering.attention import reference as attention_reference
from bicompile.lowering.matmul import reference as matmul_reference
from bicompile.lowering.reduction import reference as reduction_reference
from bicompile.lowering.scan import reference as scan_reference
from bicompile.lowering.scatter import reference as scatter_reference
from bicompile.testing import summation_tree, tree_difference
from bicompile.testing.declared import blocks, declared_order, laned_sections

ops = torch.ops.bicompile

# Rows and their number, around the blocks and past two of them.
SIZES = ((5, 3), (191, 1), (192, 17), (193, 3), (400, 1), (400, 17))

LOWERINGS: dict[str, tuple[Sum, str]] = {
    **{name: (fn, "sum") for name, fn in REDUCTIONS.items()},
    **{name: (fn, "mm") for name, fn in PRODUCTS.items()},
    **{name: (fn, "cumsum") for name, fn in SCANS.items()},
    **{name: (fn, "index_add") for name, fn in SCATTERS.items()},
    **{name: (fn, "sdpa") for name, fn in ATTENTION.items()},
}


def check(name: str, n: int, num_rows: int, dtype: torch.dtype = torch.float32) -> None:
    fn, op = LOWERINGS[name]
    found = tree_in_batch(lambda x: fn(ops, x), n, num_rows, dtype)
    assert_same_tree(declared_tree(op, n, dtype), found, f"{name} of {num_rows} rows of {n} {dtype}")


@pytest.mark.parametrize("name", LOWERINGS)
def test_a_lowering_adds_as_its_order_says_in_every_batch(name: str):
    for n, num_rows in SIZES:
        check(name, n, num_rows)


@pytest.mark.parametrize("name", ["sum", "sum over dim 0", "softmax_backward", "mm", "cumsum", "index_add"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_lowering_adds_as_its_order_says_in_every_dtype(name: str, dtype: torch.dtype):
    for n, num_rows in ((5, 3), (193, 17), (400, 1)):
        check(name, n, num_rows, dtype)


@pytest.mark.parametrize("name", ["sum", "sum over dim 0", "mm"])
def test_long_rows_cross_sections(name: str):
    check(name, 4150, 3)


# A key's weight is 1 / n, exact for a power of two; a query's is 1.
@pytest.mark.parametrize("which, lengths", [("dq", (4, 512)), ("dk", (193, 400)), ("dv", (193, 400))])
def test_attention_adds_its_gradients_as_its_order_says(which: str, lengths: tuple[int, int]):
    for n, num_rows in zip(lengths, (17, 1), strict=True):
        found = tree_in_batch(lambda x: attention_gradients(ops, x, which), n, num_rows)
        assert_same_tree(declared_tree("sdpa", n, torch.float32), found, f"{which} over {n}")


@pytest.mark.parametrize("n", [5, 191, 192, 193, 400, 4150])
@pytest.mark.parametrize("name", [*POSITIVE, *POSITIVE_ATTENTION])
def test_of_three_positive_summands_those_two_meet_first_that_the_order_says(name: str, n: int):
    attends = name in POSITIVE_ATTENTION
    fn = (POSITIVE | POSITIVE_ATTENTION)[name]
    tree = declared_tree("sdpa", n, torch.float32, what=1) if attends else declared_tree("sum", n, torch.float32)
    check_triples(lambda x: fn(ops, x), tree, (1, 3, 17, 300), "cpu", name)


# --- the references ------------------------------------------------------------------------------------------------
# A step of theirs takes long: they are asked with shorter blocks, for which they need no change.


def _shortened(monkeypatch: pytest.MonkeyPatch, module: ModuleType, **sizes: int) -> Callable[..., Any]:
    """``module.order_for`` with other ``sizes``."""
    original = module.order_for

    def shorter(*args: Any) -> Any:
        return dataclasses.replace(original(*args), **sizes)

    monkeypatch.setattr(module, "order_for", shorter)
    return shorter


def test_references_of_reductions_have_the_trees_of_the_kernels():
    for n in (5, 400):
        found = summation_tree(lambda x: reduction_reference.sum(x, [0], False, x.dtype), n)
        assert found == declared_tree("sum", n, torch.float32)
    found = summation_tree(lambda x: scan_reference.cumsum(x, 0, x.dtype)[-1], 12)
    assert found == declared_tree("cumsum", 12, torch.float32)
    index = torch.ones(12, dtype=torch.int64)
    assert summation_tree(lambda x: scatter_reference.index_add(torch.zeros(2), 0, index, x)[1], 12) == found


@pytest.mark.parametrize("n", [3, 8, 19, 70])
def test_references_of_the_gpus_orders_have_the_trees_that_are_declared(n: int, monkeypatch: pytest.MonkeyPatch):
    order = dataclasses.replace(declared_order("sum", n, torch.float32, "cuda"), lanes=4, section=8)
    monkeypatch.setattr(reduction_reference, "gpu_order_for", lambda *_: order)
    found = summation_tree(lambda x: reduction_reference.gpu_fold(x[None])[0, 0], n)
    assert tree_difference(tree_of(order, n), found) is None
    order = dataclasses.replace(declared_order("cumsum", n, torch.float32, "cuda"), segment=4)
    monkeypatch.setattr(scan_reference, "gpu_order_for", lambda *_: order)
    found = summation_tree(lambda x: scan_reference.gpu_cumsum(x, 0, x.dtype)[-1], n)
    assert tree_difference(tree_of(order, n), found) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", [7, 21])
def test_reference_of_matmul_has_the_tree_of_its_order(n: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    order_for = _shortened(monkeypatch, matmul_reference, block=8)
    found = summation_tree(lambda x: matmul_reference.mm(x[None], ones(x, n, 1))[0, 0], n, dtype=dtype)
    assert found == tree_of(order_for(n, dtype), n)


def test_reference_of_attention_has_the_tree_of_its_order(monkeypatch: pytest.MonkeyPatch):
    order = _shortened(monkeypatch, attention_reference, block=8, lanes=4)(torch.float32)

    def values(x: Tensor) -> Tensor:
        q, k, v = torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, len(x), 1), x[None, None, :, None]
        return counted(attention_reference.sdpa(q, k, v, None, False, 1.0)[0].flatten(), len(x))

    assert summation_tree(values, 21) == blocks(list(range(21)), order.block)
    weights = summation_tree(lambda x: attention_reference._sum_of_weights(x, order), 21)
    assert weights == laned_sections(21, order.block, order.lanes)


# --- control -------------------------------------------------------------------------------------------------------

# Which of them change depends on the processor and on torch's BLAS.
STOCK: dict[str, Callable[[Tensor], Tensor]] = {
    "mm": lambda x: torch.mm(x, torch.ones(x.shape[1], 1))[:, 0],
    "linear": lambda x: F.linear(x, torch.ones(8, x.shape[1]))[:, 0],
    "sum over dim 0": lambda x: x.t().contiguous().sum(0),
}


def test_stock_functions_change_their_tree_with_the_batch():
    changed = [name for name, fn in STOCK.items() if len({tree_in_batch(fn, 64, rows) for rows in (1, 2, 64)}) > 1]
    assert changed
