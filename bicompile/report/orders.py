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


def orders_of(certificate: Certificate) -> tuple[list[Described], dict[CertifiedNode, int]]:
    """Every distinct order of ``certificate``, and which of them each node follows."""
    followers: dict[tuple[Any, str, str], list[CertifiedNode]] = {}
    for node in [*certificate.lowered, *certificate.cross_batch]:
        if (order := order_of(node)) is not None:
            followers.setdefault((order, node.operand, node.device), []).append(node)
    number = {node: i for i, nodes in enumerate(followers.values()) for node in nodes}
    return [_described(order, dtype, device, nodes) for (order, dtype, device), nodes in followers.items()], number


def order_of(node: CertifiedNode) -> Any:
    """What the lowering declares for ``node``, whatever its length; None where nothing is added."""
    attends = short_name(node.op).startswith("sdpa")
    length = int(node.extent[1]) if attends else 0  # the depth of the heads, which sizes blocks on a GPU
    return declared_order(short_name(node.op), length, getattr(torch, node.operand), node.device)


def lengths_of(node: CertifiedNode) -> list[int]:
    """How many elements are combined, where that is a number; attention has several sums, each of a length."""
    if not node.extent or not all(size.isdecimal() for size in node.extent):
        return []
    sizes = [int(size) for size in node.extent]
    return sizes if short_name(node.op).startswith("sdpa") else [math.prod(sizes)]


def short_name(op: str) -> str:
    """``mm`` for ``bicompile.mm.default``."""
    return op.split(".")[1] if "." in op else op


def _described(order: Any, dtype: str, device: str, nodes: list[CertifiedNode]) -> Described:
    kind = type(order).__name__
    title = _TITLES[kind.removeprefix("Gpu")]
    parameters = {f.name: getattr(order, f.name) for f in dataclasses.fields(order) if f.name != "length"}
    small = _SMALL.get(kind, {})
    count = _SUMMANDS.get(kind, _USUAL_SUMMANDS)
    lengths = sorted({n for node in nodes for n in lengths_of(node) if 0 < n <= _LONGEST})
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
        ops=sorted({short_name(node.op) for node in nodes}),
        nodes=len(nodes),
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
