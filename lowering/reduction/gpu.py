"""Reductions on a GPU: one section of some rows in each program, along the rows or across them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from bicompile.lowering.gpu.launch import Launch
from bicompile.lowering.gpu.plans import Planned, new_dense
from bicompile.lowering.gpu.rows import (
    Cut,
    Level,
    combine,
    compute_dtype,
    divide,
    fold_chunks,
    is_full,
    load_chunk,
    mask_of,
    merged,
    neutral,
    row_offsets,
    square_root,
    tree_of_columns,
    triton_type,
)
from bicompile.lowering.gpu.selftest import require_rows

from .op import check_floating, reduced_dims, reduced_shape
from .schedule import ColumnsSchedule, RowSchedule, columns_schedule_for, merging_schedule_for, row_schedule_for

FOLLOWS_BATCH = ["num_rows", "width", "outer_stride"]


@triton.jit
def element(x, mask, HOW: tl.constexpr, PRE: tl.constexpr, center, power):
    """What is folded for one element ``x``; the neutral element where there is none."""
    y = x
    if PRE == "square":
        y = x * x
    elif PRE == "centered_square":
        y = (x - center) * (x - center)
    elif PRE == "magnitude":
        y = tl.abs(x)
    elif PRE == "nonzero":
        y = tl.where(x == 0, 0.0, 1.0).to(x.dtype)
    elif PRE == "power":
        y = libdevice.pow(tl.abs(x), power)
    if PRE == "centered_square" or PRE == "magnitude" or PRE == "power":
        y = tl.where(mask, y, neutral(HOW)).to(x.dtype)
    return y


@triton.jit
def finish(total, count, POST: tl.constexpr, POWER: tl.constexpr):
    """What becomes of the fold of a row of ``count`` elements."""
    if POST == "mean":
        return divide(total, tl.full(total.shape, 0.0, total.dtype) + count.to(total.dtype))
    elif POST == "root":
        return square_root(total)
    elif POST == "power":
        return libdevice.pow(total, tl.full(total.shape, POWER, total.dtype))
    elif POST == "divide":
        return divide(total, tl.full(total.shape, POWER, total.dtype))
    elif POST == "divide_root":
        return square_root(divide(total, tl.full(total.shape, POWER, total.dtype)))
    else:
        return total


@triton.jit(do_not_specialize=FOLLOWS_BATCH)
def _fold_rows_kernel(
    x_ptr,
    out_ptr,
    num_rows,
    n,
    sections,
    count,
    row_size,
    row_stride,
    row_step,
    col_size,
    col_stride,
    col_step,
    HOW: tl.constexpr,
    PRE: tl.constexpr,
    POST: tl.constexpr,
    ORD: tl.constexpr,
    POWER: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    CHUNKS: tl.constexpr,
    WHOLE: tl.constexpr,
    TWO_ROWS: tl.constexpr,
    COLS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Fold one section of ROWS rows; its result goes to ``out[row, section]``."""
    pid = tl.program_id(0).to(tl.int64)
    section = pid % sections
    rows = pid // sections * ROWS + tl.arange(0, ROWS)
    start = section * (LANES * CHUNKS)
    left = tl.minimum(n - start, LANES * CHUNKS).to(tl.int32)
    p = x_ptr + row_offsets(rows, row_size, row_stride, row_step, TWO_ROWS)
    if COLS != "two" and COLS != "two, wide":
        p += start * col_step
    power = tl.full([ROWS, LANES], ORD, COMPUTE)
    ys = ()
    for j in tl.static_range(CHUNKS):
        mask = mask_of(j, rows, num_rows, left, ROWS, LANES)
        k = j * LANES + tl.arange(0, LANES)
        if COLS == "dense":
            at = k
        elif COLS == "strided":
            at = k.to(tl.int64) * col_step
        elif COLS == "two":
            at = row_offsets(start.to(tl.int32) + k, col_size, col_stride, col_step, True)
        else:
            at = row_offsets(start + k, col_size, col_stride, col_step, True)
        x = load_chunk(p, at, mask, is_full(j, ROWS, CHUNKS, WHOLE), neutral(HOW), COMPUTE)
        ys = ys + (element(x, mask, HOW, PRE, 0.0, power),)
    result = finish(fold_chunks(ys, HOW, ROWS, LANES), count, POST, POWER)
    tl.store(out_ptr + rows * sections + section, result.to(out_ptr.dtype.element_ty), mask=rows < num_rows)


