"""Recognise an index that sends each position to the row of the batch that it is in, as ``embedding_bag``'s does.

In a graph, for ``B`` rows of ``L`` positions::

    starts: "i64[B]" = prims.iota.default(B, start=0, step=L)
    place: "i64[B*L]" = prims.iota.default(B*L, start=0, step=1)
    searchsorted: "i64[B*L]" = aten.searchsorted.Tensor(starts, place, right=True)
    index: "i64[B*L]" = aten.sub.Tensor(searchsorted, 1)           # place // L

What is scattered by it into ``B`` destinations is what ``view(B, L).sum(1)`` adds, so each destination combines ``L``
elements.  Left alone, and then over all of ``B*L``: offsets that are data, other steps, more or fewer destinations.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch.fx import Node

from .rewriting import arguments

aten = torch.ops.aten
prims = torch.ops.prims


def segment_length(index: Node, destinations: Any, positions: Any, dim: int) -> Any | None:
    """How many of ``positions`` go to each of ``destinations``, in their order; None where that is not proven.

    Args:
        index: along the scattered dim, or expanded from that into dims behind it.
        destinations, positions: sizes of the destination and of the source along the scattered dim.
        dim: the scattered dim, of which only the first is looked at.
    """
    if dim != 0:
        return None
    while index.target in (aten.unsqueeze.default, aten.expand.default):
        index, size = index.all_input_nodes[0], index.args[1]
        dims = index.meta["val"].dim()
        # A dim before the scattered one, of unsqueeze, or of expand, which puts new ones in front.
        if size not in (-1, dims) if isinstance(size, int) else len(size) != dims:
            return None
    if index.target is not aten.sub.Tensor or index.args[1:] != (1,) or index.kwargs:
        return None
    search = index.args[0]
    if not isinstance(search, Node) or search.target is not aten.searchsorted.Tensor:
        return None
    given = arguments(search)
    if not given["right"] or given["side"] == "left" or given["sorter"] is not None:
        return None
    starts, place = (_progression(given[name]) for name in ("sorted_sequence", "self"))
    if starts is None or place is None or place[1] != 1:
        return None
    (rows, length), (number, _) = starts, place
    whole = _same(rows, destinations) and _same(number, positions) and _same(_size(rows) * _size(length), number)
    return length if whole and _size(length).is_positive else None


def _progression(node: Any) -> tuple[Any, Any] | None:
    """Number and step of the integers 0, step, 2 * step, ... that a node makes; None for other nodes."""
    if not isinstance(node, Node) or node.target is not prims.iota.default or node.kwargs.get("start") != 0:
        return None
    number, step = (v.meta["val"] if isinstance(v, Node) else v for v in (node.args[0], node.kwargs["step"]))
    return number, step


def _same(a: Any, b: Any) -> bool:
    return sympy.expand(_size(a) - _size(b)) == 0


def _size(value: Any) -> sympy.Expr:
    return value.node.expr if isinstance(value, torch.SymInt) else sympy.sympify(value)
