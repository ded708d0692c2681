"""Layer and group norm, forward and backward, as our ops of ``lowering.norm``; batch and weight norm as sums.

The ops are put in place while a graph is traced, not by a pass, because of what lies between forward and backward: ATen
says that the statistics of a half-precision norm are rounded to that precision there, and a pass, which sees forward
and backward one by one, could only keep to it.  Here the backward gets them as they were computed.

The backward splits into the gradient of the row, which is batch-invariant, and the gradients of weight and bias, which
sum over the rows in one fixed order; those that nobody asked for are not computed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._decomp.decompositions import _weight_norm_interface as _stock_weight_norm
from torch._decomp.decompositions import native_batch_norm_helper
from torch._ops import OpOverload
from torch._prims_common import suggest_memory_format

aten = torch.ops.aten
bicompile = torch.ops.bicompile

_Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def _compute(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _layer_norm(x: Tensor, normalized_shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> Any:
    if not x.is_floating_point():
        return NotImplemented
    return bicompile.layer_norm(x, len(normalized_shape), weight, bias, eps)


def _group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, n: int, c: int, inner: int, groups: int, eps: float
) -> Any:
    if not x.is_floating_point():
        return NotImplemented
    y, mean, rstd = bicompile.group_norm(x, groups, weight, bias, eps)
    if x.device.type == "cpu" and weight is not None:  # as torch._refs has it, which Dynamo traces later views against
        y = y.contiguous(memory_format=suggest_memory_format(x))
    return y, mean, rstd


def _gradients(
    op: str,
    grad: Tensor,
    x: Tensor,
    rows: int,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    dtype: torch.dtype,
    wanted: list[bool],
) -> _Gradients:
    """The gradients of ``x``, weight and bias that are ``wanted``.

    Args:
        rows: what says where the rows of ``x`` are: the normalized dims, or the groups.
        dtype: that of weight and bias.
    """
    d_x = d_weight = d_bias = None
    if wanted[0]:
        d_x = getattr(bicompile, f"{op}_backward")(grad, x, rows, mean, rstd, weight)
    if wanted[1] or wanted[2]:
        d_weight, d_bias = getattr(bicompile, f"{op}_backward_params")(grad, x, rows, mean, rstd, dtype)
    return d_x, d_weight if wanted[1] else None, d_bias if wanted[2] else None


def _layer_norm_backward(
    grad: Tensor,
    x: Tensor,
    normalized_shape: list[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    output_mask: list[bool],
) -> _Gradients:
    dtype = next(t.dtype for t in (weight, bias, x) if t is not None)
    return _gradients("layer_norm", grad, x, len(normalized_shape), mean, rstd, weight, dtype, output_mask)


def _group_norm_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    n: int,
    c: int,
    inner: int,
    groups: int,
    output_mask: list[bool],
) -> _Gradients:
    dtype = x.dtype if weight is None else weight.dtype
    return _gradients("group_norm", grad, x, groups, mean, rstd, weight, dtype, output_mask)


def _spread(channels: Tensor, x: Tensor) -> Tensor:
    """``channels`` [C], in the shape that broadcasts over ``x`` [N, C, ...]."""
    return channels.reshape([-1 if d == 1 else 1 for d in range(x.dim())])


def _weight_norm(weight: Tensor, gain: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    """PyTorch's decomposition, but of a vector, where each element is its own norm: there it takes one of them all."""
    if weight.dim() > 1:
        norms: tuple[Tensor, Tensor] = _stock_weight_norm(weight, gain, dim)
        return norms
    norm = weight.float().abs() if gain.dtype == torch.bfloat16 else weight.abs()
    return weight * (gain / norm.to(gain.dtype)), norm


