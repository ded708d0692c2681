"""Softmax and its gradient, said in plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bicompile.lowering.reduction.reference import canonical, exp, fold, largest, log

from .order import order_for


def _rows(x: Tensor, dim: int, compute: torch.dtype) -> Tensor:
    wide = x.to(compute)
    return wide.movedim(dim, -1) if x.dim() else wide.reshape(1)


def _back(rows: Tensor, x: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    result = rows.movedim(-1, dim) if x.dim() else rows.reshape(())
    return canonical(result.to(dtype)).contiguous()


def softmax(x: Tensor, dim: int, log_: bool, dtype: torch.dtype, safe: bool = False) -> Tensor:
    if x.numel() == 0:
        return x.new_empty(x.shape, dtype=dtype)
    rows = _rows(x, dim, order_for(0, dtype).compute)
    distance = rows - largest(rows)
    powers = exp(distance)
    total = fold(powers)
    result = distance - log(total) if log_ else powers / total
    if safe:
        result = torch.where((rows == -math.inf).all(-1, keepdim=True), 0.0, result)
    return _back(result, x, dim, dtype)


def softmax_backward(grad: Tensor, y: Tensor, dim: int, log_: bool, dtype: torch.dtype) -> Tensor:
    compute = order_for(0, torch.float64 if torch.float64 in (dtype, y.dtype) else dtype).compute
    g, rows = _rows(grad, dim, compute), _rows(y, dim, compute)
    result = g - exp(rows) * fold(g) if log_ else rows * (g - fold(g * rows))
    return _back(result, y, dim, dtype)


def softmax_statistics(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    rows = _rows(x, dim, order_for(0, x.dtype).compute)
    top = largest(rows)
    shift = torch.where(top == -math.inf, 0.0, top)
    shape = x.shape[:dim] + x.shape[dim + 1 :] if dim >= 0 else x.movedim(dim, -1).shape[:-1]
    return shift.reshape(shape), log(fold(exp(rows - shift))).reshape(shape)
