"""The gradients of layer norm and group norm on a GPU: of the rows, and, summed over the rows, of the parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from bicompile.lowering.gpu.launch import Launch
from bicompile.lowering.gpu.plans import Planned, new_dense
from bicompile.lowering.gpu.rows import (
    Cut,
    compute_dtype,
    fold_chunks,
    load_section,
    mask_of,
    merged_sum,
    row_offsets,
    store_section,
    tree_of_columns,
    triton_type,
)
from bicompile.lowering.gpu.selftest import require_rows
from bicompile.lowering.reduction.gpu import FOLLOWS_BATCH, Fold, Rows, finish, fold_partial_columns, fold_rows, reduce
from bicompile.lowering.reduction.gpu_statistics import MERGED_ON_THE_WAY, dense_rows
from bicompile.lowering.reduction.schedule import columns_schedule_for, row_schedule_for

from .gpu import Parameters, by_group, load_parameter, of_channels, rows_of
from .op import (
    check_group_norm_backward,
    check_group_norm_backward_params,
    check_layer_norm_backward,
    check_layer_norm_backward_params,
)


@triton.jit(do_not_specialize=FOLLOWS_BATCH)
def _norm_backward_kernel(
    grad_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    sum_ptr,
    product_ptr,
    out_ptr,
    num_rows,
    n,
    sections,
    parts,
    groups,
    channels,
    inner,
    grad_size,
    grad_stride,
    grad_step,
    x_size,
    x_stride,
    x_step,
    STAGE: tl.constexpr,
    BY: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    CHUNKS: tl.constexpr,
    WHOLE: tl.constexpr,
    TWO_GRAD: tl.constexpr,
    TWO_X: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """One section of ROWS dense rows: STAGE ``sum`` writes its sums, ``write`` its gradient, ``both`` of whole rows."""
    pid = tl.program_id(0).to(tl.int64)
    section = pid % sections
    rows = pid // sections * ROWS + tl.arange(0, ROWS)
    start = section * (LANES * CHUNKS)
    left = tl.minimum(n - start, LANES * CHUNKS).to(tl.int32)
    live = rows < num_rows
    p = x_ptr + row_offsets(rows, x_size, x_stride, x_step, TWO_X) + start
    g_ptr = grad_ptr + row_offsets(rows, grad_size, grad_stride, grad_step, TWO_GRAD) + start
    mean = tl.load(mean_ptr + rows, mask=live, other=0.0).to(COMPUTE)[:, None]
    rstd = tl.load(rstd_ptr + rows, mask=live, other=0.0).to(COMPUTE)[:, None]
    gs = load_section(g_ptr, rows, num_rows, left, 0.0, ROWS, LANES, CHUNKS, WHOLE, COMPUTE)
    xs = load_section(p, rows, num_rows, left, 0.0, ROWS, LANES, CHUNKS, WHOLE, COMPUTE)
    if weight_ptr is not None:
        ws = load_parameter(weight_ptr, rows % groups, start, left, channels, inner, BY, ROWS, LANES, CHUNKS)
        scaled = ()
        for j in tl.static_range(CHUNKS):
            scaled = scaled + (gs[j] * ws[j].to(COMPUTE),)
        gs = scaled
    hats, products = (), ()
    for j in tl.static_range(CHUNKS):
        hat = (xs[j] - mean) * rstd
        hats = hats + (hat,)
        inside = mask_of(j, rows, num_rows, left, ROWS, LANES)
        products = products + (tl.where(inside, gs[j] * hat, 0.0).to(COMPUTE),)
    if STAGE == "write":
        total = merged_sum(sum_ptr, pid // sections, parts, PARTS) + tl.zeros([1], COMPUTE)
        product = merged_sum(product_ptr, pid // sections, parts, PARTS) + tl.zeros([1], COMPUTE)
    else:
        total = fold_chunks(gs, "add", ROWS, LANES)
        product = fold_chunks(products, "add", ROWS, LANES)
    if STAGE == "sum":
        tl.store(sum_ptr + rows * sections + section, total, mask=live)
        tl.store(product_ptr + rows * sections + section, product, mask=live)
    else:
        g_mean, product_mean = finish(total, n, "mean", 0.0), finish(product, n, "mean", 0.0)
        dxs = ()
        for j in tl.static_range(CHUNKS):
            dxs = dxs + ((gs[j] - (g_mean[:, None] + hats[j] * product_mean[:, None])) * rstd,)
        store_section(out_ptr + rows * n + start, dxs, rows, num_rows, left, ROWS, LANES, CHUNKS, WHOLE)


@triton.jit
def _parameters_kernel(
    grad_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_out_ptr,
    bias_out_ptr,
    num_rows,
    sections,
    width,
    grad_size,
    grad_stride,
    grad_step,
    x_size,
    x_stride,
    x_step,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    CHUNKS: tl.constexpr,
    TWO_GRAD: tl.constexpr,
    TWO_X: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Fold ``grad * xhat`` and ``grad`` over BLOCK lanes of one section of the rows, for WIDTH elements side by side.

    Both results are [section, block, width].
    """
    blocks: tl.constexpr = LANES // BLOCK
    pid = tl.program_id(0).to(tl.int64)
    strips = (width + WIDTH - 1) // WIDTH
    side = pid % strips * WIDTH + tl.arange(0, WIDTH)
    block = pid // strips % blocks
    section = pid // strips // blocks
    inside = side < width
    weights = tl.zeros([BLOCK, WIDTH], COMPUTE)
    biases = tl.zeros([BLOCK, WIDTH], COMPUTE)
    for j in tl.static_range(CHUNKS):
        k = section * (LANES * CHUNKS) + j * LANES + block * BLOCK + tl.arange(0, BLOCK)
        live = k < num_rows
        mask = live[:, None] & inside[None, :]
        g_ptr = grad_ptr + row_offsets(k, grad_size, grad_stride, grad_step, TWO_GRAD)[:, None] + side[None, :]
        p = x_ptr + row_offsets(k, x_size, x_stride, x_step, TWO_X)[:, None] + side[None, :]
        g = tl.load(g_ptr, mask=mask, other=0.0).to(COMPUTE)
        x = tl.load(p, mask=mask, other=0.0).to(COMPUTE)
        mean = tl.load(mean_ptr + k, mask=live, other=0.0).to(COMPUTE)[:, None]
        rstd = tl.load(rstd_ptr + k, mask=live, other=0.0).to(COMPUTE)[:, None]
        weights += tl.where(mask, g * ((x - mean) * rstd), 0.0).to(COMPUTE)
        biases += g
    to = (section * blocks + block) * width + side
    weight = tree_of_columns(weights, "add", BLOCK, WIDTH)
    bias = tree_of_columns(biases, "add", BLOCK, WIDTH)
    tl.store(weight_out_ptr + to, weight.to(weight_out_ptr.dtype.element_ty), mask=inside)
    tl.store(bias_out_ptr + to, bias.to(bias_out_ptr.dtype.element_ty), mask=inside)


