"""The company in which ``assert_batch_invariant`` puts a row."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# again: unchanged.  alone: one row, also off alignment.  permuted: reversed, rotated, shuffled.  sub-batch: rows left
# out.  duplicated: one row repeated, in memory or by stride 0.  nan ... zero: every other row replaced.  offset ...
# transposed: layouts.LAYOUTS.  autograd: the forward without it, where gradients are checked.
SITUATIONS = (
    "again",
    "alone",
    "permuted",
    "sub-batch",
    "duplicated",
    "nan",
    "inf",
    "huge",
    "denormal",
    "zero",
    "offset",
    "strided",
    "transposed",
    "autograd",
)

FILLS = ("nan", "inf", "huge", "denormal", "zero")

AMONG = {
    "nan": "among NaN rows",
    "inf": "among Inf rows",
    "huge": "among rows of huge values",
    "denormal": "among rows of denormal values",
    "zero": "among zero rows",
}

LAID_OUT = {
    "offset": "at an unaligned storage offset",
    "strided": "in a wider buffer",
    "transposed": "with its last dims swapped in memory",
}


@dataclass(frozen=True)
class Situation:
    """One batch to run: which rows of the whole batch, in which order, with which of them filled, and where in memory.

    ``kept`` marks the positions that keep their values and are compared; empty means all.
    """

    name: str
    description: str
    rows: tuple[int, ...]
    kept: tuple[bool, ...] = ()
    fill: str | None = None
    layout: str = "contiguous"

    @property
    def kept_flags(self) -> tuple[bool, ...]:
        """``kept``, written out."""
        return self.kept or (True,) * len(self.rows)


def situations_for(num_rows: int, names: Sequence[str]) -> Iterator[Situation]:
    """The situations called ``names`` for a batch of ``num_rows``.

    Raises:
        ValueError: a name is not in ``SITUATIONS``.
    """
    for name in names:
        if name not in SITUATIONS:
            raise ValueError(f"situations: expected names out of {', '.join(SITUATIONS)}, got {name!r}")
    for name in names:
        if name == "again":
            yield Situation(name, "when run again", tuple(range(num_rows)))
        elif name == "autograd":
            yield Situation(name, "without autograd", tuple(range(num_rows)))
        elif num_rows > 0:
            yield from _situations_called(name, num_rows)


def fill_rows(t: Tensor, batch_dim: int, rows: Sequence[int], fill: str) -> None:
    """Replace ``rows`` of ``t`` in place.  Integers and booleans have no NaN: they only ever become zero."""
    if not (t.is_floating_point() or t.is_complex()):
        if fill == "zero":
            _put(t, batch_dim, rows, 0)
        return
    limits = torch.finfo(t.dtype)
    value = {
        "nan": float("nan"),
        "inf": float("inf"),
        "huge": limits.max,
        "denormal": limits.smallest_normal / 2,
        "zero": 0.0,
    }[fill]
    _put(t, batch_dim, rows, value)
    if fill != "nan":  # both signs, so that sums of infinities meet
        _put(t, batch_dim, rows[1::2], -value)


def _put(t: Tensor, batch_dim: int, rows: Sequence[int], value: float) -> None:
    for row in rows:
        t.select(batch_dim, row).fill_(value)


def _situations_called(name: str, num_rows: int) -> Iterator[Situation]:
    whole = tuple(range(num_rows))
    if name == "alone":
        for row in whole:
            yield Situation(name, "alone", (row,))
        yield Situation(name, "alone at an unaligned storage offset", (0,), layout="offset")
    elif name == "permuted":
        shuffled = random.Random(num_rows).sample(whole, num_rows)
        for rows in dict.fromkeys((whole[::-1], whole[1:] + whole[:1], tuple(shuffled))):
            if rows != whole:
                yield Situation(name, f"permuted to {_short(rows)}", rows)
    elif name == "sub-batch":
        parts = (whole[1:], whole[: num_rows // 2], (whole[-1], whole[0]))
        for rows in dict.fromkeys(parts):
            if 1 < len(rows) < num_rows:
                yield Situation(name, f"in the sub-batch {_short(rows)}", rows)
    elif name == "duplicated":
        copies = max(num_rows, 3)
        yield Situation(name, f"repeated {copies} times", (whole[-1],) * copies)
        yield Situation(name, f"repeated {copies} times by stride 0", (0,) * copies, layout="expanded")
    elif name in FILLS:
        yield from _among(name, num_rows)
    else:
        yield Situation(name, LAID_OUT[name], whole, layout=name)


def _among(fill: str, num_rows: int) -> Iterator[Situation]:
    """Rows next to filled ones: even rows kept, odd rows kept, and for NaN the last row kept by itself."""
    if num_rows == 1:
        yield Situation(fill, AMONG[fill], (0, 0, 0), kept=(False, True, False), fill=fill)
        return
    rows = tuple(range(num_rows))
    for parity in (0, 1):
        yield Situation(fill, AMONG[fill], rows, kept=tuple(row % 2 == parity for row in rows), fill=fill)
    if fill == "nan" and num_rows > 2:
        yield Situation(fill, AMONG[fill], rows, kept=(False,) * (num_rows - 1) + (True,), fill=fill)


def _short(rows: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, rows[:12]))
    return f"[{shown}, ...]" if len(rows) > 12 else f"[{shown}]"
