"""Scans on a GPU: segments of a row side by side, each walked by one thread, then told what came before it.

A row is cut into segments of ``order.gpu_order_for``.  Rows of one segment take one launch.  Longer ones take three
steps: the total of each segment, an exclusive scan of the totals, which are a row again, and the scan of each segment
from what came before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bicompile.lowering.gpu.launch import Launch
from bicompile.lowering.gpu.plans import Planned, new_dense
from bicompile.lowering.gpu.rows import Level, divide, exponential, larger, row_offsets, triton_type

from .op import check_scan
from .order import gpu_order_for
from .schedule import schedule_for
from .selftest import require_scans


@triton.jit
def _log_one_plus(x):
    """``log(1 + x)`` for x in [0, 1]: what ``1 + x`` loses is put back."""
    one = tl.full(x.shape, 1.0, x.dtype)
    total = one + x
    return tl.log(total) + divide(x - (total - one), total)


@triton.jit
def _step(running, x, HOW: tl.constexpr):
    """The running value after ``x``."""
    if HOW == "add":
        return running + x
    elif HOW == "multiply":
        return running * x
    else:
        high = larger(running, x)
        low = tl.minimum(running, x)
        return tl.where(tl.abs(high) == float("inf"), high, high + _log_one_plus(exponential(low - high, False)))


@triton.constexpr_function
def _start(how):
    """What changes nothing in ``_step``."""
    return {"add": 0.0, "multiply": 1.0, "logaddexp": float("-inf")}[how]


@triton.jit(do_not_specialize=["num_rows", "inner"])
def _scan_kernel(
    x_ptr,
    before_ptr,
    out_ptr,
    num_rows,
    n,
    segments,
    inner,
    step,
    row_size,
    row_stride,
    row_step,
    HOW: tl.constexpr,
    STAGE: tl.constexpr,
    SEGMENT: tl.constexpr,
    UNROLL: tl.constexpr,
    WIDTH: tl.constexpr,
    TWO_ROWS: tl.constexpr,
    CONVERT: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Scan one segment in each of WIDTH lanes.

    STAGE ``total`` writes ``out[segment, row]``; ``exclusive`` writes, for each element, what came before it.
    ``before_ptr`` has what came before each segment, ``before[segment, row]``, where there is more than one.  Lanes
    are rows first where these lie side by side (``inner`` > 1), else segments first.
    """
    lane = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    if inner > 1:
        row, segment = lane % num_rows, lane // num_rows
    else:
        row, segment = lane // segments, lane % segments
    live = (row < num_rows) & (segment < segments)
    p = x_ptr + row_offsets(row, row_size, row_stride, row_step, TWO_ROWS)
    to = out_ptr + row // inner * n * inner + row % inner
    running = tl.full([WIDTH], _start(HOW), COMPUTE)
    if before_ptr is not None:
        running = tl.load(before_ptr + segment * num_rows + row, mask=live, other=0.0)
    first = segment * SEGMENT
    for i in range(0, tl.minimum(n, SEGMENT), UNROLL):
        for j in tl.static_range(UNROLL):
            k = first + i + j
            inside = live & (k < n)
            x = tl.load(p + k * step, mask=inside, other=_start(HOW)).to(CONVERT).to(COMPUTE)
            if STAGE == "exclusive":
                tl.store(to + k * inner, running.to(out_ptr.dtype.element_ty), mask=inside)
            running = _step(running, x, HOW)
            if STAGE == "inclusive":
                tl.store(to + k * inner, running.to(out_ptr.dtype.element_ty), mask=inside)
    if STAGE == "total":
        tl.store(out_ptr + segment * num_rows + row, running, mask=live)


@triton.constexpr_function
def _bits_of(n):
    """How often ``n`` halves until one is left."""
    return n.bit_length() - 1


