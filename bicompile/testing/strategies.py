"""Hypothesis strategies for batches.  They draw shape, dtype, layout and a seed, never entries: to shrink is to get
fewer rows.  Importing this file needs Hypothesis, which comes with the test extra."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

try:
    from hypothesis import strategies as st
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "bicompile.testing.strategies needs Hypothesis; install it with: pip install 'bicompile[test]'", name=error.name
    ) from error

from .layouts import LAYOUTS, lay_out
from .situations import AMONG, FILLS, LAID_OUT, Situation, fill_rows

# Lengths around the blocks that orders are made of (32 lanes, blocks of 192), and their ragged tails.
_TELLING_LENGTHS = (0, 1, 2, 3, 7, 16, 17, 31, 32, 33, 64, 96, 191, 192, 193, 257, 383, 384, 385, 577, 1000)

# Binades that a value may lie in: wide enough that every addition rounds, narrow enough that fp16 holds it.
_BINADES = {torch.float16: 6, torch.bfloat16: 20, torch.float32: 20, torch.float64: 40}


@dataclass(frozen=True)
class Batch:
    """A batch of rows and the company it may get; made by ``batches``.  Dim 0 holds the rows."""

    num_rows: int
    row_shape: tuple[int, ...]
    dtype: torch.dtype
    seed: int
    layout: str = "contiguous"
    order: tuple[int, ...] = ()
    fill: str = "random"
    left_pad: int = 0
    right_pad: int = 0

    def tensor(self) -> Tensor:
        """``[num_rows, *row_shape]``, in ``layout``."""
        return lay_out(self._values(), self.layout)

    def permuted(self) -> Tensor:
        """The rows in ``order``: row ``i`` is row ``order[i]`` of ``tensor()``."""
        return lay_out(self._values()[list(self.order)], self.layout)

    def alone(self, row: int) -> Tensor:
        """``[1, *row_shape]``: one row of ``tensor()``."""
        return lay_out(self._values()[row : row + 1], self.layout)

    def among_neighbours(self, row: int) -> Tensor:
        """``tensor()`` with every row but one replaced by ``fill``: other random values, NaN, Inf, huge, ..."""
        t = scattered_values((self.num_rows, *self.row_shape), self.dtype, self.seed + 1)
        if self.fill != "random":
            fill_rows(t, 0, range(self.num_rows), self.fill)
        if self.num_rows:
            t[row] = self._values()[row]
        return lay_out(t, self.layout)

    def padded(self, value: float = 0.0) -> Tensor:
        """``tensor()`` with ``left_pad`` and ``right_pad`` entries of ``value`` around dim 1."""
        t = self._values()
        if t.dim() < 2:
            raise ValueError(f"padded: expected rows with a sequence dim, got row_shape {self.row_shape}")
        left = t.new_full((t.shape[0], self.left_pad, *t.shape[2:]), value)
        right = t.new_full((t.shape[0], self.right_pad, *t.shape[2:]), value)
        return lay_out(torch.cat([left, t, right], dim=1), self.layout)

    def _values(self) -> Tensor:
        return scattered_values((self.num_rows, *self.row_shape), self.dtype, self.seed)


@dataclass(frozen=True, repr=False)
class Trial:
    """Two batches that share rows; made by ``trials``, run by ``bicompile.testing.trials.search``.

    Attributes:
        rows: which of the rows given make the first batch.
        order: which of the first batch's rows make the second.
        kept: which rows of the second keep their values and are compared; empty means all.
        fill: what the others hold.
        layout: where the second lies in memory, see ``layouts.LAYOUTS``.
        values: the seed of new floating-point values; None: those given.
        threads: CPU threads of the first and second; None: as many as there are.
        dynamic: whether the first and second run in what is compiled for dynamic shapes.
        padding: positions that the second has more on the left and on the right.
    """

    rows: tuple[int, ...]
    order: tuple[int, ...]
    kept: tuple[bool, ...] = ()
    fill: str | None = None
    layout: str = "contiguous"
    values: int | None = None
    threads: tuple[int | None, int | None] = (None, None)
    dynamic: tuple[bool, bool] = (False, False)
    padding: tuple[int, int] = (0, 0)

    def __repr__(self) -> str:
        told = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return f"Trial({', '.join(f'{name}={value!r}' for name, value in told.items())})"

    def situation(self) -> Situation:
        """The second batch."""
        parts = [f"in the batch of its rows {list(self.order)}"]
        if self.fill:
            parts.append(AMONG[self.fill])
        if self.layout != "contiguous":
            parts.append(LAID_OUT[self.layout])
        if self.threads[0] != self.threads[1]:
            first, second = (str(number or "all") for number in self.threads)
            parts.append(f"with {second} threads instead of {first}")
        if self.dynamic[0] != self.dynamic[1]:
            parts.append(f"compiled for {'dynamic' if self.dynamic[1] else 'static'} shapes")
        if any(self.padding):
            parts.append(f"padded by {self.padding[0]} on the left and {self.padding[1]} on the right")
        return Situation("trial", ", ".join(parts), self.order, self.kept, self.fill, self.layout)


def scattered_values(shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
    """Normal values times random powers of two, so that most orders of addition give different bits."""
    generator = torch.Generator().manual_seed(seed)
    if not dtype.is_floating_point:
        return torch.randint(0, 2 if dtype is torch.bool else 100, tuple(shape), generator=generator).to(dtype)
    reach = _BINADES[dtype]
    powers = torch.randint(-reach, reach // 4 + 1, tuple(shape), generator=generator)
    return torch.ldexp(torch.randn(tuple(shape), generator=generator, dtype=torch.float64), powers).to(dtype)


def seeds() -> st.SearchStrategy[int]:
    """Seeds of ``scattered_values``; none is simpler than another, so they do not shrink far."""
    return st.integers(0, 2**16)


def dtypes() -> st.SearchStrategy[torch.dtype]:
    """The floating-point dtypes that have CPU lowerings."""
    return st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])


def layouts() -> st.SearchStrategy[str]:
    """Places in memory, see ``layouts.LAYOUTS``."""
    return st.sampled_from(LAYOUTS)


def lengths(min_value: int = 0, max_value: int = 1000) -> st.SearchStrategy[int]:
    """Sizes of a reduced dim: block edges and ragged tails more often than chance would have them."""
    telling = [n for n in _TELLING_LENGTHS if min_value <= n <= max_value]
    anything = st.integers(min_value, max_value)
    return st.sampled_from(telling) | anything if telling else anything


def row_shapes(min_dims: int = 1, max_dims: int = 3, max_length: int = 1000) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes of one row: small leading dims and a last dim that crosses blocks."""
    leading = st.lists(st.integers(1, 4), min_size=min_dims - 1, max_size=max_dims - 1)
    return st.tuples(leading, lengths(1, max_length)).map(lambda parts: (*parts[0], parts[1]))


