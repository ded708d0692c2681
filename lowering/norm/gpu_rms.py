"""RMS norm on a GPU in one pass: the mean square of a row, and what the graph does pointwise with it.

``mean_square`` followed by Inductor's pointwise code gives the same bits and reads each row twice.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from bicompile.lowering.gpu.launch import INTERPRETED, Launch
from bicompile.lowering.gpu.plans import Planned, new_dense
from bicompile.lowering.gpu.rows import (
    Cut,
    compute_dtype,
    fold_chunks,
    load_section,
    row_offsets,
    store_section,
    triton_type,
)
from bicompile.lowering.gpu.selftest import require_rows
from bicompile.lowering.reduction.gpu import FOLLOWS_BATCH, Fold, Rows, finish, fold_rows
from bicompile.lowering.reduction.schedule import row_schedule_for

from .gpu import load_parameter, rows_of
from .op import check_rms_norm


@triton.jit
def _reciprocal_root(x, LIBDEVICE: tl.constexpr):
    """What Inductor computes for ``rsqrt``; the interpreter has no device library."""
    if LIBDEVICE:
        return libdevice.rsqrt(x)
    else:
        return 1.0 / tl.sqrt(x)


@triton.jit(do_not_specialize=FOLLOWS_BATCH)
def _rms_norm_kernel(
    x_ptr,
    mean_ptr,
    weight_ptr,
    out_ptr,
    num_rows,
    n,
    sections,
    row_size,
    row_stride,
    row_step,
    EPS: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    LIBDEVICE: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    CHUNKS: tl.constexpr,
    WHOLE: tl.constexpr,
    TWO_ROWS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Write one section of ROWS dense rows; of rows that are WHOLE here, the mean square is taken on the way."""
    pid = tl.program_id(0).to(tl.int64)
    section = pid % sections
    rows = pid // sections * ROWS + tl.arange(0, ROWS)
    start = section * (LANES * CHUNKS)
    left = tl.minimum(n - start, LANES * CHUNKS).to(tl.int32)
    p = x_ptr + row_offsets(rows, row_size, row_stride, row_step, TWO_ROWS) + start
    xs = load_section(p, rows, num_rows, left, 0.0, ROWS, LANES, CHUNKS, WHOLE, COMPUTE)
    if weight_ptr is not None:  # asked for before the mean is known: they arrive meanwhile
        ws = load_parameter(weight_ptr, rows, start, left, 1, 1, "element", ROWS, LANES, CHUNKS)
    if WHOLE:
        squares = ()
        for j in tl.static_range(CHUNKS):
            squares = squares + (xs[j] * xs[j],)
        mean = finish(fold_chunks(squares, "add", ROWS, LANES), n, "mean", 0.0)
    else:
        mean = tl.load(mean_ptr + rows, mask=rows < num_rows, other=0.0)
    scale = _reciprocal_root(mean + tl.full(mean.shape, EPS, COMPUTE), LIBDEVICE)
    ys = ()
    for j in tl.static_range(CHUNKS):
        y = xs[j] * scale[:, None]
        if ROUND_FIRST:
            y = y.to(out_ptr.dtype.element_ty).to(COMPUTE)
        ys = ys + (y,)
    if weight_ptr is not None:
        scaled = ()
        for j in tl.static_range(CHUNKS):
            scaled = scaled + (ys[j] * ws[j].to(COMPUTE),)
        ys = scaled
    store_section(out_ptr + rows * n + start, ys, rows, num_rows, left, ROWS, LANES, CHUNKS, WHOLE)


def _step(
    at: Rows, compute: torch.dtype, eps: float, round_first: bool
) -> Callable[[Tensor, Tensor | None, Tensor], None]:
    """What writes the norm of rows that lie ``at`` a place into a tensor of the same shape."""
    require_rows(at.device)
    cut, rows, index = Cut.of(at.cols.count, compute), at.rows.count, at.device.index
    chosen = row_schedule_for(rows, cut.lanes, cut.chunks, cut.sections)
    launch = Launch(
        _rms_norm_kernel,
        (triton.cdiv(rows, chosen.rows) * cut.sections,),
        (rows, cut.n, cut.sections, *at.rows.walk),
        (
            *(eps, round_first, not INTERPRETED, chosen.rows, cut.lanes, cut.chunks, cut.whole, at.rows.two),
            triton_type(compute),
        ),
        chosen.warps,
    )
    if cut.whole:
        return lambda x, weight, out: launch(index, x, None, weight, out)
    mean_of = fold_rows(at, Fold(pre="square", post="mean"), compute, cut.n)

    def run(x: Tensor, weight: Tensor | None, out: Tensor) -> None:
        mean = torch.empty(rows, dtype=compute, device=at.device)
        mean_of(x, mean)
        launch(index, x, mean, weight, out)

    return run


@Planned
def rms_norm(x: Tensor, weight: Tensor | None, eps: float, round_first: bool) -> Callable[..., Tensor]:
    """``x * rsqrt(mean_square(x) + eps) * weight`` over the last dim, contiguous, in the dtype of ``x``.

    With ``round_first``, it is rounded to that dtype before it is multiplied by ``weight``.
    """
    check_rms_norm(x, weight)
    new = new_dense(x, x.shape)
    if x.numel() == 0:
        return lambda *arguments: new()
    if (at := rows_of(x)) is None or not (weight is None or weight.is_contiguous()):
        return lambda x, weight, *how: rms_norm(x.contiguous(), None if weight is None else weight.contiguous(), *how)
    step = _step(at, compute_dtype(x.dtype), eps, round_first)

    def run(x: Tensor, weight: Tensor | None, eps: float, round_first: bool) -> Tensor:
        out = new()
        step(x, weight, out)
        return out

    return run
