"""Statistics of rows that need two looks at them: mean and squared distances from it, maximum and sum of exponentials.

A section is read once and held in registers for both looks.  The statistics of the sections are then merged: a row of
one section never needs that.

Numerics: *moments* of a section are its sum and ``m2``, the sum of squared distances from its own mean; sections of
``c`` elements merge into ``mean = sum of sums / n`` and ``sum of (m2 + c * (mean of section - mean)**2)``.  *Powers* of
a section are its largest element and the sum of ``exp(x - largest)``; they merge into the largest of all and the sum of
``sum of section * exp(largest of section - largest)``.  Every sum has the order of ``order.gpu_order_for``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bicompile.lowering.gpu.launch import Launch
from bicompile.lowering.gpu.plans import Planned, new_dense
from bicompile.lowering.gpu.rows import (
    Cut,
    Level,
    compute_dtype,
    divide,
    exponential,
    fold_chunks,
    load_section,
    mask_of,
    row_offsets,
    top_of,
    triton_type,
)
from bicompile.lowering.gpu.selftest import require_rows

from .gpu import FOLLOWS_BATCH, Columns, Fold, Rows, finish, fold_columns_by_section, layout_of, rows_last
from .op import check_floating, reduced_dims, reduced_shape
from .schedule import row_schedule_for

MERGED_ON_THE_WAY = 64
"""Up to so many sections of a row are merged by every program that needs the result; more get a launch of their own."""


# -- Moments ----------------------------------------------------------------------------------------------------------


@triton.jit
def squares_of(
    xs,
    mean,
    rows,
    num_rows,
    left,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """The squared distance of each element from the mean of its row; 0 past the end of a row."""
    squares = ()
    for j in tl.static_range(len(xs)):
        d = xs[j] - mean[:, None]
        squares = squares + (tl.where(mask_of(j, rows, num_rows, left, ROWS, LANES), d * d, 0.0).to(xs[j].dtype),)
    return squares


@triton.jit(do_not_specialize=FOLLOWS_BATCH)
def moments_kernel(
    x_ptr,
    sum_ptr,
    m2_ptr,
    num_rows,
    n,
    sections,
    row_size,
    row_stride,
    row_step,
    POST: tl.constexpr,
    DEGREES: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    CHUNKS: tl.constexpr,
    WHOLE: tl.constexpr,
    TWO_ROWS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Sum and m2 of one section of ROWS dense rows; with POST, mean and variance of rows of one section."""
    pid = tl.program_id(0).to(tl.int64)
    section = pid % sections
    rows = pid // sections * ROWS + tl.arange(0, ROWS)
    start = section * (LANES * CHUNKS)
    left = tl.minimum(n - start, LANES * CHUNKS).to(tl.int32)
    p = x_ptr + row_offsets(rows, row_size, row_stride, row_step, TWO_ROWS) + start
    xs = load_section(p, rows, num_rows, left, 0.0, ROWS, LANES, CHUNKS, WHOLE, COMPUTE)
    total = fold_chunks(xs, "add", ROWS, LANES)
    mean = finish(total, left, "mean", 0.0)
    squares = squares_of(xs, mean, rows, num_rows, left, ROWS, LANES)
    m2 = finish(fold_chunks(squares, "add", ROWS, LANES), n, POST, DEGREES)
    if POST != "":
        total = mean
    to = rows * sections + section
    tl.store(sum_ptr + to, total.to(sum_ptr.dtype.element_ty), mask=rows < num_rows)
    tl.store(m2_ptr + to, m2.to(m2_ptr.dtype.element_ty), mask=rows < num_rows)