def _weight_norm_backward(grad: Tensor, weight: Tensor, gain: Tensor, norm: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Gradients of ``v`` and ``g`` in ``v * (g / norm(v))``, whose norms leave out ``dim``."""
    compute, others = _compute(weight), [d for d in range(weight.dim()) if d != dim % weight.dim()]
    grad, v, g, norm = (t.to(compute) for t in (grad, weight, gain, norm))
    along = (grad * v).sum(others, keepdim=True) if others else grad * v
    of_v = (g / norm) * (grad - v * (along / (norm * norm)))
    return of_v.to(weight.dtype), (along / norm).to(gain.dtype)


def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    functional: bool = False,
) -> tuple[Tensor, ...]:
    """PyTorch's form.  A kernel of its own takes the root: else compiled code takes it anew for every element."""
    if not training or x.device.type != "cpu":
        stock: Any = native_batch_norm_helper(
            x, weight, bias, running_mean, running_var, training, momentum, eps, functional
        )
        return tuple(stock if functional else stock[:3])
    axes = [d for d in range(x.dim()) if d != 1]
    var, mean = torch.var_mean(x.to(_compute(x)), axes, correction=0)
    rstd = bicompile.unary(var + eps, "rsqrt")
    y = (x - _spread(mean, x)) * _spread(rstd, x)
    if weight is not None:
        y = y * _spread(weight, x)
    if bias is not None:
        y = y + _spread(bias, x)
    found = y.to(x.dtype), mean.to(x.dtype), rstd.to(x.dtype)
    if running_mean is None or running_var is None:
        return found
    n = math.prod(x.shape[d] for d in axes)
    updated = [  # rounded once to a half precision, as compiled code does it
        (momentum * new + (1 - momentum) * running.to(new.dtype)).to(running.dtype)
        for new, running in ((mean, running_mean), (var * (n / (n - 1)), running_var))
    ]
    if functional:
        return (*found, *updated)
    running_mean.copy_(updated[0])
    running_var.copy_(updated[1])
    return found


def _batch_norm_without_statistics(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, training: bool, momentum: float, eps: float
) -> tuple[Tensor, ...]:
    return _batch_norm(x, weight, bias, None, None, training, momentum, eps)


def _batch_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    training: bool,
    eps: float,
    output_mask: list[bool],
) -> _Gradients:
    """PyTorch's form with fewer roundings; on a CPU its sums are in float64, as those of ATen's kernel there are."""
    compute = _compute(x)
    if not training:
        assert running_mean is not None and running_var is not None
        mean, rstd = running_mean, torch.rsqrt(running_var.to(compute) + eps)
    assert mean is not None and rstd is not None
    axes = [d for d in range(x.dim()) if d != 1]
    g, rstd = grad.to(compute), rstd.to(compute)
    distance = x.to(compute) - _spread(mean.to(compute), x)
    summed = g, g * distance
    if x.device.type != "cpu" or compute == torch.float64:
        total, product = (t.sum(axes) for t in summed)
    else:
        # Rounded by a kernel of its own, as sums of one: else compiled code rounds them anew for every element.
        sums = torch.stack([t.sum(axes, dtype=torch.float64) for t in summed])
        total, product = sums.unsqueeze(0).sum(0, dtype=compute).unbind()
    d_x = d_weight = d_bias = None
    if output_mask[0]:
        d_x = g
        if training:
            share = 1 / math.prod(x.shape[d] for d in axes)
            slope = product * share * (rstd * rstd)
            d_x = g - (_spread(total * share, x) + distance * _spread(slope, x))
        d_x = (d_x * _spread(rstd if weight is None else rstd * weight, x)).to(x.dtype)
    dtype = x.dtype if weight is None else weight.dtype
    if output_mask[1]:
        d_weight = (product * rstd).to(dtype)
    if output_mask[2]:
        d_bias = total.to(dtype)
    return d_x, d_weight, d_bias


NORMAL_FORMS: dict[OpOverload, Callable[..., Any]] = {
    aten.native_layer_norm.default: _layer_norm,
    aten.native_layer_norm_backward.default: _layer_norm_backward,
    aten.native_group_norm.default: _group_norm,
    aten.native_group_norm_backward.default: _group_norm_backward,
    aten.native_batch_norm.default: _batch_norm,
    aten._native_batch_norm_legit.default: _batch_norm,
    aten._native_batch_norm_legit.no_stats: _batch_norm_without_statistics,
    aten._native_batch_norm_legit_functional.default: functools.partial(_batch_norm, functional=True),
    aten.native_batch_norm_backward.default: _batch_norm_backward,
    aten._weight_norm_interface.default: _weight_norm,
    aten._weight_norm_interface_backward.default: _weight_norm_backward,
}
