"""The orders of a scan, on the CPU and on a GPU, said in plain torch: one Python step per element."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .order import gpu_order_for, order_for

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


def gpu_cumsum(x: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """``cumsum`` in the order of a GPU."""
    return _gpu_scan(x.to(dtype), dim, 0.0, torch.add)


def gpu_cumprod(x: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """``cumprod`` in the order of a GPU."""
    return _gpu_scan(x.to(dtype), dim, 1.0, torch.mul)


def _gpu_scan(x: Tensor, dim: int, start: float, step: Step) -> Tensor:
    if x.dim() == 0:
        return _gpu_scan(x.reshape(1), 0, start, step).reshape(())
    running = _inclusive(x.to(order_for(x.dtype).accumulate).movedim(dim, -1), start, step)
    result = running.movedim(-1, dim).to(x.dtype)
    return torch.where(result.isnan(), torch.nan, result).contiguous()


def _inclusive(rows: Tensor, start: float, step: Step) -> Tensor:
    """Running values along the last dim, segment by segment."""
    segments = rows.split(gpu_order_for(rows.dtype).segment, -1)
    first = torch.full(rows.shape[:-1], start, dtype=rows.dtype)
    before = first.unsqueeze(-1)
    if len(segments) > 1:
        totals = torch.stack([_running(segment, first, step)[-1] for segment in segments], -1)
        before = torch.cat([before, _inclusive(totals[..., :-1], start, step)], -1)
    running = [_running(segment, before[..., i], step) for i, segment in enumerate(segments)]
    return torch.stack([value for values in running for value in values], -1) if rows.shape[-1] else rows


def _running(segment: Tensor, value: Tensor, step: Step) -> list[Tensor]:
    values = []
    for x in segment.unbind(-1):
        value = step(value, x)
        values.append(value)
    return values
