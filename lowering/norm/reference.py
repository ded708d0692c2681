"""Layer norm and group norm and their gradients, said in plain torch.

Each takes the ``moments`` or the ``fold`` of the order that is meant, see ``reduction.reference``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bicompile.lowering.reduction import reference as reductions
from bicompile.lowering.reduction.reference import Fold, Moments, canonical, count, fold, sqrt

from .order import group_parameters_order_for, order_for


def moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Those of a reduction on the CPU, with the sum of squares in float64: in its dtype ``rstd`` is computed."""
    mean, m2 = reductions.moments(rows)
    return mean, m2.double()


def fold_parameters(rows: Tensor) -> Tensor:
    """The gradients of a group norm's parameters, in the order of the CPU."""
    return fold(rows.to(group_parameters_order_for(rows.shape[-1], rows.dtype).compute))


def _statistics(rows: Tensor, eps: float, moments: Moments) -> tuple[Tensor, Tensor]:
    mean, m2 = moments(rows)
    var = m2 / torch.full((), rows.shape[-1], dtype=m2.dtype)
    one, small = torch.ones((), dtype=m2.dtype), torch.full((), eps, dtype=m2.dtype)
    return mean, (one / sqrt(var + small)).to(rows.dtype)


def _backward(g: Tensor, rows: Tensor, mean: Tensor, rstd: Tensor, fold: Fold) -> Tensor:
    xhat = (rows - mean) * rstd
    g_mean, product_mean = fold(g) / count(rows), fold(g * xhat) / count(rows)
    return (g - (g_mean + xhat * product_mean)) * rstd


def _norm(
    rows: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, moments: Moments
) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = _statistics(rows, eps, moments)
    y = (rows - mean) * rstd
    if weight is not None:
        y = y * weight.to(rows.dtype)
    if bias is not None:
        y = y + bias.to(rows.dtype)
    return y, mean, rstd


def layer_norm(
    x: Tensor,
    normalized_dims: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    moments: Moments = moments,
) -> tuple[Tensor, Tensor, Tensor]:
    first = x.dim() - normalized_dims
    rows = x.to(order_for(0, x.dtype).compute).flatten(first)
    flat_weight, flat_bias = (None if t is None else t.flatten() for t in (weight, bias))
    y, mean, rstd = _norm(rows, flat_weight, flat_bias, eps, moments)
    shape = (*x.shape[:first], *([1] * normalized_dims))
    return canonical(y.reshape(x.shape).to(x.dtype)), canonical(mean.reshape(shape)), canonical(rstd.reshape(shape))


def layer_norm_backward(
    grad: Tensor,
    x: Tensor,
    normalized_dims: int,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    fold: Fold = fold,
) -> Tensor:
    compute = order_for(0, x.dtype).compute
    g, rows = (t.to(compute).flatten(x.dim() - normalized_dims) for t in (grad, x))
    center, scale = (t.to(compute).reshape(*rows.shape[:-1], 1) for t in (mean, rstd))
    g = g if weight is None else g * weight.to(compute).flatten()
    return canonical(_backward(g, rows, center, scale, fold).reshape(x.shape).to(x.dtype))


def layer_norm_backward_params(
    grad: Tensor,
    x: Tensor,
    normalized_dims: int,
    mean: Tensor,
    rstd: Tensor,
    dtype: torch.dtype,
    fold: Fold = fold,
) -> tuple[Tensor, Tensor]:
    compute = order_for(0, x.dtype).compute
    first = x.dim() - normalized_dims
    shape = x.shape[first:]
    rows, g = (t.to(compute).reshape(-1, shape.numel()) for t in (x, grad))
    center, scale = (t.to(compute).reshape(-1, 1) for t in (mean, rstd))
    sums = [fold(t.T.contiguous()) for t in (g * ((rows - center) * scale), g)]
    return canonical(sums[0].reshape(shape).to(dtype)), canonical(sums[1].reshape(shape).to(dtype))


def _channels(t: Tensor | None, x: Tensor, groups: int) -> Tensor | None:
    """One number for each channel, spread over the elements of its group: [groups, C / groups * inner]."""
    if t is None:
        return None
    inner = x.shape[2:].numel()
    return t.reshape(groups, -1, 1).expand(-1, -1, inner).flatten(1)


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    moments: Moments = moments,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.to(order_for(0, x.dtype).compute).reshape(x.shape[0], groups, -1)
    y, mean, rstd = _norm(rows, _channels(weight, x, groups), _channels(bias, x, groups), eps, moments)
    return canonical(y.reshape(x.shape).to(x.dtype)), canonical(mean.squeeze(-1)), canonical(rstd.squeeze(-1))


def group_norm_backward(
    grad: Tensor,
    x: Tensor,
    groups: int,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    fold: Fold = fold,
) -> Tensor:
    compute = order_for(0, x.dtype).compute
    g, rows = (t.to(compute).reshape(x.shape[0], groups, -1) for t in (grad, x))
    spread = _channels(weight, x, groups)
    g = g if spread is None else g * spread.to(compute)
    result = _backward(g, rows, mean.to(compute).unsqueeze(-1), rstd.to(compute).unsqueeze(-1), fold)
    return canonical(result.reshape(x.shape).to(x.dtype))


def group_norm_backward_params(
    grad: Tensor,
    x: Tensor,
    groups: int,
    mean: Tensor,
    rstd: Tensor,
    dtype: torch.dtype,
    fold: Fold = fold_parameters,
) -> tuple[Tensor, Tensor]:
    compute = order_for(0, x.dtype).compute
    rows = x.to(compute).reshape(x.shape[0], groups, -1)
    xhat = ((rows - mean.to(compute).unsqueeze(-1)) * rstd.to(compute).unsqueeze(-1)).reshape(*x.shape[:2], -1)
    g = grad.to(compute).reshape(*x.shape[:2], -1)
    sums = [fold(t.transpose(0, 1).flatten(1)).flatten() for t in (g * xhat, g)]
    return canonical(sums[0].to(dtype)), canonical(sums[1].to(dtype))