@triton.jit  # specialised on all: only of a width known to be divisible by 16 are several elements loaded at once
def _fold_columns_kernel(
    x_ptr,
    sum_ptr,
    out_ptr,
    n,
    sections,
    count,
    width,
    outer_stride,
    width_stride,
    col_size,
    col_stride,
    col_step,
    HOW: tl.constexpr,
    PRE: tl.constexpr,
    POST: tl.constexpr,
    ORD: tl.constexpr,
    POWER: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    CHUNKS: tl.constexpr,
    TWO: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Fold BLOCK lanes of one section of WIDTH rows that lie side by side: ``out[outer, section, block, row]``.

    For a centered square, ``sum_ptr`` has the sums of the sections: ``sum[outer, section, row]``.
    """
    blocks: tl.constexpr = LANES // BLOCK
    pid = tl.program_id(0).to(tl.int64)
    strips = (width + WIDTH - 1) // WIDTH
    side = pid % strips * WIDTH + tl.arange(0, WIDTH)
    block = pid // strips % blocks
    section = pid // strips // blocks % sections
    outer = pid // strips // blocks // sections
    inside = side < width
    center = tl.zeros([1, WIDTH], COMPUTE)
    if PRE == "centered_square":
        total = tl.load(sum_ptr + (outer * sections + section) * width + side, mask=inside, other=0.0)
        size = tl.minimum(n - section * (LANES * CHUNKS), LANES * CHUNKS)
        center = finish(total, size, "mean", 0.0)[None, :]
    p = x_ptr + outer * outer_stride + side * width_stride
    power = tl.full([BLOCK, WIDTH], ORD, COMPUTE)
    lanes = tl.full([BLOCK, WIDTH], neutral(HOW), COMPUTE)
    for j in tl.static_range(CHUNKS):
        k = section * (LANES * CHUNKS) + j * LANES + block * BLOCK + tl.arange(0, BLOCK)
        mask = (k < n)[:, None] & inside[None, :]
        at = row_offsets(k, col_size, col_stride, col_step, TWO)
        x = tl.load(p[None, :] + at[:, None], mask=mask, other=neutral(HOW)).to(COMPUTE)
        lanes = combine(lanes, element(x, mask, HOW, PRE, center, power), HOW)
    result = finish(tree_of_columns(lanes, HOW, BLOCK, WIDTH), count, POST, POWER)
    to = out_ptr + ((outer * sections + section) * blocks + block) * width + side
    tl.store(to, result.to(out_ptr.dtype.element_ty), mask=inside)


# -- Plans ------------------------------------------------------------------------------------------------------------

Step = Callable[[Tensor, Tensor], None]
"""Folds a tensor into a contiguous result."""


@dataclass(frozen=True)
class Fold:
    """What a fold computes: how two are combined, what is done before with each element and after with the result."""

    how: str = "add"
    pre: str = ""
    post: str = ""
    ord: float = 0.0
    power: float = 0.0

    @property
    def rest(self) -> Fold:
        """The same of what is folded already."""
        return replace(self, pre="")


@dataclass(frozen=True)
class Rows:
    """Where rows lie that are walked along: ``rows.count`` rows of ``cols.count`` elements."""

    rows: Level
    cols: Level
    device: torch.device

    def first(self, count: int) -> Rows:
        """The first ``count`` rows."""
        return replace(self, rows=replace(self.rows, count=count))


@dataclass(frozen=True)
class Columns:
    """Where rows lie that are walked across: ``width`` rows side by side, ``outer`` times, both (count, stride)."""

    outer: tuple[int, int]
    width: tuple[int, int]
    cols: Level
    itemsize: int
    device: torch.device

    @staticmethod
    def of(shape: tuple[int, int, int], compute: torch.dtype, device: torch.device) -> Columns:
        """A contiguous [outer, n, width]."""
        outer, n, width = shape
        return Columns((outer, n * width), (width, 1), Level(n, 1, 0, width, False), compute.itemsize, device)


def fold_rows(at: Rows, fold: Fold, compute: torch.dtype, count: int, schedule: RowSchedule | None = None) -> Step:
    """A step that folds each row of ``at``; a mean divides by ``count``."""
    cut = Cut.of(at.cols.count, compute)
    chosen = schedule or row_schedule_for(at.rows.count, cut.lanes, cut.chunks, cut.sections)
    wide = ", wide" if cut.n >= 2**31 else ""
    launch = Launch(
        _fold_rows_kernel,
        (triton.cdiv(at.rows.count, chosen.rows) * cut.sections,),
        (at.rows.count, cut.n, cut.sections, count, *at.rows.walk, *at.cols.walk),
        (
            *(fold.how, fold.pre, fold.post if cut.whole else "", fold.ord, fold.power),
            *(chosen.rows, cut.lanes, cut.chunks, cut.whole, at.rows.two),
            "dense" if at.cols.dense else f"two{wide}" if at.cols.two else "strided",
            triton_type(compute),
        ),
        chosen.warps,
    )
    index = at.device.index
    if cut.whole:
        return lambda x, out: launch(index, x, out)
    shape = (at.rows.count, cut.sections)
    parts = Rows(Level(shape[0], 1, 0, shape[1], False), Level(shape[1], 1, 0, 1, False), at.device)
    rest = fold_rows(parts, fold.rest, compute, count, schedule)

    def run(x: Tensor, out: Tensor) -> None:
        sections = torch.empty(shape, dtype=compute, device=at.device)
        launch(index, x, sections)
        rest(sections, out)

    return run


def fold_sections(
    at: Columns, fold: Fold, compute: torch.dtype, count: int, schedule: ColumnsSchedule | None = None
) -> tuple[Launch, int, Cut]:
    """The launch that folds blocks of lanes of each section of ``at``; the number of blocks, and the cut."""
    cut = Cut.of(at.cols.count, compute)
    chosen = schedule or columns_schedule_for(at.width[0], cut.lanes, at.itemsize)
    blocks = cut.lanes // chosen.block
    whole = cut.whole and blocks == 1
    launch = Launch(
        _fold_columns_kernel,
        (triton.cdiv(at.width[0], chosen.width) * blocks * cut.sections * at.outer[0],),
        (cut.n, cut.sections, count, at.width[0], at.outer[1], at.width[1], *at.cols.walk),
        (
            *(fold.how, fold.pre, fold.post if whole else "", fold.ord, fold.power),
            *(chosen.width, chosen.block, cut.lanes, cut.chunks, at.cols.two, triton_type(compute)),
        ),
        chosen.warps,
    )
    return launch, blocks, cut


def fold_columns(
    at: Columns, fold: Fold, compute: torch.dtype, count: int, schedule: ColumnsSchedule | None = None
) -> Step:
    """A step that folds rows that lie side by side, in the order that ``fold_rows`` has."""
    launch, blocks, cut = fold_sections(at, fold, compute, count, schedule)
    index, parts = at.device.index, blocks * cut.sections
    if parts == 1:
        return lambda x, out: launch(index, x, None, out)
    rest = fold_partial_columns(at.outer[0], cut, blocks, at.width[0], fold.rest, compute, count, at.device)

    def run(x: Tensor, out: Tensor) -> None:
        partial = torch.empty((at.outer[0], parts, at.width[0]), dtype=compute, device=at.device)
        launch(index, x, None, partial)
        rest(partial, out)

    return run


def fold_partial_columns(
    outer: int,
    cut: Cut,
    blocks: int,
    width: int,
    fold: Fold,
    compute: torch.dtype,
    count: int,
    device: torch.device,
) -> Step:
    """A step that ends the fold of a contiguous [outer, section, block, width]: blocks of lanes are folded already."""
    parts = blocks * cut.sections
    if parts <= cut.lanes:
        # One tree over the blocks of all sections has the tree of each section at its foot.
        return _fold_blocks((outer, parts, width), fold, compute, count, device)
    sections = (outer, cut.sections, width)
    first = _fold_blocks((outer * cut.sections, blocks, width), replace(fold, post=""), compute, 0, device)
    second = fold_columns(Columns.of(sections, compute, device), fold, compute, count)

    def run(partial: Tensor, out: Tensor) -> None:
        folded = torch.empty(sections, dtype=compute, device=device)
        first(partial, folded)
        second(folded, out)

    return run


def fold_columns_by_section(
    at: Columns, fold: Fold, compute: torch.dtype, schedule: ColumnsSchedule | None = None
) -> Callable[[Tensor, Tensor | None, Tensor], None]:
    """A step that folds each section of rows that lie side by side, around the means of given sums if it centers.

    Sums and result are contiguous [outer, sections, width].
    """
    fold = replace(fold, post="")
    launch, blocks, cut = fold_sections(at, fold, compute, 0, schedule)
    index = at.device.index
    if blocks == 1:
        return lambda x, sums, out: launch(index, x, sums, out)
    shape = (at.outer[0] * cut.sections, blocks, at.width[0])
    rest = _fold_blocks(shape, fold.rest, compute, 0, at.device)

    def run(x: Tensor, sums: Tensor | None, out: Tensor) -> None:
        lanes = torch.empty(shape, dtype=compute, device=at.device)
        launch(index, x, sums, lanes)
        rest(lanes, out)

    return run


def _fold_blocks(
    shape: tuple[int, int, int], fold: Fold, compute: torch.dtype, count: int, device: torch.device
) -> Step:
    """A step that folds the middle dim of a contiguous [outer, blocks, width] by one tree."""
    lanes = triton.next_power_of_2(shape[1])
    schedule = merging_schedule_for(shape[2], lanes)
    launch, blocks, cut = fold_sections(Columns.of(shape, compute, device), fold, compute, count, schedule)
    assert blocks == 1 and cut.whole
    return lambda x, out: launch(device.index, x, None, out)


def layout_of(x: Tensor, dims: set[int]) -> Rows | Columns | None:
    """Where the rows of ``x`` lie whose elements lie along ``dims``; None if that takes more than two levels."""
    where = list(zip(x.shape, x.stride(), strict=True))
    kept = [where[d] for d in range(x.dim()) if d not in dims]
    rows, cols, sides = Level.of(kept), Level.of([where[d] for d in sorted(dims) if d < x.dim()]), merged(kept)
    if rows is None or cols is None:
        return None
    if cols.count > 1 and not cols.dense and sides and sides[-1][1] == 1 and sides[-1][0] > 1:
        outer = sides[0] if len(sides) == 2 else (1, 0)
        return Columns(outer, sides[-1], cols, x.element_size(), x.device)
    return Rows(rows, cols, x.device)


def rows_last(x: Tensor, dims: set[int]) -> Tensor:
    """A contiguous copy of ``x`` with ``dims`` last."""
    return x.permute(*(d for d in range(x.dim()) if d not in dims), *sorted(dims)).contiguous()


def plan_fold(x: Tensor, dims: set[int], fold: Fold, compute: torch.dtype) -> Step:
    """A step for tensors that lie like ``x``."""
    require_rows(x.device)
    at = layout_of(x, dims)
    if isinstance(at, Columns):
        return fold_columns(at, fold, compute, at.cols.count)
    if at is not None:
        return fold_rows(at, fold, compute, at.cols.count)
    rows, n = math.prod(s for d, s in enumerate(x.shape) if d not in dims), math.prod(x.shape[d] for d in dims)
    step = fold_rows(Rows(Level(rows, 1, 0, n, False), Level(n, 1, 0, 1, False), x.device), fold, compute, n)
    return lambda x, out: step(rows_last(x, dims), out)


# -- The ops ----------------------------------------------------------------------------------------------------------

FOLDS = {
    "sum": Fold(),
    "mean": Fold(post="mean"),
    "sum_square": Fold(pre="square"),
    "mean_square": Fold(pre="square", post="mean"),
    "prod": Fold("multiply"),
    "amax": Fold("larger"),
    "amin": Fold("smaller"),
}
_OF_NOTHING = {"mean": math.nan, "mean_square": math.nan, "prod": 1.0}


def reduce(name: str, x: Tensor, dim: Sequence[int], keepdim: bool, dtype: torch.dtype) -> Tensor:
    """``bicompile::sum`` and its kin, by name."""
    return _folded(x, name, FOLDS[name], tuple(dim), keepdim, dtype, _OF_NOTHING.get(name, 0.0))


sum, mean, sum_square, mean_square, prod, amax, amin = (functools.partial(reduce, name) for name in FOLDS)


def vector_norm(x: Tensor, ord: float, dim: Sequence[int], keepdim: bool, dtype: torch.dtype) -> Tensor:
    """``(sum |x|**ord)**(1 / ord)``; the largest or smallest magnitude, or the number of nonzero elements."""
    if ord == 0:
        fold = Fold(pre="nonzero")
    elif ord == 1:
        fold = Fold(pre="magnitude")
    elif ord == 2:
        fold = Fold(pre="square", post="root")
    elif math.isinf(ord):
        fold = Fold("larger" if ord > 0 else "smaller", "magnitude")
    else:
        fold = Fold(pre="power", post="power", ord=ord, power=1 / ord)
    return _folded(x, "vector_norm", fold, tuple(dim), keepdim, dtype, 0.0)


@Planned
def _folded(
    x: Tensor, op: str, fold: Fold, dim: tuple[int, ...], keepdim: bool, dtype: torch.dtype, of_nothing: float
) -> Callable[..., Tensor]:
    check_floating(op, "x", x.dtype)
    check_floating(op, "dtype", dtype)
    shape = reduced_shape(op, x, dim, keepdim)
    new = new_dense(x, shape, dtype)
    if math.prod(shape) == 0:
        return lambda x, *how: new()
    if x.numel() == 0:
        torch._check(
            fold.how in ("add", "multiply"),
            lambda: (
                f"bicompile::{op}: expected at least one element in each row, got shape {tuple(x.shape)}; "
                "give the reduced dims a size"
            ),
        )
        return lambda x, *how: new().fill_(of_nothing)
    step = plan_fold(x, reduced_dims(op, dim, x.dim()), fold, compute_dtype(dtype))

    def run(x: Tensor, *how: Any) -> Tensor:
        out = new()
        step(x, out)
        return out

    return run
