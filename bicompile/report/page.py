"""``page``: a certificate as one file of HTML, which loads nothing and runs no script."""

from __future__ import annotations

import itertools
import linecache
import os
import platform
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources

import jinja2
import torch

from ..certificate import Certificate
from ..passes.certify import CertifiedNode
from .orders import orders_of, short_name


@dataclass(frozen=True)
class Kind:
    """How the page shows a class of nodes: a letter as well as a colour, and what the class means."""

    name: str
    letter: str
    meaning: str


KINDS = (
    Kind("lowered", "L", "one of bicompile's ops, in a declared order that cannot see the batch"),
    Kind("elementwise", "e", "each number by itself; generated code whose rounding is pinned"),
    Kind("exact", "x", "moves, compares or selects values, or computes on integers: every way gives the same bits"),
    Kind("cross-batch", "B", "combines rows of the batch, in one fixed order: deterministic, no function of one row"),
    Kind("allowed", "A", "not proven; you take responsibility for it by name"),
    Kind("refused", "R", "not proven; compiling the function raises"),
)
_QUIET = ("elementwise", "exact")


@dataclass(frozen=True)
class Row:
    """One node as the page shows it."""

    node: CertifiedNode
    op: str
    result: str
    place: str
    file: str
    code: str
    orders: list[int]
    anchor: str


@dataclass(frozen=True)
class Stretch:
    """Neighbours in execution order: one telling node, or a run of quiet ones."""

    rows: list[Row]

    @property
    def quiet(self) -> bool:
        """Whether nothing is added here."""
        return self.rows[0].node.kind in _QUIET

    @property
    def summary(self) -> str:
        """What a run of quiet nodes does, in a line."""
        names = Counter(row.op for row in self.rows)
        shown = ", ".join(f"{name} ×{count}" if count > 1 else name for name, count in names.most_common(6))
        return shown + (", …" if len(names) > 6 else "")


def page(certificate: Certificate) -> str:
    """``certificate`` as HTML."""
    from .. import __version__

    orders, number = orders_of(certificate)
    graphs = [
        (graph, _counts(graph.nodes), list(_stretches(graph.nodes, number, str(i))))
        for i, graph in enumerate(certificate.graphs, 1)
    ]
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(resources.files(__package__).joinpath("page.html").read_text("utf-8"))
    return template.render(
        certificate=certificate,
        kinds=KINDS,
        letters={kind.name: kind.letter for kind in KINDS},
        counts=certificate.counts,
        graphs=graphs,
        orders=orders,
        refused=[_row(node, number, "") for node in certificate.refused],
        cross_batch=[_row(node, number, "") for node in certificate.cross_batch],
        versions=f"bicompile {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
    )


def _counts(nodes: tuple[CertifiedNode, ...]) -> list[tuple[str, int]]:
    found = Counter(node.kind for node in nodes)
    return [(kind.name, found[kind.name]) for kind in KINDS if found[kind.name]]  # type: ignore[index]


def _stretches(
    nodes: tuple[CertifiedNode, ...], number: dict[CertifiedNode, list[int]], graph: str
) -> Iterator[Stretch]:
    rows = [_row(node, number, f"n{graph}-{i}") for i, node in enumerate(nodes)]
    for quiet, run in itertools.groupby(rows, key=lambda row: row.node.kind in _QUIET):
        if quiet:
            yield Stretch(list(run))
        else:
            yield from (Stretch([row]) for row in run)


def _row(node: CertifiedNode, number: dict[CertifiedNode, list[int]], anchor: str) -> Row:
    place, code = _source(node.source)
    return Row(
        node=node,
        op=short_name(node.op) if node.kind != "refused" else node.op,
        result=f"{node.dtype}{node.shape}",
        place=place,
        file=node.source,
        code=code,
        orders=number.get(node, []),
        anchor=anchor,
    )


def _source(source: str) -> tuple[str, str]:
    """The place in short, and the text of the line, from ``file:line, in function``."""
    found = re.fullmatch(r"(.+):(\d+)(, in .+)?", source)
    if not found:
        return source, ""
    file, line, function = found.groups("")
    function = re.sub(r"torch_dynamo_resume_in_(.+)_at_\d+", r"\1", function)  # Dynamo's name for what follows a break
    short = file.rpartition("site-packages" + os.sep)[2]
    inside = os.path.relpath(short) if os.path.isabs(short) and short.startswith(os.getcwd() + os.sep) else short
    return f"{inside}:{line}{function}", linecache.getline(file, int(line)).strip()
