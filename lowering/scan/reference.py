"""The order of a scan, said in plain torch: one Python step per element."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .order import order_for

Step = Callable[[Tensor, Tensor], Tensor]


def cumsum(x: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Running sums of ``x``, converted to ``dtype`` first, along ``dim``."""
    return _scan(x.to(dtype), dim, 0.0, torch.add)


def cumprod(x: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Running products of ``x``, converted to ``dtype`` first, along ``dim``."""
    return _scan(x.to(dtype), dim, 1.0, torch.mul)


def logcumsumexp(x: Tensor, dim: int, log_add_exp: Step) -> Tensor:
    """Running ``log(sum(exp(x)))`` along ``dim``; ``log_add_exp(a, b)`` is the kernel's ``log(exp(a) + exp(b))``."""
    return _scan(x, dim, -math.inf, log_add_exp)


def _scan(x: Tensor, dim: int, start: float, step: Step) -> Tensor:
    if x.dim() == 0:
        return _scan(x.reshape(1), 0, start, step).reshape(())
    wide = x.to(order_for(x.dtype).accumulate)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    running = torch.full((), start, dtype=wide.dtype)
    for i in range(x.shape[dim]):
        running = step(*torch.broadcast_tensors(running, wide.select(dim, i)))
        result = running.to(x.dtype)
        out.select(dim, i).copy_(torch.where(result.isnan(), torch.nan, result))
    return out
