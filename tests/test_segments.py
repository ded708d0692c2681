"""Bags that are rows of the batch combine nothing across it; whatever else is scattered by segment does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_passes import graph_of
from torch import Tensor

import bicompile
from bicompile import Certificate
from bicompile.passes import batch_symbols, lower_scatters

TABLE = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
BAGS = torch.randint(50, (7, 40), generator=torch.Generator().manual_seed(1))


def scatters(certificate: Certificate) -> list[tuple[str, tuple[str, ...]]]:
    """Kind and extent of every scatter of ours."""
    ops = ("bicompile.index_add", "bicompile.scatter_")
    return [(node.kind, node.extent) for node in certificate.nodes if node.op.startswith(ops)]


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_a_bag_that_is_a_row_stays_in_its_row(mode: str, rows: int):
    certificate = bicompile.explain(lambda bags: F.embedding_bag(bags, TABLE, mode=mode), BAGS[:rows])
    assert certificate.batch_is_symbolic and not certificate.cross_batch
    assert scatters(certificate) == [("lowered", ("40",))]


def test_the_gradient_of_the_table_sums_over_the_batch():
    table = TABLE.clone().requires_grad_()
    certificate = bicompile.explain(lambda bags: F.embedding_bag(bags, table, mode="sum"), BAGS)
    assert [kind for kind, _ in scatters(certificate)] == ["lowered", "cross-batch"]


def by_segment(
    length: int, *, right: bool = True, before: int = 1, first: int = 0, more: int = 0, step: int = 1
) -> Callable[[Tensor], Tensor]:
    """``embedding_bag``'s sums, in segments of ``length`` positions, and ways in which they might be others."""

    def fn(x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        starts = torch.arange(first, len(flat), length)
        place = torch.arange(0, step * len(flat), step)
        index = torch.searchsorted(starts, place, right=right) - before
        return flat.new_zeros(len(starts) + more, flat.shape[1]).index_add(0, index, flat)

    return fn


ROWS = torch.randn(6, 5, 32, generator=torch.Generator().manual_seed(2))


def with_offsets(x: Tensor, offsets: Tensor) -> Tensor:
    return F.embedding_bag(x.flatten(), TABLE, offsets)


def across(*, unsqueezed: bool) -> Callable[[Tensor], Tensor]:
    """All positions of a column go to one row, in each of as many columns as there are positions."""

    def fn(x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        index = torch.searchsorted(torch.arange(0, len(flat), 5), torch.arange(len(flat)), right=True) - 1
        to = (index.unsqueeze(0) if unsqueezed else index).expand(len(flat), len(flat))
        return flat.new_zeros(len(x), len(flat)).scatter_add(0, to, flat @ flat.T)

    return fn


def reduced(fn: Callable[[Tensor], Tensor]) -> list[int]:
    """Over what the scatter in ``fn`` combines; its index may be one that no kernel would take."""
    gm = lower_scatters.lower_scatters_pass(graph_of(fn, ROWS)).graph_module
    (extent,) = [batch_symbols.reduced_extent(node) for node in gm.graph.nodes if "bicompile" in str(node.target)]
    assert extent is not None
    return extent


def test_segments_of_a_row_stay_in_it():
    assert reduced(by_segment(5)) == [5]
    assert scatters(bicompile.explain(by_segment(5), ROWS)) == [("lowered", ("5",))]


@pytest.mark.parametrize(
    "fn",
    [
        *(by_segment(4), by_segment(5, right=False), by_segment(5, before=2), by_segment(5, first=5)),
        *(by_segment(5, more=1), by_segment(5, step=2), *(across(unsqueezed=way) for way in (True, False))),
    ],
    ids=[
        "less than a row",
        "left",
        "the one before",
        "later",
        "more places",
        "other places",
        "columns",
        "columns, expanded only",
    ],
)
def test_other_segments_are_not_taken_for_rows(fn: Callable[[Tensor], Tensor]):
    assert reduced(fn) == [30]


@pytest.mark.parametrize("fn", [by_segment(10), across(unsqueezed=False)], ids=["two rows", "columns"])
def test_other_segments_cross_the_batch(fn: Callable[[Tensor], Tensor]):
    found = scatters(bicompile.explain(fn, ROWS))
    assert found and {kind for kind, _ in found} == {"cross-batch"}


def test_bags_at_offsets_that_are_data_cross_the_batch():
    found = scatters(bicompile.explain(with_offsets, BAGS, torch.arange(0, 7 * 40, 40)))
    assert found and {kind for kind, _ in found} == {"cross-batch"}