# -- Plans ------------------------------------------------------------------------------------------------------------


def _plan_backward(
    g: Rows, at: Rows, compute: torch.dtype, parameters: Parameters
) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor], None]:
    require_rows(at.device)
    cut, rows, index = Cut.of(at.cols.count, compute), at.rows.count, at.device.index
    chosen = row_schedule_for(rows, cut.lanes, cut.chunks, cut.sections)

    def launch(stage: str, parts: int) -> Launch:
        return Launch(
            _norm_backward_kernel,
            (triton.cdiv(rows, chosen.rows) * cut.sections,),
            (rows, cut.n, cut.sections, parts, *parameters.walk, *g.rows.walk, *at.rows.walk),
            (
                *(stage, parameters.by, triton.next_power_of_2(parts), chosen.rows, cut.lanes, cut.chunks, cut.whole),
                *(g.rows.two, at.rows.two, triton_type(compute)),
            ),
            chosen.warps,
        )

    if cut.whole:
        both = launch("both", 1)
        return lambda grad, x, mean, rstd, weight, out: both(index, grad, x, mean, rstd, weight, None, None, out)
    first, few = launch("sum", 1), cut.sections <= MERGED_ON_THE_WAY
    write = launch("write", cut.sections if few else 1)
    merge = None if few else fold_rows(dense_rows((2 * rows, cut.sections), at.device), Fold(), compute, 0)

    def run(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, out: Tensor) -> None:
        sums = torch.empty((2, rows, cut.sections), dtype=compute, device=at.device)
        first(index, grad, x, mean, rstd, weight, sums[0], sums[1], None)
        if merge is not None:
            parts, sums = sums, torch.empty((2, rows), dtype=compute, device=at.device)
            merge(parts, sums)
        write(index, grad, x, mean, rstd, weight, sums[0], sums[1], out)

    return run


def _plan_parameters(
    g: Rows, at: Rows, compute: torch.dtype
) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None]:
    require_rows(at.device)
    cut, width, index = Cut.of(at.rows.count, compute), at.cols.count, at.device.index
    chosen = columns_schedule_for(width, cut.lanes, compute.itemsize)
    blocks = cut.lanes // chosen.block
    parts = blocks * cut.sections
    launch = Launch(
        _parameters_kernel,
        (triton.cdiv(width, chosen.width) * parts,),
        (cut.n, cut.sections, width, *g.rows.walk, *at.rows.walk),
        (
            *(chosen.width, chosen.block, cut.lanes, cut.chunks, g.rows.two, at.rows.two),
            triton_type(compute),
        ),
        chosen.warps,
    )
    if parts == 1:
        return lambda *tensors: launch(index, *tensors)
    rest = fold_partial_columns(1, cut, blocks, width, Fold(), compute, 0, at.device)

    def run(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor) -> None:
        # Two tensors: both lie at an address that ``rest`` was compiled for.
        weights, biases = (torch.empty((parts, width), dtype=compute, device=at.device) for _ in range(2))
        launch(index, grad, x, mean, rstd, weights, biases)
        rest(weights, weight)
        rest(biases, bias)

    return run


