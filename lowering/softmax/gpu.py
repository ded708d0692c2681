"""Softmax and its gradient on a GPU.

A row of one section is read once and held in registers.  A longer one is read twice: first every program takes the
statistics of one section, then every program merges those of its row and writes one section.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bicompile.lowering.gpu.grouping import flat_rows, in_groups, rows_in_cache
from bicompile.lowering.gpu.launch import Launch, key_of, on_device, planned
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
    triton_type,
)
from bicompile.lowering.gpu.selftest import require_rows
from bicompile.lowering.reduction.gpu import FOLLOWS_BATCH, Fold, Rows, fold_rows
from bicompile.lowering.reduction.gpu_statistics import (
    MERGED_ON_THE_WAY,
    dense_rows,
    merged_powers,
    powers,
    powers_of,
    shift_of,
)
from bicompile.lowering.reduction.op import canonical_dim, check_floating
from bicompile.lowering.reduction.schedule import row_schedule_for


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


@triton.jit
def _products_of(gs, ys, LOG: tl.constexpr):
    """What is summed for the gradient."""
    if LOG:
        return gs
    products = ()
    for j in tl.static_range(len(gs)):
        products = products + (gs[j] * ys[j],)
    return products


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
        dxs = ()
        for j in tl.static_range(CHUNKS):
            if LOG:
                dxs = dxs + (gs[j] - exponential(ys[j], FAST) * total[:, None],)
            else:
                dxs = dxs + (ys[j] * (gs[j] - total[:, None]),)
        store_section(out_ptr + rows * n + start, dxs, rows, num_rows, left, ROWS, LANES, CHUNKS, WHOLE)


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
    if at.rows.two or Cut.of(at.cols.count, compute).whole:
        step = _softmax_step(at, dtype, compute, log, safe)
        return lambda x, out: step((x, out))
    n = at.cols.count
    group = rows_in_cache(n * x.element_size(), x.device)
    grouped = in_groups(at.rows.count, group, lambda count: _softmax_step(at.first(count), dtype, compute, log, safe))
    return lambda x, out: grouped((flat_rows(x, at.rows), out.view(-1, n)))


def _softmax_step(
    at: Rows, dtype: torch.dtype, compute: torch.dtype, log: bool, safe: bool
) -> Callable[[tuple[Tensor, Tensor]], None]:
    fast, index = _is_fast(dtype), at.device.index
    cut = Cut.of(at.cols.count, compute)
    statistics, parts = (None, 1) if cut.whole else powers(at, compute, lse=False, fast=fast)
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

    def run(by_row: tuple[Tensor, Tensor]) -> None:
        x, out = by_row
        top, sums = (None, None) if statistics is None else statistics(x)
        launch(index, x, top, sums, out)

    return run


def _plan_backward(
    grad: Tensor, y: Tensor, dtype: torch.dtype, compute: torch.dtype, log: bool
) -> Callable[[Tensor, Tensor, Tensor], None]:
    require_rows(y.device)
    g, at = _rows(grad), _rows(y)
    if g.rows.two or at.rows.two or Cut.of(at.cols.count, compute).whole:
        step = _backward_step(g, at, dtype, compute, log)
        return lambda grad, y, out: step((grad, y, out))
    n = at.cols.count
    group = rows_in_cache(n * (grad.element_size() + y.element_size()), y.device)
    grouped = in_groups(
        at.rows.count, group, lambda count: _backward_step(g.first(count), at.first(count), dtype, compute, log)
    )
    return lambda grad, y, out: grouped((flat_rows(grad, g.rows), flat_rows(y, at.rows), out.view(-1, n)))


def _backward_step(
    g: Rows, at: Rows, dtype: torch.dtype, compute: torch.dtype, log: bool
) -> Callable[[tuple[Tensor, Tensor, Tensor]], None]:
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
        return lambda by_row: both(index, by_row[0], by_row[1], None, by_row[2])
    first, few = launch("sum", 1), cut.sections <= MERGED_ON_THE_WAY
    write = launch("write", cut.sections if few else 1)
    merge = None if few else fold_rows(dense_rows((rows, cut.sections), at.device), Fold(), compute, 0)

    def run(by_row: tuple[Tensor, Tensor, Tensor]) -> None:
        grad, y, out = by_row
        sums = torch.empty((rows, cut.sections), dtype=compute, device=at.device)
        first(index, grad, y, sums, None)
        if merge is not None:
            parts, sums = sums, torch.empty(rows, dtype=compute, device=at.device)
            merge(parts, sums)
        write(index, grad, y, sums, out)

    return run


# -- The ops ----------------------------------------------------------------------------------------------------------


@on_device
def _softmax_rows(x: Tensor, log: bool, dtype: torch.dtype, safe: bool) -> Tensor:
    x = _dense(x)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    key = ("softmax", log, dtype, safe, key_of(x))
    planned(key, lambda: _plan_softmax(x, dtype, log, safe))(x, out)
    return out


def softmax(x: Tensor, dim: int, log: bool, dtype: torch.dtype, safe: bool = False) -> Tensor:
    """Softmax or log-softmax of ``x`` over ``dim``, contiguous; zeros for rows of nothing but -inf if ``safe``."""
    check_floating("softmax", "x", x.dtype)
    check_floating("softmax", "dtype", dtype)
    torch._check_value(
        not (log and safe), lambda: "bicompile::softmax: expected log or safe, got both; pass safe=False"
    )
    dim = canonical_dim("softmax", dim, x.dim())
    if x.numel() == 0:
        return torch.empty(x.shape, dtype=dtype, device=x.device)
    return _along(dim, lambda x: _softmax_rows(x, log, dtype, safe), x)


@on_device
def _backward_rows(grad: Tensor, y: Tensor, log: bool, dtype: torch.dtype) -> Tensor:
    grad, y = _dense(grad), _dense(y)
    out = torch.empty(y.shape, dtype=dtype, device=y.device)
    compute = compute_dtype(torch.float64 if torch.float64 in (dtype, y.dtype) else dtype)
    key: Any = ("softmax_backward", log, dtype, key_of(grad), key_of(y))
    planned(key, lambda: _plan_backward(grad, y, dtype, compute, log))(grad, y, out)
    return out


def softmax_backward(grad: Tensor, y: Tensor, dim: int, log: bool, dtype: torch.dtype) -> Tensor:
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
    dim = canonical_dim("softmax_backward", dim, y.dim())
    if y.numel() == 0:
        return torch.empty(y.shape, dtype=dtype, device=y.device)
    return _along(dim, lambda grad, y: _backward_rows(grad, y, log, dtype), grad, y)


def _along(dim: int, of_rows: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """``of_rows`` of tensors with ``dim`` last, that dim brought back to its place in the contiguous result."""
    if tensors[0].dim() == 0:
        return of_rows(*(t.reshape(1) for t in tensors)).reshape(())
    return of_rows(*(t.movedim(dim, -1) for t in tensors)).movedim(-1, dim).contiguous()
