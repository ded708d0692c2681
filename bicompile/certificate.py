"""The certificate: what was proven about a function, node by node, and how to read it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field

from .passes.certify import CertifiedNode

KINDS = ("lowered", "elementwise", "exact", "cross-batch", "allowed", "refused")


@dataclass(frozen=True)
class CertifiedGraph:
    """One captured graph.

    Attributes:
        name: ``inference``, ``forward`` or ``backward``, with a number where there are several.
        nodes: in execution order; those of a nested graph stand before the node that runs it.
    """

    name: str
    nodes: tuple[CertifiedNode, ...]


@dataclass(frozen=True)
class Certificate:
    """What ``bicompile.explain`` found.

    Two certificates compare equal if they say the same of the same nodes.

    Attributes:
        graphs: every graph, forward and backward, in the order in which they ran.
        graph_breaks: why Dynamo left the compiled code, one text for each break.  Between two graphs runs eager code,
            which nothing here covers; ``bicompile.eager()`` does.
        batch_symbols: the symbols that stand for the batch size in the graphs' shapes.  If there is none, the batch
            could not be followed, and a sum over it is listed as ``lowered``.
        subject: what was explained, by its name.
        inputs: what it was called with, in words.
    """

    graphs: tuple[CertifiedGraph, ...]
    graph_breaks: tuple[str, ...] = ()
    batch_symbols: tuple[str, ...] = ()
    subject: str = field(default="", compare=False)
    inputs: tuple[str, ...] = field(default=(), compare=False)

    @property
    def nodes(self) -> tuple[CertifiedNode, ...]:
        """The nodes of all graphs."""
        return tuple(node for graph in self.graphs for node in graph.nodes)

    @property
    def ok(self) -> bool:
        """Whether nothing was refused and no graph break left code uncovered."""
        return not self.refused and not self.graph_breaks

    @property
    def batch_is_symbolic(self) -> bool:
        """Whether the batch could be followed through the shapes."""
        return bool(self.batch_symbols)

    @property
    def lowered(self) -> tuple[CertifiedNode, ...]:
        """The nodes that run one of our ops and keep rows apart."""
        return self._of_kind("lowered")

    @property
    def cross_batch(self) -> tuple[CertifiedNode, ...]:
        """The nodes that combine rows of the batch: deterministic (P4), but not a function of one row (P1)."""
        return self._of_kind("cross-batch")

    @property
    def refused(self) -> tuple[CertifiedNode, ...]:
        """The nodes that are not proven; ``reason`` says what is missing."""
        return self._of_kind("refused")

    @property
    def counts(self) -> dict[str, int]:
        """How many nodes there are of each kind."""
        found = Counter(node.kind for node in self.nodes)
        return {kind: found[kind] for kind in KINDS}  # type: ignore[index]

    @property
    def verdict(self) -> str:
        """In words, whether the function is proven."""
        return "batch-invariant" if self.ok else "NOT proven batch-invariant"

    @property
    def proof(self) -> str:
        """What was shown about the orders: that those of the lowered nodes hold no symbol of the batch size."""
        if not self.batch_symbols:
            return (
                "the batch size is fixed in this graph, so that no order can be shown to be free of it: "
                "sums over the batch are listed as lowered"
            )
        batch = set(self.batch_symbols)
        free = [node for node in self.lowered if not batch & set(node.symbols)]
        assert len(free) == len(self.lowered), "an order that follows the batch was certified as lowered"
        symbols = ", ".join(self.batch_symbols)
        found = f"no order of a lowered node ({len(free)} of them) holds a symbol of the batch size ({symbols})"
        return found + (f"; those of {len(self.cross_batch)} cross-batch nodes do" if self.cross_batch else "")

    def _of_kind(self, kind: str) -> tuple[CertifiedNode, ...]:
        return tuple(node for node in self.nodes if node.kind == kind)

    def to_json(self, indent: int | None = 2) -> str:
        """As JSON: ``ok``, ``counts`` by kind, ``graph_breaks``, ``batch_symbols``, ``proof``, and ``nodes``."""
        return json.dumps(
            {
                "ok": self.ok,
                "subject": self.subject,
                "inputs": list(self.inputs),
                "counts": self.counts,
                "batch_is_symbolic": self.batch_is_symbolic,
                "batch_symbols": list(self.batch_symbols),
                "proof": self.proof,
                "graph_breaks": list(self.graph_breaks),
                "nodes": [{"graph": graph.name, **asdict(node)} for graph in self.graphs for node in graph.nodes],
            },
            indent=indent,
        )

    def to_html(self) -> str:
        """As a page of HTML that needs no other file: the nodes, their source lines, and the tree of each order."""
        from .report import page  # late: templates are for those who ask

        return page(self)

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {kind}" for kind, count in self.counts.items() if count)
        lines = [f"{self.verdict}: {counts or 'no nodes'}", self.proof]
        rows = [
            (node.kind, node.op, f"{node.dtype}{node.shape}", node.reason or node.order, place_of(node))
            for node in self.nodes
            if node.kind not in ("exact", "elementwise")
        ]
        if rows:
            widths = [max(len(row[column]) for row in rows) for column in range(4)]
            lines += [
                "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]]).rstrip()
                for row in rows
            ]
        lines += [f"graph break, what follows runs in eager: {reason}" for reason in self.graph_breaks]
        return "\n".join(lines)


def place_of(node: CertifiedNode) -> str:
    """Where the node comes from: the user's line, else the module."""
    return node.source or (f"module {node.module}" if node.module else "")