@triton.constexpr_function
def _reversed_bits(i, n):
    """The number whose binary digits are those of ``i`` below ``n``, backwards."""
    bits = n.bit_length() - 1
    return sum((i >> b & 1) << (bits - 1 - b) for b in range(bits))


@triton.jit
def _columns_of(tile, WIDTH: tl.constexpr, N: tl.constexpr):
    """The columns of ``tile``, [WIDTH, N], as a tuple of [WIDTH, 1]; column ``i`` at the place of its bits reversed."""
    parts = (tile,)
    for b in tl.static_range(_bits_of(N)):
        halves = ()
        for i in tl.static_range(1 << b):
            even, odd = tl.split(tl.reshape(parts[i], [WIDTH, N >> (b + 1), 2]))
            halves = halves + (even, odd)
        parts = halves
    return parts


@triton.jit
def _tile_of(columns, WIDTH: tl.constexpr, N: tl.constexpr):
    """The inverse of ``_columns_of``."""
    parts = columns
    for b in tl.static_range(_bits_of(N)):
        pairs = ()
        for i in tl.static_range(N >> (b + 1)):
            pairs = pairs + (tl.reshape(tl.join(parts[2 * i], parts[2 * i + 1]), [WIDTH, 2 << b]),)
        parts = pairs
    return parts[0]


