"""Layer and group norm, forward and backward, as our ops of ``lowering.norm``.

They are put in place while a graph is traced, not by a pass, because of what lies between forward and backward: ATen
says that the statistics of a half-precision norm are rounded to that precision there, and a pass, which sees forward
and backward one by one, could only keep to it.  Here the backward gets them as they were computed.

The backward splits into the gradient of the row, which is batch-invariant, and the gradients of weight and bias, which
sum over the rows in one fixed order; those that nobody asked for are not computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._prims_common import suggest_memory_format

aten = torch.ops.aten
bicompile = torch.ops.bicompile

_Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


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


NORMAL_FORMS: dict[OpOverload, Callable[..., Any]] = {
    aten.native_layer_norm.default: _layer_norm,
    aten.native_layer_norm_backward.default: _layer_norm_backward,
    aten.native_group_norm.default: _group_norm,
    aten.native_group_norm_backward.default: _group_norm_backward,
}