@st.composite
def batches(
    draw: st.DrawFn,
    row_shape: st.SearchStrategy[tuple[int, ...]] | tuple[int, ...] | None = None,
    dtype: st.SearchStrategy[torch.dtype] | torch.dtype | None = None,
    min_rows: int = 1,
    max_rows: int = 11,
    max_padding: int = 0,
) -> Batch:
    """Batches with their order, neighbours, layout and padding.  ``row_shape`` and ``dtype`` may be given or drawn."""
    num_rows = draw(st.integers(min_rows, max_rows))
    return Batch(
        num_rows=num_rows,
        row_shape=_drawn(draw, row_shape, row_shapes()),
        dtype=_drawn(draw, dtype, dtypes()),
        seed=draw(seeds()),
        layout=draw(layouts()),
        order=tuple(draw(st.permutations(range(num_rows)))),
        fill=draw(st.sampled_from(("random", *FILLS))),
        left_pad=draw(st.integers(0, max_padding)),
        right_pad=draw(st.integers(0, max_padding)),
    )


@st.composite
def trials(
    draw: st.DrawFn,
    num_rows: int,
    sizes: Sequence[int],
    floats: bool = True,
    new_values: bool = True,
    compiled: bool = False,
    max_padding: int = 0,
) -> Trial:
    """Trials of a function that was given ``num_rows`` rows, in batches of ``sizes``.

    Args:
        floats: whether there are floating-point rows, which can hold NaN and its like.
        new_values: whether such rows may get values of their own.
        compiled: whether there is a version for static shapes too; it runs in a batch of 1 and of ``num_rows`` only,
            because each size is compiled anew.
        max_padding: the most positions on either side.
    """
    size = st.sampled_from(sizes)
    first, second = draw(size), draw(size)
    rows = draw(st.lists(st.integers(0, num_rows - 1), min_size=first, max_size=first))
    order = draw(st.lists(st.integers(0, first - 1), min_size=second, max_size=second))
    fill = draw(st.none() | st.sampled_from(FILLS)) if floats and second > 1 else None
    kept: list[bool] = []
    if fill:
        kept = draw(st.lists(st.booleans(), min_size=second, max_size=second).filter(any))
    number = st.sampled_from([None, *dict.fromkeys((1, 2, os.cpu_count() or 1))])
    dynamic = [draw(st.booleans()) if compiled and n in (1, num_rows) else compiled for n in (first, second)]
    padding = st.integers(0, max_padding)
    return Trial(
        rows=tuple(rows),
        order=tuple(order),
        kept=tuple(kept),
        fill=fill,
        layout=draw(layouts()),
        values=draw(st.none() | seeds()) if floats and new_values else None,
        threads=(draw(number), draw(number)),
        dynamic=(dynamic[0], dynamic[1]),
        padding=(draw(padding), draw(padding)),
    )


def _drawn(draw: st.DrawFn, given, default):  # type: ignore[no-untyped-def]
    chosen = default if given is None else given
    return draw(chosen) if isinstance(chosen, st.SearchStrategy) else chosen
