"""A mask that several attentions on a GPU use is read once.  Traced with fake tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from bicompile.passes.share_mask_rows import share_mask_rows_pass

ops = torch.ops.bicompile


def twice(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    first = ops.sdpa(q, k, k, mask, False, 0.25)[0]
    return ops.sdpa(first, k, k, mask, False, 0.25)[0]


def once(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    return ops.sdpa(q, k, k, mask, False, 0.25)[0]


def two_masks(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    first = ops.sdpa(q, k, k, mask, False, 0.25)[0]
    return ops.sdpa(first, k, k, mask.expand(mask.shape), False, 0.25)[0]


def graph_of(fn: Callable[..., Tensor], mask: tuple[int, ...] | None, device: str = "cuda") -> GraphModule:
    with FakeTensorMode():
        q, k = (torch.empty(2, 4, n, 16, dtype=torch.bfloat16, device=device) for n in (5, 9))
        made = None if mask is None else torch.empty(mask, dtype=torch.bool, device=device)
        return make_fx(fn)(q, k, made)


@pytest.mark.parametrize("shape", [(2, 1, 5, 9), (1, 4, 5, 9), (5, 9)])
def test_shared_mask_is_read_once(shape: tuple[int, ...]):
    gm = graph_of(twice, shape)
    assert share_mask_rows_pass(gm).modified
    (rows,) = gm.graph.find_nodes(op="call_function", target=ops.mask_rows.default)
    attentions = gm.graph.find_nodes(op="call_function", target=ops.sdpa.default)
    assert len(attentions) == 2 and all(node.args[6] is rows for node in attentions)
    lead = (*(1,) * (4 - len(shape)), *shape[:-2])
    assert rows.meta["val"].shape == (3, *lead, 5) and rows.meta["val"].dtype == torch.int32


@pytest.mark.parametrize(
    ("fn", "mask", "device"),
    [
        (once, (2, 1, 5, 9), "cuda"),
        (two_masks, (2, 1, 5, 9), "cuda"),
        (twice, (2, 1, 1, 9), "cuda"),  # no row of its own for each query
        (twice, (2, 1, 5, 1), "cuda"),
        (twice, None, "cuda"),
        (twice, (2, 1, 5, 9), "cpu"),
    ],
)
def test_other_attentions_are_left_alone(fn: Callable[..., Tensor], mask: tuple[int, ...] | None, device: str):
    gm = graph_of(fn, mask, device)
    assert not share_mask_rows_pass(gm).modified
    assert not gm.graph.find_nodes(op="call_function", target=ops.mask_rows.default)
