"""Layer norm and group norm on a GPU: like the softmax, a row of one section is read once, a longer one twice.

A row is the normalized part of ``x``, dense in memory: one trailing block for a layer norm, one group of channels for a
group norm.  Statistics of longer rows are merged as in ``reduction.gpu_statistics``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from bicompile.lowering.gpu.grouping import flat_rows, in_groups, rows_in_cache
from bicompile.lowering.gpu.launch import Launch
from bicompile.lowering.gpu.plans import Planned, new_dense
from bicompile.lowering.gpu.rows import (
    Cut,
    Level,
    compute_dtype,
    divide,
    fold_chunks,
    load_section,
    row_offsets,
    square_root,
    store_section,
    triton_type,
)
from bicompile.lowering.gpu.selftest import require_rows
from bicompile.lowering.reduction.gpu import FOLLOWS_BATCH, Rows, finish
from bicompile.lowering.reduction.gpu_statistics import merged_moments, moments, squares_of
from bicompile.lowering.reduction.schedule import row_schedule_for

from .op import check_group_norm, check_layer_norm


@triton.jit
def load_parameter(
    ptr,
    rows,
    start,
    left,
    channels,
    inner,
    BY: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """The parameter of each element of one section of ROWS rows, a tuple of [1 or ROWS, LANES], in its own dtype.

    BY ``element``, number ``k`` of a row has parameter ``k``; by ``channel``, each group of ``channels`` channels is a
    row, and a channel has ``inner`` elements.  ``rows`` are then numbers of groups.
    """
    ws = ()
    for j in tl.static_range(CHUNKS):
        at = j * LANES + tl.arange(0, LANES)
        inside = (at < left)[None, :]
        if BY == "element":
            k = (start + at)[None, :]
        else:
            k = (rows * channels)[:, None] + ((start + at) // inner)[None, :]
            inside = inside & (rows >= 0)[:, None]
        ws = ws + (tl.load(ptr + k, mask=inside, other=0.0),)
    return ws


@triton.jit(do_not_specialize=FOLLOWS_BATCH)
def _norm_kernel(
    x_ptr,
    sum_ptr,
    m2_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    mean_ptr,
    rstd_ptr,
    num_rows,
    n,
    sections,
    parts,
    size,
    groups,
    channels,
    inner,
    row_size,
    row_stride,
    row_step,
    EPS: tl.constexpr,
    BY: tl.constexpr,
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
    xs = load_section(p, rows, num_rows, left, 0.0, ROWS, LANES, CHUNKS, WHOLE, COMPUTE)
    group = rows % groups
    # Asked for before the statistics are known: they arrive meanwhile.
    if weight_ptr is not None:
        ws = load_parameter(weight_ptr, group, start, left, channels, inner, BY, ROWS, LANES, CHUNKS)
    if bias_ptr is not None:
        bs = load_parameter(bias_ptr, group, start, left, channels, inner, BY, ROWS, LANES, CHUNKS)
    if WHOLE:
        mean = finish(fold_chunks(xs, "add", ROWS, LANES), n, "mean", 0.0)
        m2 = fold_chunks(squares_of(xs, mean, rows, num_rows, left, ROWS, LANES), "add", ROWS, LANES)
    else:
        _, mean, m2 = merged_moments(sum_ptr, m2_ptr, pid // sections * parts, 1, 0, parts, size, n, PARTS, 1, COMPUTE)
    one = tl.full(m2.shape, 1.0, COMPUTE)
    rstd = divide(one, square_root(finish(m2, n, "mean", 0.0) + tl.full(m2.shape, EPS, COMPUTE)))
    ys = ()
    for j in tl.static_range(CHUNKS):
        ys = ys + ((xs[j] - mean[:, None]) * rstd[:, None],)
    if weight_ptr is not None:
        scaled = ()
        for j in tl.static_range(CHUNKS):
            scaled = scaled + (ys[j] * ws[j].to(COMPUTE),)
        ys = scaled
    if bias_ptr is not None:
        moved = ()
        for j in tl.static_range(CHUNKS):
            moved = moved + (ys[j] + bs[j].to(COMPUTE),)
        ys = moved
    store_section(out_ptr + rows * n + start, ys, rows, num_rows, left, ROWS, LANES, CHUNKS, WHOLE)
    here = (rows < num_rows) & (section == 0)
    tl.store(mean_ptr + rows, mean, mask=here)
    tl.store(rstd_ptr + rows, rstd, mask=here)


# -- Plans ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parameters:
    """Which parameter an element has: number ``k`` of its row, or that of its channel.

    Attributes:
        by: ``element`` or ``channel``.
        groups, channels, inner: of a group norm, how many groups, channels in a group and elements in a channel.
    """

    by: str = "element"
    groups: int = 1
    channels: int = 1
    inner: int = 1

    @property
    def walk(self) -> tuple[int, int, int]:
        """What ``load_parameter`` takes."""
        return self.groups, self.channels, self.inner


def rows_of(x: Tensor) -> Rows | None:
    """Where the rows of ``x``, [..., n], lie; None if they are not dense or lie in more than two levels."""
    walk = Level.of(list(zip(x.shape, x.stride(), strict=True))[:-1])
    if walk is None or (x.shape[-1] > 1 and x.stride(-1) != 1):
        return None
    return Rows(walk, Level(x.shape[-1], 1, 0, 1, False), x.device)


Outputs = tuple[Tensor, Tensor, Tensor]


def plan_norm(
    at: Rows, x: Tensor, compute: torch.dtype, parameters: Parameters, eps: float
) -> Callable[[Tensor, Tensor | None, Tensor | None, Outputs], None]:
    """A step that normalises rows like those of ``x``; the results are y, mean and rstd."""
    require_rows(at.device)
    n, rows = at.cols.count, at.rows.count
    # Taken at a time, rows must start with the parameters that the first row has.
    group = rows_in_cache(n * x.element_size(), at.device, parameters.groups)
    if at.rows.two or rows <= group or Cut.of(n, compute).whole:
        step = _norm_step(at, compute, parameters, eps)
        return lambda x, weight, bias, out: step((x, *out), weight, bias)
    grouped = in_groups(rows, group, lambda count: _norm_step(at.first(count), compute, parameters, eps))

    def run(x: Tensor, weight: Tensor | None, bias: Tensor | None, out: Outputs) -> None:
        y, mean, rstd = out
        grouped((flat_rows(x, at.rows), y.view(-1, n), mean.view(-1), rstd.view(-1)), weight, bias)

    return run


def _norm_step(
    at: Rows, compute: torch.dtype, parameters: Parameters, eps: float
) -> Callable[[tuple[Tensor, Tensor, Tensor, Tensor], Tensor | None, Tensor | None], None]:
    cut, rows, index = Cut.of(at.cols.count, compute), at.rows.count, at.device.index
    statistics, parts = (None, 1) if cut.whole else moments(at, compute, None)
    size = cut.lanes * cut.chunks * triton.cdiv(cut.sections, parts)
    chosen = row_schedule_for(rows, cut.lanes, cut.chunks, cut.sections)
    launch = Launch(
        _norm_kernel,
        (triton.cdiv(rows, chosen.rows) * cut.sections,),
        (rows, cut.n, cut.sections, parts, size, *parameters.walk, *at.rows.walk),
        (
            *(eps, parameters.by, triton.next_power_of_2(parts), chosen.rows, cut.lanes, cut.chunks, cut.whole),
            *(at.rows.two, triton_type(compute)),
        ),
        chosen.warps,
    )

    def run(by_row: tuple[Tensor, Tensor, Tensor, Tensor], weight: Tensor | None, bias: Tensor | None) -> None:
        x, *out = by_row
        sums, m2 = (None, None) if statistics is None else statistics(x)
        launch(index, x, sums, m2, weight, bias, *out)

    return run


# -- The ops ----------------------------------------------------------------------------------------------------------


Norm = Callable[[Tensor, Tensor | None, Tensor | None], Outputs]
"""y, mean and rstd from x, weight and bias."""


def _plan(
    x: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float, parameters: Parameters
) -> Norm:
    """The norm of ``x``, [..., n], with one mean and rstd for each row, of ``shape``."""
    compute = compute_dtype(x.dtype)
    new_y, new_statistic = new_dense(x, x.shape), new_dense(x, shape, compute)
    if x.numel() == 0:
        return lambda x, weight, bias: (new_y(), new_statistic().fill_(math.nan), new_statistic().fill_(math.nan))
    at = rows_of(x)
    if at is None or any(t is not None and not t.is_contiguous() for t in (weight, bias)):
        of_dense = _plan(x.contiguous(), shape, _contiguous(weight), _contiguous(bias), eps, parameters)
        return lambda x, weight, bias: of_dense(x.contiguous(), _contiguous(weight), _contiguous(bias))
    step = plan_norm(at, x, compute, parameters, eps)

    def run(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Outputs:
        out = new_y(), new_statistic(), new_statistic()
        step(x, weight, bias, out)
        return out

    return run


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


@Planned
def layer_norm(
    x: Tensor, normalized_dims: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Callable[..., Outputs]:
    """y, mean and rstd; a row is the last ``normalized_dims`` dims of ``x``."""
    check_layer_norm(x, normalized_dims, weight, bias)
    first, like = x.dim() - normalized_dims, x.shape
    norm = _plan(x.flatten(first), (*like[:first], *([1] * normalized_dims)), weight, bias, eps, Parameters())
    if normalized_dims == 1:
        return lambda x, normalized_dims, weight, bias, eps: norm(x, weight, bias)

    def run(x: Tensor, normalized_dims: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Outputs:
        y, mean, rstd = norm(x.flatten(first), weight, bias)
        return y.view(like), mean, rstd

    return run


@Planned
def group_norm(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Callable[..., Outputs]:
    """y, mean and rstd, both [N, groups]; a row is one group of channels of one sample."""
    check_group_norm(x, groups, weight, bias)
    like = x.shape
    norm = _plan(by_group(x, groups), (like[0], groups), weight, bias, eps, of_channels(x, groups))

    def run(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Outputs:
        y, mean, rstd = norm(by_group(x, groups), weight, bias)
        return y.view(like), mean, rstd

    return run


def by_group(x: Tensor, groups: int) -> Tensor:
    """``x`` as [N, groups, elements of a group]."""
    return x.reshape(x.shape[0], groups, x.shape[1] // groups * x.shape[2:].numel())


def of_channels(x: Tensor, groups: int) -> Parameters:
    """The parameters of the elements of ``by_group``."""
    return Parameters("channel", groups, x.shape[1] // groups, max(x.shape[2:].numel(), 1))
