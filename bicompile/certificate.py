"""The certificate: what was proven about a function, node by node, and how to read it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass

from .passes.certify import CertifiedNode

_KINDS = ("lowered", "elementwise", "exact", "cross-batch", "allowed", "refused")


@dataclass(frozen=True)
class Certificate:
    """What ``bicompile.explain`` found.

    Two certificates compare equal if they say the same of the same nodes.

    Attributes:
        nodes: every node of every graph, forward and backward, in execution order.
        graph_breaks: why Dynamo left the compiled code, one text for each break.  Between two graphs runs eager code,
            which nothing here covers; ``bicompile.eager()`` does.
        batch_is_symbolic: whether the batch could be followed through the shapes.  If not, a sum over it is listed
            as ``lowered``.
    """

    nodes: tuple[CertifiedNode, ...]
    graph_breaks: tuple[str, ...] = ()
    batch_is_symbolic: bool = True

    @property
    def ok(self) -> bool:
        """Whether nothing was refused and no graph break left code uncovered."""
        return not self.refused and not self.graph_breaks

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

    def _of_kind(self, kind: str) -> tuple[CertifiedNode, ...]:
        return tuple(node for node in self.nodes if node.kind == kind)

    def to_json(self, indent: int | None = 2) -> str:
        """As JSON: ``ok``, ``counts`` by kind, ``graph_breaks``, ``batch_is_symbolic`` and ``nodes``."""
        return json.dumps(
            {
                "ok": self.ok,
                "counts": self._counts(),
                "batch_is_symbolic": self.batch_is_symbolic,
                "graph_breaks": list(self.graph_breaks),
                "nodes": [asdict(node) for node in self.nodes],
            },
            indent=indent,
        )

    def _counts(self) -> dict[str, int]:
        found = Counter(node.kind for node in self.nodes)
        return {kind: found[kind] for kind in _KINDS}  # type: ignore[index]

    def __str__(self) -> str:
        verdict = "batch-invariant" if self.ok else "NOT proven batch-invariant"
        counts = ", ".join(f"{count} {kind}" for kind, count in self._counts().items() if count)
        lines = [f"{verdict}: {counts or 'no nodes'}"]
        if not self.batch_is_symbolic:
            lines.append("the batch size is fixed in this graph: sums over the batch are listed as lowered")
        rows = [
            (node.kind, node.op, f"{node.dtype}{node.shape}", node.reason or node.order, node.source)
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