@triton.jit(do_not_specialize=["num_rows"])
def _scan_dense_kernel(
    x_ptr,
    before_ptr,
    out_ptr,
    num_rows,
    n,
    segments,
    row_size,
    row_stride,
    row_step,
    HOW: tl.constexpr,
    STAGE: tl.constexpr,
    SEGMENT: tl.constexpr,
    UNROLL: tl.constexpr,
    WIDTH: tl.constexpr,
    TWO_ROWS: tl.constexpr,
    CONVERT: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """``_scan_kernel`` of dense rows: each thread loads and stores UNROLL elements of its segment at a time."""
    lane = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    row, segment = lane // segments, lane % segments
    live = row < num_rows
    first = segment * SEGMENT
    left = tl.where(live, tl.minimum(n - first, SEGMENT), 0)
    p = x_ptr + row_offsets(row, row_size, row_stride, row_step, TWO_ROWS) + first
    to = out_ptr + row * n + first
    running = tl.full([WIDTH], _start(HOW), COMPUTE)
    if before_ptr is not None:
        running = tl.load(before_ptr + segment * num_rows + row, mask=live, other=0.0)
    running = tl.expand_dims(running, 1)
    for i in range(0, tl.minimum(n, SEGMENT), UNROLL):
        k = (i + tl.arange(0, UNROLL))[None, :]
        mask = k < left[:, None]
        tile = tl.load(p[:, None] + k, mask=mask, other=_start(HOW)).to(CONVERT)
        columns = _columns_of(tile, WIDTH, UNROLL)
        found = ()
        for j in tl.static_range(UNROLL):
            running = _step(running, columns[_reversed_bits(j, UNROLL)].to(COMPUTE), HOW)
            found = found + (running.to(CONVERT),)
        if STAGE == "inclusive":
            results = ()
            for j in tl.static_range(UNROLL):
                results = results + (found[_reversed_bits(j, UNROLL)],)
            tl.store(to[:, None] + k, _tile_of(results, WIDTH, UNROLL), mask=mask)
    if STAGE == "total":
        tl.store(out_ptr + segment * num_rows + row, tl.reshape(running, [WIDTH]), mask=live)


# -- Plans ------------------------------------------------------------------------------------------------------------

_VECTOR_BYTES = 16
"""What a thread loads at once where elements lie next to each other."""

Step = Callable[[Tensor, Tensor], None]
"""Scans a tensor into a contiguous result."""


@dataclass(frozen=True)
class Rows:
    """Where rows of ``n`` elements, ``step`` apart, lie; in the result, ``inner`` of them lie side by side."""

    rows: Level
    n: int
    step: int
    inner: int
    itemsize: int
    device: torch.device


def plan_scan(at: Rows, how: str, convert: torch.dtype, compute: torch.dtype, stage: str) -> Step:
    """A step that scans each row of ``at``; elements are rounded to ``convert`` first."""
    order = gpu_order_for(convert)
    segments, rows, index = triton.cdiv(at.n, order.segment), at.rows.count, at.device.index
    schedule = schedule_for(rows * segments)

    dense = at.inner == 1 and at.step == 1 and stage == "inclusive"
    unroll = _VECTOR_BYTES // at.itemsize if dense else schedule.unroll

    def launch(stage: str) -> Launch:
        return Launch(
            _scan_dense_kernel if dense else _scan_kernel,
            (triton.cdiv(rows * segments, schedule.width),),
            (rows, at.n, segments, *(() if dense else (at.inner, at.step)), *at.rows.walk),
            (
                *(how, stage, order.segment, unroll, schedule.width, at.rows.two),
                *(triton_type(convert), triton_type(compute)),
            ),
            schedule.warps,
        )

    whole = launch(stage)
    if segments == 1:
        return lambda x, out: whole(index, x, None, out)
    totals_of = launch("total")
    # Totals are [segment, row]: rows side by side.
    of_totals = Rows(Level(rows, 1, 0, 1, False), segments, rows, rows, compute.itemsize, at.device)
    scan_totals = plan_scan(of_totals, how, compute, compute, "exclusive")

    def run(x: Tensor, out: Tensor) -> None:
        totals, before = (torch.empty((segments, rows), dtype=compute, device=at.device) for _ in range(2))
        totals_of(index, x, None, totals)
        scan_totals(totals, before)
        whole(index, x, before, out)

    return run


def _rows_of(x: Tensor, dim: int) -> Rows | None:
    """Where the rows of ``x`` along ``dim`` lie; None if they take more than two levels."""
    where = list(zip(x.shape, x.stride(), strict=True))
    walk = Level.of([place for d, place in enumerate(where) if d != dim])
    if walk is None:
        return None
    return Rows(walk, x.shape[dim], x.stride(dim), x.shape[dim + 1 :].numel(), x.element_size(), x.device)


# -- The ops ----------------------------------------------------------------------------------------------------------


@Planned
def cumsum(x: Tensor, dim: int, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Running sums of ``x``, converted to ``dtype`` first, along ``dim``; contiguous."""
    check_scan("cumsum", x, dim, dtype)
    return _plan(x, "add", dim, dtype)


@Planned
def cumprod(x: Tensor, dim: int, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Running products of ``x``, converted to ``dtype`` first, along ``dim``; contiguous."""
    check_scan("cumprod", x, dim, dtype)
    return _plan(x, "multiply", dim, dtype)


@Planned
def logcumsumexp(x: Tensor, dim: int) -> Callable[..., Tensor]:
    """The logarithms of the running sums of ``exp(x)`` along ``dim``; contiguous."""
    check_scan("logcumsumexp", x, dim, x.dtype)
    return _plan(x, "logaddexp", dim, x.dtype)


def _plan(x: Tensor, how: str, dim: int, dtype: torch.dtype) -> Callable[..., Tensor]:
    """A scan of tensors that lie like ``x``."""
    new = new_dense(x, x.shape, dtype)
    if x.numel() == 0:
        return lambda x, *arguments: new()
    require_scans(x.device)
    wide = x.reshape(1) if x.dim() == 0 else x
    dim = dim % wide.dim()
    dense = _rows_of(wide, dim) is None
    at = _rows_of(wide.contiguous() if dense else wide, dim)
    assert at is not None
    step = plan_scan(at, how, dtype, gpu_order_for(dtype).accumulate, "inclusive")

    def run(x: Tensor, *arguments: Any) -> Tensor:
        out = new()
        step(x.contiguous() if dense else x, out)
        return out

    return run
