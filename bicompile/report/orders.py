"""The distinct orders of a certificate: their words, their parameters, who follows them, and a picture of each."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
import sys
from dataclasses import dataclass
from typing import Any

import torch
from markupsafe import Markup, escape

from ..certificate import Certificate
from ..passes.certify import CertifiedNode
from ..testing.declared import declared_order, declared_trees
from .drawing import Drawing, drawing_of

# A picture shows the shape of a tree, not thousands of summands: blocks and lanes are as small as these, and the
# number of summands crosses two of each and leaves a ragged tail.
_SMALL: dict[str, dict[str, Any]] = {
    "MatmulOrder": {"block": 4},
    "GpuMatmulOrder": {"group": 4},
    "ReductionOrder": {"lanes": 4, "section": 8},
    "GpuReductionOrder": {"lanes": 4, "section": 8},
    "AttentionOrder": {"block": 4, "lanes": 4},
    "GpuAttentionOrder": {"block": 4, "splits": ((0, 16),)},
    "GpuScanOrder": {"segment": 4},
}
_SUMMANDS = {"ReductionOrder": 19, "GpuReductionOrder": 19}
_USUAL_SUMMANDS = 11
# Trees of more summands than this are not written out.
_LONGEST = 4096

_TITLES = {
    "MatmulOrder": "matrix product",
    "ReductionOrder": "reduction over a row",
    "AttentionOrder": "attention",
    "ScanOrder": "scan",
    "ScatterOrder": "scatter",
}


# Ops that are made of others: of which, and which of the node's sizes each of these combines.
_MADE_OF = {
    "linear_log_probability": {"mm": slice(0, 1), "log_probability": slice(1, 2)},
    # For its rows where the weight is differentiated too.
    "linear_log_probability_backward": {"mm": slice(None)},
}


@dataclass(frozen=True)
class Picture:
    """One tree of an order: of what sum, drawn, and in words for each length that occurs."""

    what: str
    drawing: Drawing
    summands: int
    text: str
    lengths: dict[int, str]


@dataclass(frozen=True)
class Described:
    """One order as the page shows it."""

    title: str
    paragraphs: list[Markup]
    parameters: dict[str, str]
    changed: dict[str, tuple[str, str]]
    pictures: list[Picture]
    ops: list[str]
    nodes: int


def orders_of(certificate: Certificate) -> tuple[list[Described], dict[CertifiedNode, list[int]]]:
    """Every distinct order of ``certificate``, and which of them each node follows."""
    followers: dict[tuple[Any, str, str], list[tuple[CertifiedNode, list[int]]]] = {}
    number: dict[CertifiedNode, list[int]] = {}
    for node in [*certificate.lowered, *certificate.cross_batch]:
        for order, lengths in followed(node):
            key = (order, node.operand, node.device)
            followers.setdefault(key, []).append((node, lengths))
            number.setdefault(node, []).append(list(followers).index(key))
    return [_described(*key, found) for key, found in followers.items()], number


def followed(node: CertifiedNode) -> list[tuple[Any, list[int]]]:
    """The orders that are declared for ``node``, each with the lengths, where they are numbers, of its sums.

    None where nothing is added; an order of its own for each op that an op is made of.
    """
    op, sizes = short_name(node.op), [int(size) if size.isdecimal() else 0 for size in node.extent]
    attends = op.startswith("sdpa")
    depth = sizes[1] if attends else 0  # which sizes blocks on a GPU; other orders are asked for whatever the length
    if parts := _MADE_OF.get(op):
        sums = {part: sizes[which] for part, which in parts.items()}
    else:
        sums = {op: sizes if attends else [math.prod(sizes)] if sizes else []}
    found = [
        (declared_order(part, depth, getattr(torch, node.operand), node.device), lengths)
        for part, lengths in sums.items()
    ]
    return [(order, [n for n in lengths if n]) for order, lengths in found if order is not None]


def short_name(op: str) -> str:
    """``mm`` for ``bicompile.mm.default``."""
    return op.split(".")[1] if "." in op else op


def _described(order: Any, dtype: str, device: str, followers: list[tuple[CertifiedNode, list[int]]]) -> Described:
    kind = type(order).__name__
    title = _TITLES[kind.removeprefix("Gpu")]
    parameters = {f.name: getattr(order, f.name) for f in dataclasses.fields(order) if f.name != "length"}
    small = _SMALL.get(kind, {})
    count = _SUMMANDS.get(kind, _USUAL_SUMMANDS)
    lengths = sorted({n for _, sizes in followers for n in sizes if n <= _LONGEST})
    drawn = declared_trees(dataclasses.replace(order, **small), count)
    written = {n: declared_trees(order, n) for n in lengths}
    return Described(
        title=f"{title[0].upper()}{title[1:]}, {dtype}, {'CPU' if device == 'cpu' else 'GPU'}",
        paragraphs=_paragraphs(_words(type(order))),
        parameters={name: _shown(value) for name, value in parameters.items()},
        changed={name: (_shown(value), _shown(parameters[name])) for name, value in small.items()},
        pictures=[
            Picture(what, drawing_of(tree), count, str(tree), {n: str(trees[what]) for n, trees in written.items()})
            for what, tree in drawn.items()
        ],
        ops=sorted({short_name(node.op) for node, _ in followers}),
        nodes=len(followers),
    )


def _words(kind: type) -> str:
    """The docstring that states the order: the class's, or its module's where the class only lists its fields."""
    own = inspect.getdoc(kind) or ""
    return own if "\n\n" in own else inspect.cleandoc(sys.modules[kind.__module__].__doc__ or own)


def _paragraphs(text: str) -> list[Markup]:
    """Paragraphs of a docstring, ``code`` and *emphasis* marked up."""
    found = []
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        html = str(escape(" ".join(paragraph.split())))
        html = re.sub(r"``(.+?)``", r"<code>\1</code>", html)
        pieces = re.split(r"(<code>.*?</code>)", html)
        pieces[::2] = [re.sub(r"(\*{1,2})(\S.*?)\1", r"<em>\2</em>", piece) for piece in pieces[::2]]
        found.append(Markup("".join(pieces)))
    return found


def _shown(value: Any) -> str:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
