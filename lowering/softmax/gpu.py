"""Softmax and its gradient on a GPU.

A row of one section is read once and held in registers.  A longer one is read twice.  Where rows are many, a program
takes one row, section after section, and its second look finds the row in the cache.  Else every program takes the
statistics of one section, then every program merges those of its row and writes one section.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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
    merged_sum,
    row_offsets,
    store_section,
    top_of,
    tree,
    triton_type,
)
from bicompile.lowering.gpu.selftest import require_rows
from bicompile.lowering.reduction.gpu import FOLLOWS_BATCH, Fold, Rows, fold_rows
from bicompile.lowering.reduction.gpu_statistics import (
    MERGED_ON_THE_WAY,
    Pair,
    dense_rows,
    merge_powers,
    merged_powers,
    powers,
    powers_of,
    shift_of,
)
from bicompile.lowering.reduction.op import canonical_dim, check_floating, reduced_shape
from bicompile.lowering.reduction.schedule import long_row_warps_for, row_schedule_for


@triton.jit
def _normalised(xs, top, shift, total, LOG: tl.constexpr, SAFE: tl.constexpr, FAST: tl.constexpr):
    """Softmax of the chunks ``xs`` of rows with these statistics."""
    ys = ()
    if LOG:
        log_total = tl.log(total)
        for j in tl.static_range(len(xs)):
            ys = ys + ((xs[j] - shift[:, None]) - log_total[:, None],)
    else:
        scale = divide(tl.full(total.shape, 1.0, total.dtype), total)
        for j in tl.static_range(len(xs)):
            y = exponential(xs[j] - shift[:, None], FAST) * scale[:, None]
            if SAFE:
                y = tl.where((top == float("-inf"))[:, None], 0.0, y)
            ys = ys + (y,)
    return ys


@triton.jit(do_not_specialize=FOLLOWS_BATCH)
def _softmax_kernel(
    x_ptr,
    top_ptr,
    sum_ptr,
    out_ptr,
    num_rows,
    n,
    sections,
    parts,
    row_size,
    row_stride,
    row_step,
    LOG: tl.constexpr,
    SAFE: tl.constexpr,
    FAST: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    CHUNKS: tl.constexpr,
    WHOLE: tl.constexpr,
    TWO_ROWS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Write one section of ROWS dense rows; of rows that are WHOLE here, the statistics are taken on the way."""
    pid = tl.program_id(0).to(tl.int64)
    section = pid % sections
    rows = pid // sections * ROWS + tl.arange(0, ROWS)
    start = section * (LANES * CHUNKS)
    left = tl.minimum(n - start, LANES * CHUNKS).to(tl.int32)
    p = x_ptr + row_offsets(rows, row_size, row_stride, row_step, TWO_ROWS) + start
    xs = load_section(p, rows, num_rows, left, float("-inf"), ROWS, LANES, CHUNKS, WHOLE, COMPUTE)
    if WHOLE:
        top = top_of(xs)
        shift = shift_of(top, False)
        total = fold_chunks(powers_of(xs, shift, FAST), "add", ROWS, LANES)
    else:
        top, shift, total = merged_powers(top_ptr, sum_ptr, pid // sections * parts, parts, False, FAST, PARTS, 1)
    ys = _normalised(xs, top, shift, total, LOG, SAFE, FAST)
    store_section(out_ptr + rows * n + start, ys, rows, num_rows, left, ROWS, LANES, CHUNKS, WHOLE)


@triton.jit(do_not_specialize=FOLLOWS_BATCH)
def _long_softmax_kernel(
    x_ptr,
    out_ptr,
    num_rows,
    n,
    sections,
    row_size,
    row_stride,
    row_step,
    LOG: tl.constexpr,
    SAFE: tl.constexpr,
    FAST: tl.constexpr,
    PARTS: tl.constexpr,
    LANES: tl.constexpr,
    CHUNKS: tl.constexpr,
    TWO_ROWS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Write one dense row of up to PARTS sections."""
    rows = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    x_row = x_ptr + row_offsets(rows, row_size, row_stride, row_step, TWO_ROWS)
    part = tl.arange(0, PARTS)[None, :]
    tops = tl.full([1, PARTS], float("-inf"), COMPUTE)
    sums = tl.zeros([1, PARTS], COMPUTE)
    for i in range(sections):
        start = i * (LANES * CHUNKS)
        xs = load_section(x_row + start, rows, num_rows, n - start, float("-inf"), 1, LANES, CHUNKS, False, COMPUTE)
        top = top_of(xs)
        total = fold_chunks(powers_of(xs, shift_of(top, False), FAST), "add", 1, LANES)
        tops = tl.where(part == i, top[:, None], tops)
        sums = tl.where(part == i, total[:, None], sums)
    top, shift, total = merge_powers((tops,), (sums,), False, FAST, PARTS)
    for i in range(sections):
        start = i * (LANES * CHUNKS)
        xs = load_section(x_row + start, rows, num_rows, n - start, float("-inf"), 1, LANES, CHUNKS, False, COMPUTE)
        ys = _normalised(xs, top, shift, total, LOG, SAFE, FAST)
        store_section(out_ptr + rows * n + start, ys, rows, num_rows, n - start, 1, LANES, CHUNKS, False)


@triton.jit
def _products_of(gs, ys, LOG: tl.constexpr):
    """What is summed for the gradient."""
    if LOG:
        return gs
    products = ()
    for j in tl.static_range(len(gs)):
        products = products + (gs[j] * ys[j],)
    return products


@triton.jit
def _gradients_of(gs, ys, total, LOG: tl.constexpr, FAST: tl.constexpr):
    """The gradient of the chunks that gave ``ys``, of rows with this sum."""
    dxs = ()
    for j in tl.static_range(len(gs)):
        if LOG:
            dxs = dxs + (gs[j] - exponential(ys[j], FAST) * total[:, None],)
        else:
            dxs = dxs + (ys[j] * (gs[j] - total[:, None]),)
    return dxs


@triton.jit(do_not_specialize=FOLLOWS_BATCH)
def _softmax_backward_kernel(
    grad_ptr,
    y_ptr,
    sum_ptr,
    out_ptr,
    num_rows,
    n,
    sections,
    parts,
    grad_size,
    grad_stride,
    grad_step,
    y_size,
    y_stride,
    y_step,
    STAGE: tl.constexpr,
    LOG: tl.constexpr,
    FAST: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    CHUNKS: tl.constexpr,
    WHOLE: tl.constexpr,
    TWO_GRAD: tl.constexpr,
    TWO_Y: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """One section of ROWS dense rows: STAGE ``sum`` writes its sum, ``write`` its gradient, ``both`` of whole rows."""
    pid = tl.program_id(0).to(tl.int64)
    section = pid % sections
    rows = pid // sections * ROWS + tl.arange(0, ROWS)
    start = section * (LANES * CHUNKS)
    left = tl.minimum(n - start, LANES * CHUNKS).to(tl.int32)
    g_ptr = grad_ptr + row_offsets(rows, grad_size, grad_stride, grad_step, TWO_GRAD) + start
    gs = load_section(g_ptr, rows, num_rows, left, 0.0, ROWS, LANES, CHUNKS, WHOLE, COMPUTE)
    if STAGE == "sum" and LOG:
        ys = gs
    else:
        p = y_ptr + row_offsets(rows, y_size, y_stride, y_step, TWO_Y) + start
        ys = load_section(p, rows, num_rows, left, 0.0, ROWS, LANES, CHUNKS, WHOLE, COMPUTE)
    if STAGE == "write":
        total = merged_sum(sum_ptr, pid // sections, parts, PARTS)
    else:
        total = fold_chunks(_products_of(gs, ys, LOG), "add", ROWS, LANES)
    if STAGE == "sum":
        tl.store(sum_ptr + rows * sections + section, total, mask=rows < num_rows)
    else:
        dxs = _gradients_of(gs, ys, total, LOG, FAST)
        store_section(out_ptr + rows * n + start, dxs, rows, num_rows, left, ROWS, LANES, CHUNKS, WHOLE)


@triton.jit(do_not_specialize=FOLLOWS_BATCH)
def _long_softmax_backward_kernel(
    grad_ptr,
    y_ptr,
    out_ptr,
    num_rows,
    n,
    sections,
    grad_size,
    grad_stride,
    grad_step,
    y_size,
    y_stride,
    y_step,
    LOG: tl.constexpr,
    FAST: tl.constexpr,
    PARTS: tl.constexpr,
    LANES: tl.constexpr,
    CHUNKS: tl.constexpr,
    TWO_GRAD: tl.constexpr,
    TWO_Y: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Write the gradient of one dense row of up to PARTS sections."""
    rows = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    g_row = grad_ptr + row_offsets(rows, grad_size, grad_stride, grad_step, TWO_GRAD)
    y_row = y_ptr + row_offsets(rows, y_size, y_stride, y_step, TWO_Y)
    part = tl.arange(0, PARTS)[None, :]
    sums = tl.zeros([1, PARTS], COMPUTE)
    for i in range(sections):
        start = i * (LANES * CHUNKS)
        gs = load_section(g_row + start, rows, num_rows, n - start, 0.0, 1, LANES, CHUNKS, False, COMPUTE)
        ys = gs
        if not LOG:
            ys = load_section(y_row + start, rows, num_rows, n - start, 0.0, 1, LANES, CHUNKS, False, COMPUTE)
        total = fold_chunks(_products_of(gs, ys, LOG), "add", 1, LANES)
        sums = tl.where(part == i, total[:, None], sums)
    total = tree(sums + 0.0, "add", 1, PARTS)
    for i in range(sections):
        start = i * (LANES * CHUNKS)
        gs = load_section(g_row + start, rows, num_rows, n - start, 0.0, 1, LANES, CHUNKS, False, COMPUTE)
        ys = load_section(y_row + start, rows, num_rows, n - start, 0.0, 1, LANES, CHUNKS, False, COMPUTE)
        dxs = _gradients_of(gs, ys, total, LOG, FAST)
        store_section(out_ptr + rows * n + start, dxs, rows, num_rows, n - start, 1, LANES, CHUNKS, False)


# -- Plans ------------------------------------------------------------------------------------------------------------


def _dense(x: Tensor) -> Tensor:
    """``x``, or a contiguous copy where its rows are not dense or lie in more than two levels."""
    return x if x.stride(-1) == 1 and _walk(x) is not None else x.contiguous()


def _walk(x: Tensor) -> Level | None:
    return Level.of(list(zip(x.shape, x.stride(), strict=True))[:-1])


def _rows(x: Tensor) -> Rows:
    walk = _walk(x)
    assert walk is not None
    return Rows(walk, Level(x.shape[-1], 1, 0, 1, False), x.device)


def _is_fast(dtype: torch.dtype) -> bool:
    """May exponentials have the smaller error that a result in ``dtype`` cannot show?"""
    return dtype in (torch.bfloat16, torch.float16)


def _plan_softmax(x: Tensor, dtype: torch.dtype, log: bool, safe: bool) -> Callable[[Tensor, Tensor], None]:
    require_rows(x.device)
    at, compute = _rows(x), compute_dtype(dtype)
    warps = long_row_warps_for(at.rows.count, at.cols.count * x.element_size())
    if warps is None or Cut.of(at.cols.count, compute).whole:
        return _softmax_by_section(at, dtype, compute, log, safe)
    return _long_softmax(at, dtype, compute, log, safe, warps)


def _long_softmax(
    at: Rows, dtype: torch.dtype, compute: torch.dtype, log: bool, safe: bool, warps: int
) -> Callable[[Tensor, Tensor], None]:
    cut, index = Cut.of(at.cols.count, compute), at.device.index
    launch = Launch(
        _long_softmax_kernel,
        (at.rows.count,),
        (at.rows.count, cut.n, cut.sections, *at.rows.walk),
        (
            *(log, safe, _is_fast(dtype), triton.next_power_of_2(cut.sections), cut.lanes, cut.chunks),
            *(at.rows.two, triton_type(compute)),
        ),
        warps,
    )
    return lambda x, out: launch(index, x, out)


def _softmax_by_section(
    at: Rows, dtype: torch.dtype, compute: torch.dtype, log: bool, safe: bool
) -> Callable[[Tensor, Tensor], None]:
    fast, index = _is_fast(dtype), at.device.index
    cut = Cut.of(at.cols.count, compute)
    statistics, parts = (None, 1) if cut.whole else powers(at, compute, last="", fast=fast)
    chosen = row_schedule_for(at.rows.count, cut.lanes, cut.chunks, cut.sections)
    launch = Launch(
        _softmax_kernel,
        (triton.cdiv(at.rows.count, chosen.rows) * cut.sections,),
        (at.rows.count, cut.n, cut.sections, parts, *at.rows.walk),
        (
            *(log, safe, fast, triton.next_power_of_2(parts), chosen.rows, cut.lanes, cut.chunks, cut.whole),
            *(at.rows.two, triton_type(compute)),
        ),
        chosen.warps,
    )

    def run(x: Tensor, out: Tensor) -> None:
        top, sums = (None, None) if statistics is None else statistics(x)
        launch(index, x, top, sums, out)

    return run


def _plan_backward(
    grad: Tensor, y: Tensor, dtype: torch.dtype, compute: torch.dtype, log: bool
) -> Callable[[Tensor, Tensor, Tensor], None]:
    require_rows(y.device)
    g, at = _rows(grad), _rows(y)
    warps = long_row_warps_for(at.rows.count, at.cols.count * (grad.element_size() + y.element_size()))
    if warps is None or Cut.of(at.cols.count, compute).whole:
        return _backward_by_section(g, at, dtype, compute, log)
    return _long_backward(g, at, dtype, compute, log, warps)


def _long_backward(
    g: Rows, at: Rows, dtype: torch.dtype, compute: torch.dtype, log: bool, warps: int
) -> Callable[[Tensor, Tensor, Tensor], None]:
    cut, index = Cut.of(at.cols.count, compute), at.device.index
    launch = Launch(
        _long_softmax_backward_kernel,
        (at.rows.count,),
        (at.rows.count, cut.n, cut.sections, *g.rows.walk, *at.rows.walk),
        (
            *(log, _is_fast(dtype), triton.next_power_of_2(cut.sections), cut.lanes, cut.chunks),
            *(g.rows.two, at.rows.two, triton_type(compute)),
        ),
        warps,
    )
    return lambda grad, y, out: launch(index, grad, y, out)


def _backward_by_section(
    g: Rows, at: Rows, dtype: torch.dtype, compute: torch.dtype, log: bool
) -> Callable[[Tensor, Tensor, Tensor], None]:
    index, rows = at.device.index, at.rows.count
    cut = Cut.of(at.cols.count, compute)
    chosen = row_schedule_for(rows, cut.lanes, cut.chunks, cut.sections)

    def launch(stage: str, parts: int) -> Launch:
        return Launch(
            _softmax_backward_kernel,
            (triton.cdiv(rows, chosen.rows) * cut.sections,),
            (rows, cut.n, cut.sections, parts, *g.rows.walk, *at.rows.walk),
            (
                *(stage, log, _is_fast(dtype), triton.next_power_of_2(parts), chosen.rows, cut.lanes, cut.chunks),
                *(cut.whole, g.rows.two, at.rows.two, triton_type(compute)),
            ),
            chosen.warps,
        )

    if cut.whole:
        both = launch("both", 1)
        return lambda grad, y, out: both(index, grad, y, None, out)
    first, few = launch("sum", 1), cut.sections <= MERGED_ON_THE_WAY
    write = launch("write", cut.sections if few else 1)
    merge = None if few else fold_rows(dense_rows((rows, cut.sections), at.device), Fold(), compute, 0)

    def run(grad: Tensor, y: Tensor, out: Tensor) -> None:
        sums = torch.empty((rows, cut.sections), dtype=compute, device=at.device)
        first(index, grad, y, sums, None)
        if merge is not None:
            parts, sums = sums, torch.empty(rows, dtype=compute, device=at.device)
            merge(parts, sums)
        write(index, grad, y, sums, out)

    return run


# -- The ops ----------------------------------------------------------------------------------------------------------


@Planned
def softmax(x: Tensor, dim: int, log: bool, dtype: torch.dtype, safe: bool = False) -> Callable[..., Tensor]:
    """Softmax or log-softmax of ``x`` over ``dim``, contiguous; zeros for rows of nothing but -inf if ``safe``."""
    check_floating("softmax", "x", x.dtype)
    check_floating("softmax", "dtype", dtype)
    torch._check_value(
        not (log and safe), lambda: "bicompile::softmax: expected log or safe, got both; pass safe=False"
    )
    rows_last, dim_back = _along(x, canonical_dim("softmax", dim, x.dim()))
    like = rows_last(x)
    new = new_dense(x, like.shape, dtype)
    if x.numel() == 0:
        return lambda x, *how: dim_back(new())
    step = _plan_softmax(_dense(like), dtype, log, safe)

    def run(x: Tensor, *how: Any) -> Tensor:
        out = new()
        step(_dense(rows_last(x)), out)
        return dim_back(out)

    return run


@Planned
def softmax_statistics(x: Tensor, dim: int) -> Callable[..., Pair]:
    """The two numbers that a log-softmax over ``dim`` subtracts from each row, one after the other."""
    check_floating("softmax_statistics", "x", x.dtype)
    new = new_dense(x, reduced_shape("softmax_statistics", x, [dim], False), compute_dtype(x.dtype))
    if x.numel() == 0:
        return lambda x, dim: (new().zero_(), new().fill_(-math.inf))
    require_rows(x.device)
    rows_last, _ = _along(x, canonical_dim("softmax_statistics", dim, x.dim()))
    step = powers(_rows(_dense(rows_last(x))), compute_dtype(x.dtype), last="log", fast=False)[0]

    def run(x: Tensor, dim: int) -> Pair:
        shift, log_total = new(), new()
        step(_dense(rows_last(x)), (shift, log_total))
        return shift, log_total

    return run


@Planned
def softmax_backward(grad: Tensor, y: Tensor, dim: int, log: bool, dtype: torch.dtype) -> Callable[..., Tensor]:
    """The gradient of ``softmax``'s input from that of its result ``y``, contiguous."""
    for name, tensor_dtype in (("grad", grad.dtype), ("y", y.dtype), ("dtype", dtype)):
        check_floating("softmax_backward", name, tensor_dtype)
    torch._check_value(
        grad.shape == y.shape,
        lambda: (
            "bicompile::softmax_backward: expected grad and y of one shape, got "
            f"{tuple(grad.shape)} and {tuple(y.shape)}; expand grad first"
        ),
    )
    rows_last, dim_back = _along(y, canonical_dim("softmax_backward", dim, y.dim()))
    like = rows_last(y)
    new = new_dense(y, like.shape, dtype)
    if y.numel() == 0:
        return lambda grad, y, *how: dim_back(new())
    compute = compute_dtype(torch.float64 if torch.float64 in (dtype, y.dtype) else dtype)
    step = _plan_backward(_dense(rows_last(grad)), _dense(like), dtype, compute, log)

    def run(grad: Tensor, y: Tensor, *how: Any) -> Tensor:
        out = new()
        step(_dense(rows_last(grad)), _dense(rows_last(y)), out)
        return dim_back(out)

    return run


Move = Callable[[Tensor], Tensor]


def _along(x: Tensor, dim: int) -> tuple[Move, Move]:
    """What brings ``dim`` of tensors like ``x`` to the end, and what brings it back, in a contiguous tensor."""
    if x.dim() == 0:
        return lambda x: x.reshape(1), lambda out: out.reshape(())
    if dim == x.dim() - 1:
        return lambda x: x, lambda out: out
    return lambda x: x.movedim(dim, -1), lambda out: out.movedim(-1, dim).contiguous()
