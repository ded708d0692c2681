"""Where the parts of a drawn summation tree lie: summands on top, additions below, the sum at the bottom."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..testing.trees import SummationTree

COLUMN, LEVEL, MARGIN = 26, 30, 16  # px: from summand to summand, from addition to addition, around


@dataclass(frozen=True)
class Spot:
    """A summand, by its index, or an addition; ``left`` and ``right`` are the ends of one of more than two terms."""

    x: float
    y: float
    text: str = "+"
    left: float = 0.0
    right: float = 0.0


@dataclass
class Drawing:
    """A tree in pixels, ready for an ``<svg>`` of this width and height."""

    width: float = 0.0
    height: float = 0.0
    summands: list[Spot] = field(default_factory=list)
    additions: list[Spot] = field(default_factory=list)
    lines: list[tuple[Spot, Spot]] = field(default_factory=list)


def drawing_of(tree: SummationTree) -> Drawing:
    """``tree`` laid out so that no two lines cross: summands stand in the order in which the tree has them."""
    drawing = Drawing()
    root, depth = _place(tree, drawing)
    drawing.width = 2 * MARGIN + COLUMN * max(len(drawing.summands) - 1, 1)
    drawing.height = 2 * MARGIN + LEVEL * depth + LEVEL
    result = Spot(root.x, root.y + LEVEL * 0.8, "sum")
    drawing.lines.append((root, result))
    return drawing


def _place(child: int | SummationTree, drawing: Drawing) -> tuple[Spot, int]:
    """Put ``child`` to the right of all that was placed before; where it is, and how many additions it is deep."""
    if isinstance(child, SummationTree) and len(child.children) == 1:
        (child,) = child.children
    if isinstance(child, int):
        spot = Spot(MARGIN + COLUMN * len(drawing.summands), MARGIN, str(child))
        drawing.summands.append(spot)
        return spot, 0
    placed = [_place(term, drawing) for term in child.children]
    depth = 1 + max(below for _, below in placed)
    ends = [spot.x for spot, _ in placed]
    x, y = sum(ends) / len(ends), MARGIN + LEVEL * depth
    spot = Spot(x, y, left=min(ends), right=max(ends)) if len(ends) > 2 else Spot(x, y)
    drawing.additions.append(spot)
    drawing.lines += [(above, spot) for above, _ in placed]
    return spot, depth