@triton.jit
def merged_moments(
    sum_ptr,
    m2_ptr,
    first,
    step,
    part,
    parts,
    size,
    n,
    LANES: tl.constexpr,
    CHUNKS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Sum, mean and m2, each [1], of the parts of one row from number ``part`` on.

    ``parts`` parts are left, of which LANES * CHUNKS are taken; each but the last of the row has ``size`` elements,
    the row has ``n``.  The statistics of part ``i`` lie at ``first + i * step``.
    """
    size = size.to(tl.int64)
    sums, counts, m2s = (), (), ()
    for j in tl.static_range(CHUNKS):
        i = (j * LANES + tl.arange(0, LANES))[None, :]
        there = i < parts
        at = first + (part + i) * step
        sums = sums + (tl.load(sum_ptr + at, mask=there, other=0.0).to(COMPUTE),)
        m2s = m2s + (tl.load(m2_ptr + at, mask=there, other=0.0).to(COMPUTE),)
        counts = counts + (tl.minimum(n - (part + i) * size, size).to(COMPUTE),)
    count = tl.minimum(n - part * size, LANES * CHUNKS * size)
    total = fold_chunks(sums, "add", 1, LANES)
    mean = finish(total, count, "mean", 0.0)
    moved = ()
    for j in tl.static_range(CHUNKS):
        there = (j * LANES + tl.arange(0, LANES))[None, :] < parts
        d = divide(sums[j], counts[j]) - mean[:, None]
        moved = moved + (tl.where(there, m2s[j] + counts[j] * (d * d), 0.0).to(COMPUTE),)
    return total, mean, fold_chunks(moved, "add", 1, LANES)


@triton.jit(do_not_specialize=FOLLOWS_BATCH)
def _merge_moments_kernel(
    sum_ptr,
    m2_ptr,
    out_sum_ptr,
    out_m2_ptr,
    parts,
    groups,
    size,
    n,
    width,
    POST: tl.constexpr,
    DEGREES: tl.constexpr,
    LANES: tl.constexpr,
    CHUNKS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Merge up to LANES * CHUNKS parts of one row of ``in[outer, part, width]`` into ``out[outer, group, width]``."""
    pid = tl.program_id(0).to(tl.int64)
    group = pid % groups
    row = pid // groups
    first = row // width * width * parts + row % width
    part = group * (LANES * CHUNKS)
    total, mean, m2 = merged_moments(sum_ptr, m2_ptr, first, width, part, parts - part, size, n, LANES, CHUNKS, COMPUTE)
    m2 = finish(m2, n, POST, DEGREES)
    if POST != "":
        total = mean
    to = (row // width * groups + group) * width + row % width + tl.arange(0, 1)
    tl.store(out_sum_ptr + to, total.to(out_sum_ptr.dtype.element_ty))
    tl.store(out_m2_ptr + to, m2.to(out_m2_ptr.dtype.element_ty))


# -- Powers -----------------------------------------------------------------------------------------------------------


@triton.jit
def shift_of(top, LSE: tl.constexpr):
    """What is subtracted before exponentials are taken: the maximum, +0 for -0.

    A maximum of -inf becomes 0, so that rows of nothing else sum to 0; for a log-sum-exp +inf does too, as in torch.
    """
    if LSE:
        return tl.where(tl.abs(top) == float("inf"), 0.0, top) + 0.0
    else:
        return tl.where(top == float("-inf"), 0.0, top) + 0.0


@triton.jit
def powers_of(xs, shift, FAST: tl.constexpr):
    """``exp(x - shift)`` of each chunk; 0 for the -inf past the end of a row."""
    powers = ()
    for j in tl.static_range(len(xs)):
        powers = powers + (exponential(xs[j] - shift[:, None], FAST),)
    return powers


@triton.jit
def store_last(shift_ptr, sum_ptr, rows, shift, total, live, LSE: tl.constexpr):
    """Write the log-sum-exp of ``rows`` if LSE, else what was subtracted and the logarithm of the sum of the rest."""
    if LSE:
        tl.store(sum_ptr + rows, (tl.log(total) + shift).to(sum_ptr.dtype.element_ty), mask=live)
    else:
        tl.store(shift_ptr + rows, shift, mask=live)
        tl.store(sum_ptr + rows, tl.log(total), mask=live)


@triton.jit(do_not_specialize=FOLLOWS_BATCH)
def powers_kernel(
    x_ptr,
    top_ptr,
    sum_ptr,
    num_rows,
    n,
    sections,
    row_size,
    row_stride,
    row_step,
    LSE: tl.constexpr,
    LAST: tl.constexpr,
    FAST: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    CHUNKS: tl.constexpr,
    WHOLE: tl.constexpr,
    TWO_ROWS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Largest element and sum of exponentials of one section of ROWS dense rows; if LAST, see ``store_last``."""
    pid = tl.program_id(0).to(tl.int64)
    section = pid % sections
    rows = pid // sections * ROWS + tl.arange(0, ROWS)
    start = section * (LANES * CHUNKS)
    left = tl.minimum(n - start, LANES * CHUNKS).to(tl.int32)
    p = x_ptr + row_offsets(rows, row_size, row_stride, row_step, TWO_ROWS) + start
    xs = load_section(p, rows, num_rows, left, float("-inf"), ROWS, LANES, CHUNKS, WHOLE, COMPUTE)
    top = top_of(xs)
    shift = shift_of(top, LSE)
    total = fold_chunks(powers_of(xs, shift, FAST), "add", ROWS, LANES)
    live = rows < num_rows
    if LAST:
        store_last(top_ptr, sum_ptr, rows, shift, total, live, LSE)
    else:
        tl.store(top_ptr + rows * sections + section, top, mask=live)
        tl.store(sum_ptr + rows * sections + section, total, mask=live)


@triton.jit
def merge_powers(tops, sums, LSE: tl.constexpr, FAST: tl.constexpr, LANES: tl.constexpr):
    """Largest element, shift and sum of exponentials, each [1], of parts with these: tuples of [1, LANES]."""
    top = top_of(tops)
    shift = shift_of(top, LSE)
    scaled = ()
    for j in tl.static_range(len(tops)):
        # A largest element of -inf, with a sum of 0, gives 0; one of +inf, with a sum of +inf or NaN, keeps that.
        scaled = scaled + (sums[j] * exponential(tops[j] - shift[:, None], FAST),)
    return top, shift, fold_chunks(scaled, "add", 1, LANES)


@triton.jit
def merged_powers(
    top_ptr, sum_ptr, first, parts, LSE: tl.constexpr, FAST: tl.constexpr, LANES: tl.constexpr, CHUNKS: tl.constexpr
):
    """``merge_powers`` of the first LANES * CHUNKS of ``parts`` parts; those of part ``i`` lie at ``first + i``."""
    tops, sums = (), ()
    for j in tl.static_range(CHUNKS):
        i = (j * LANES + tl.arange(0, LANES))[None, :]
        tops = tops + (tl.load(top_ptr + first + i, mask=i < parts, other=float("-inf")),)
        sums = sums + (tl.load(sum_ptr + first + i, mask=i < parts, other=0.0),)
    return merge_powers(tops, sums, LSE, FAST, LANES)


@triton.jit
def _merge_powers_kernel(
    top_ptr,
    sum_ptr,
    out_top_ptr,
    out_sum_ptr,
    parts,
    groups,
    LSE: tl.constexpr,
    LAST: tl.constexpr,
    FAST: tl.constexpr,
    LANES: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Merge up to LANES * CHUNKS parts of one row of ``in[row, part]`` into ``out[row, group]``."""
    pid = tl.program_id(0).to(tl.int64)
    part = pid % groups * (LANES * CHUNKS)
    first = pid // groups * parts + part
    top, shift, total = merged_powers(top_ptr, sum_ptr, first, parts - part, LSE, FAST, LANES, CHUNKS)
    to = pid + tl.arange(0, 1)
    if LAST:
        store_last(out_top_ptr, out_sum_ptr, to, shift, total, to >= 0, LSE)
    else:
        tl.store(out_top_ptr + to, top)
        tl.store(out_sum_ptr + to, total)


# -- Plans ------------------------------------------------------------------------------------------------------------

Pair = tuple[Tensor, Tensor]


class Statistics:
    """A step that takes the two statistics of each section of rows, then merges them.

    Args:
        first: writes the statistics of the sections of its first argument into the two others.
        merges: launches that read two statistics and write two.
        sizes: how many of each ``first`` and every merge gives.
    """

    def __init__(
        self,
        first: Callable[[Tensor, Tensor, Tensor], None],
        merges: Sequence[Launch],
        sizes: Sequence[int],
        compute: torch.dtype,
        device: torch.device,
    ) -> None:
        self.first, self.merges, self.sizes, self.compute, self.device = first, merges, sizes, compute, device

    def __call__(self, x: Tensor, last: Pair | None = None) -> Pair:
        """The statistics that are left in the end; written into ``last`` if it is given."""
        found = self._new(0) if self.merges or last is None else last
        self.first(x, *found)
        for i, launch in enumerate(self.merges, 1):
            new = last if last is not None and i == len(self.merges) else self._new(i)
            launch(self.device.index, *found, *new)
            found = new
        return found

    def _new(self, i: int) -> Pair:
        return (
            torch.empty(self.sizes[i], dtype=self.compute, device=self.device),
            torch.empty(self.sizes[i], dtype=self.compute, device=self.device),
        )


def section_launch(kernel: object, at: Rows, compute: torch.dtype, options: tuple[object, ...]) -> tuple[Launch, Cut]:
    """The launch of a kernel that holds one section of dense rows in each program."""
    cut = Cut.of(at.cols.count, compute)
    chosen = row_schedule_for(at.rows.count, cut.lanes, cut.chunks, cut.sections)
    launch = Launch(
        kernel,
        (triton.cdiv(at.rows.count, chosen.rows) * cut.sections,),
        (at.rows.count, cut.n, cut.sections, *at.rows.walk),
        (*options, chosen.rows, cut.lanes, cut.chunks, cut.whole, at.rows.two, triton_type(compute)),
        chosen.warps,
    )
    return launch, cut


def moments(at: Rows | Columns, compute: torch.dtype, last: tuple[str, float] | None) -> tuple[Statistics, int]:
    """Sum and m2 of each row of ``at``, and of how many parts of a row they are, at most MERGED_ON_THE_WAY.

    With ``last``, of one part: its mean, and what ``last`` makes of its m2 (see ``finish``).
    """
    n, index = at.cols.count, at.device.index
    if isinstance(at, Columns):
        cut, width = Cut.of(n, compute), at.width[0]
        rows = at.outer[0] * width
        sums_of = fold_columns_by_section(at, Fold(), compute)
        m2_of = fold_columns_by_section(at, Fold(pre="centered_square"), compute)

        def first(x: Tensor, sums: Tensor, m2: Tensor) -> None:
            sums_of(x, None, sums)
            m2_of(x, sums, m2)

    else:
        whole = last if last is not None and Cut.of(n, compute).whole else ("", 0.0)
        launch, cut = section_launch(moments_kernel, at, compute, whole)
        rows, width = at.rows.count, 1

        def first(x: Tensor, sums: Tensor, m2: Tensor) -> None:
            launch(index, x, sums, m2)

    parts, size = cut.sections, cut.lanes * cut.chunks
    merges, sizes = [], [rows * parts]
    unfinished = last is not None and isinstance(at, Columns)
    while parts > (MERGED_ON_THE_WAY if last is None else 1) or unfinished:
        cut = Cut.of(parts, compute)
        options = last if last is not None and cut.whole else ("", 0.0)
        integers = (parts, cut.sections, size, n, width)
        constants = (*options, cut.lanes, cut.chunks, triton_type(compute))
        warps = 1 if cut.lanes <= 128 else 8
        merges.append(Launch(_merge_moments_kernel, (rows * cut.sections,), integers, constants, warps))
        parts, size, unfinished = cut.sections, size * cut.lanes * cut.chunks, False
        sizes.append(rows * parts)
    return Statistics(first, merges, sizes, compute, at.device), parts


def powers(at: Rows, compute: torch.dtype, last: str, fast: bool) -> tuple[Statistics, int]:
    """Largest element and sum of exponentials of dense rows, and of how many parts of a row, see ``moments``.

    With ``last``, of one part: ``lse``, its log-sum-exp, and nothing in place of the largest element; ``log``, what was
    subtracted from its elements, and the logarithm of the sum.
    """
    whole, lse = Cut.of(at.cols.count, compute).whole, last == "lse"
    launch, cut = section_launch(powers_kernel, at, compute, (lse, last != "" and whole, fast))
    parts, merges, sizes, index = cut.sections, list[Launch](), [at.rows.count * cut.sections], at.device.index
    while parts > (1 if last else MERGED_ON_THE_WAY):
        cut = Cut.of(parts, compute)
        constants = (lse, last != "" and cut.whole, fast, cut.lanes, cut.chunks)
        grid = (at.rows.count * cut.sections,)
        merges.append(
            Launch(_merge_powers_kernel, grid, (parts, cut.sections), constants, 1 if cut.lanes <= 128 else 8)
        )
        parts = cut.sections
        sizes.append(at.rows.count * parts)
    return Statistics(lambda x, top, sums: launch(index, x, top, sums), merges, sizes, compute, at.device), parts


def dense_rows(shape: tuple[int, int], device: torch.device) -> Rows:
    """Where the rows of a contiguous [rows, n] lie."""
    return Rows(Level(shape[0], 1, 0, shape[1], False), Level(shape[1], 1, 0, 1, False), device)


def _rows_of(x: Tensor, dims: set[int], columns: bool) -> tuple[Rows | Columns, Callable[[Tensor], Tensor]]:
    """Where rows lie that a statistics kernel can walk, and what brings ``x`` there."""
    at = layout_of(x, dims)
    if isinstance(at, Rows) and at.cols.dense or isinstance(at, Columns) and columns:
        return at, lambda x: x
    n = 1
    for d in dims:
        n *= x.shape[d]
    return dense_rows((x.numel() // n, n), x.device), lambda x: rows_last(x, dims)


# -- The ops ----------------------------------------------------------------------------------------------------------


@Planned
def _var(x: Tensor, dim: tuple[int, ...], correction: float, keepdim: bool, root: bool) -> Callable[..., Pair]:
    check_floating("var", "x", x.dtype)
    shape = reduced_shape("var", x, dim, keepdim)
    new, count = new_dense(x, shape), math.prod(shape)
    if count == 0:
        return lambda x, *how: (new(), new())
    if x.numel() == 0:
        return lambda x, *how: (new().fill_(math.nan), new().fill_(math.nan))
    require_rows(x.device)
    at, prepare = _rows_of(x, reduced_dims("var", dim, x.dim()), columns=True)
    degrees = max(x.numel() // count - correction, 0.0)
    step, _ = moments(at, compute_dtype(x.dtype), ("divide_root" if root else "divide", degrees))

    def run(x: Tensor, *how: Any) -> Pair:
        result, mean = new(), new()
        step(prepare(x), (mean, result))
        return result, mean

    return run


def var(x: Tensor, dim: Sequence[int], correction: float, keepdim: bool, sqrt: bool) -> Pair:
    """Variance, or if ``sqrt`` its root, and mean; the squared distances are divided by ``max(n - correction, 0)``."""
    return _var(x, tuple(dim), correction, keepdim, sqrt)


@Planned
def _logsumexp(x: Tensor, dim: tuple[int, ...], keepdim: bool) -> Callable[..., Tensor]:
    check_floating("logsumexp", "x", x.dtype)
    shape = reduced_shape("logsumexp", x, dim, keepdim)
    new = new_dense(x, shape)
    if math.prod(shape) == 0:
        return lambda x, *how: new()
    if x.numel() == 0:
        return lambda x, *how: new().fill_(-math.inf)
    require_rows(x.device)
    at, prepare = _rows_of(x, reduced_dims("logsumexp", dim, x.dim()), columns=False)
    assert isinstance(at, Rows)
    step, _ = powers(at, compute_dtype(x.dtype), last="lse", fast=False)

    def run(x: Tensor, *how: Any) -> Tensor:
        out = new()
        step(prepare(x), (out, out))
        return out

    return run


def logsumexp(x: Tensor, dim: Sequence[int], keepdim: bool) -> Tensor:
    """``log(sum(exp(x)))``, the largest element of each row taken out of the exponentials."""
    return _logsumexp(x, tuple(dim), keepdim)