# -- The ops ----------------------------------------------------------------------------------------------------------


def _found(rows: Rows | None) -> Rows:
    assert rows is not None
    return rows


def _dense(x: Tensor) -> Tensor:
    return x if rows_of(x) is not None else x.contiguous()


Gradient = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""The gradient of x, from that of y, x, mean, rstd and weight."""


def _plan(grad: Tensor, x: Tensor, parameters: Parameters) -> Gradient:
    """The gradient of rows like those of ``x``, [..., n]."""
    new = new_dense(x, x.shape)
    if x.numel() == 0:
        return lambda *arguments: new()
    rows_of_grad, rows_of_x = (_found(rows_of(_dense(t))) for t in (grad, x))
    step = _plan_backward(rows_of_grad, rows_of_x, compute_dtype(x.dtype), parameters)

    def run(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None) -> Tensor:
        out = new()
        weight = None if weight is None else weight.contiguous()
        step(_dense(grad), _dense(x), mean.contiguous(), rstd.contiguous(), weight, out)
        return out

    return run


@Planned
def layer_norm_backward(
    grad: Tensor, x: Tensor, normalized_dims: int, mean: Tensor, rstd: Tensor, weight: Tensor | None
) -> Callable[..., Tensor]:
    """The gradient of ``x``."""
    check_layer_norm_backward(grad, x, normalized_dims, mean, rstd, weight)
    first, like = x.dim() - normalized_dims, x.shape
    gradient = _plan(grad.flatten(first), x.flatten(first), Parameters())
    return lambda grad, x, _, *others: gradient(grad.flatten(first), x.flatten(first), *others).view(like)


@Planned
def group_norm_backward(
    grad: Tensor, x: Tensor, groups: int, mean: Tensor, rstd: Tensor, weight: Tensor | None
) -> Callable[..., Tensor]:
    """The gradient of ``x``."""
    check_group_norm_backward(grad, x, groups, mean, rstd, weight)
    like, gradient = x.shape, _plan(by_group(grad, groups), by_group(x, groups), of_channels(x, groups))
    return lambda grad, x, _, *others: gradient(by_group(grad, groups), by_group(x, groups), *others).view(like)


@Planned
def layer_norm_backward_params(
    grad: Tensor, x: Tensor, normalized_dims: int, mean: Tensor, rstd: Tensor, dtype: torch.dtype
) -> Callable[..., tuple[Tensor, Tensor]]:
    """The gradients of weight and bias, summed over the rows."""
    check_layer_norm_backward_params(grad, x, normalized_dims, mean, rstd, dtype)
    first = x.dim() - normalized_dims
    new = new_dense(x, x.shape[first:], dtype)
    if x.shape[first:].numel() == 0 or x.numel() == 0:
        return lambda *arguments: (new().zero_(), new().zero_())
    rows_of_grad, rows_of_x = (_found(rows_of(_dense(t.flatten(first)))) for t in (grad, x))
    step = _plan_parameters(rows_of_grad, rows_of_x, compute_dtype(x.dtype))

    def run(
        grad: Tensor, x: Tensor, normalized_dims: int, mean: Tensor, rstd: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        weight, bias = new(), new()
        tensors = _dense(grad.flatten(first)), _dense(x.flatten(first)), mean.contiguous(), rstd.contiguous()
        step(*tensors, weight, bias)
        return weight, bias

    return run


def group_norm_backward_params(
    grad: Tensor, x: Tensor, groups: int, mean: Tensor, rstd: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The gradients of weight and bias: sums over the samples and over the elements of a channel."""
    check_group_norm_backward_params(grad, x, groups, mean, rstd, dtype)
    compute = compute_dtype(x.dtype)
    center, scale = (t.to(compute).reshape(x.shape[0], groups, 1) for t in (mean, rstd))
    # One op after the other: each rounds, as in the fused kernel of the layer norm.
    hats = (by_group(x, groups).to(compute) - center) * scale
    of_channel = (x.shape[0], x.shape[1], x.shape[2:].numel())
    g = grad.reshape(of_channel)
    products = hats.reshape(of_channel) * g.to(compute)
    sums = (reduce("sum", t, [0, 2], False, compute).to(dtype) for t in (products, g))
    weight, bias = sums
    return weight, bias
