"""The scatter ops on a GPU.

A stable sort by destination puts the contributions of each destination side by side, in the order of the source.  Then
the first of them walks along the rest and adds them up, one IEEE addition after the other: no atomics, and nothing to
see of who ran what.  Nothing waits for the GPU, so all of it can be captured in a CUDA graph.

An index that is out of range fails a device-side assertion, as it does in torch: the next call that waits for the GPU
raises.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bicompile.lowering.gpu.device import device_key
from bicompile.lowering.gpu.launch import INTERPRETED, Launch
from bicompile.lowering.gpu.plans import on_device

from .gpu_kernels import (
    canonical_kernel,
    keys_kernel,
    walk_columns_kernel,
    walk_long_rows_kernel,
    walk_rows_kernel,
    walk_sorted_kernel,
)
from .order import order_for
from .schedule import ElementSchedule, RowSchedule, element_schedule_for, row_schedule_for
from .selftest import require_scatters

_STEPS = {"sum": "add", "mean": "add", "prod": "multiply", "amax": "larger", "amin": "smaller"}
_STARTS = {"sum": 0.0, "mean": 0.0, "prod": 1.0, "amax": float("-inf"), "amin": float("inf")}
_FLAT = 1024  # elements of one program of a kernel that goes over memory once


# -- Launchers --------------------------------------------------------------------------------------------------------


def _launch(
    kernel: Any,
    programs: int,
    tensors: tuple[Tensor | None, ...],
    integers: tuple[int, ...],
    constants: tuple[Any, ...],
    warps: int = 4,
    debug: bool = False,
) -> None:
    """Launch ``programs`` programs; with ``debug``, assertions of the kernel are compiled in."""
    layout = tuple(t if t is None else (t.dtype, t.data_ptr() % 16 == 0) for t in tensors)
    index = next(t.device.index for t in tensors if t is not None)
    options = (("debug", True),) if debug else ()
    _launch_for(kernel, programs, integers, constants, warps, options, (layout, index))(index, *tensors)


@functools.lru_cache(8192)
def _launch_for(
    kernel: Any,
    programs: int,
    integers: tuple[int, ...],
    constants: tuple[Any, ...],
    warps: int,
    options: tuple[tuple[str, Any], ...],
    like: Any,
) -> Launch:
    """A launch for tensors that are ``like`` those of its other calls."""
    return Launch(kernel, (programs,), integers, constants, warps, **dict(options))


def _keys(index: Tensor, count: int, columns: int, wrap: bool = False) -> Tensor:
    """``index * columns + column`` for each element of ``index``, [n, columns] or [n] for one column, in row order.

    An index outside [0, count), or outside [-count, count) where it may ``wrap``, fails a device-side assertion.
    """
    if index.dim() == 2 and not index.is_contiguous():
        index = index.contiguous()
    step = index.stride(0) if index.dim() == 1 else 1
    keys = torch.empty(index.numel(), dtype=_key_dtype(count * columns), device=index.device)
    if index.numel():
        n = index.numel()
        _launch(keys_kernel, triton.cdiv(n, _FLAT), (index, keys), (n, columns, count, step), (wrap, _FLAT), debug=True)
    return keys


def _key_dtype(count: int) -> torch.dtype:
    return torch.int32 if count < 2**31 else torch.int64


def _sorted(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The keys in ascending order, and where each was; equal ones stay in order."""
    ordered, positions = torch.sort(keys, stable=True)
    return ordered, positions


def _canonical(x: Tensor) -> Tensor:
    """A contiguous copy of ``x``, with the canonical NaN for every other."""
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel():
        _launch(canonical_kernel, triton.cdiv(x.numel(), _FLAT), (x, out), (x.numel(),), (_FLAT,))
    return out


def walk_rows(
    self: Tensor | None,
    index: Tensor,
    values: Tensor,
    count: int,
    *,
    reduce: str = "sum",
    include_self: bool = True,
    skipped: int = -1,
    divide: bool = False,
    schedule: RowSchedule | None = None,
) -> Tensor:
    """Take ``values[:, p]`` into ``out[:, index[p]]``, p ascending.

    Args:
        self: the initial values, [outer, count, width], or None for zeros.
        index: int64 or int32, [n].
        values: [outer, n, width].
        count: destinations.
        reduce: the step: ``sum``, ``prod``, ``amax``, ``amin`` or ``mean``.
        include_self: whether the initial value is the first contribution; where not, it stays only where nothing goes.
        skipped: a destination that takes no contributions.
        divide: divide by the number of contributions, as ``mean`` does.
    """
    require_scatters(values.device)
    outer, n, width = values.shape
    if self is None:
        out = torch.zeros(outer, count, width, dtype=values.dtype, device=values.device)
    else:
        self = self.contiguous()
        out = _canonical(self)
    keys = _keys(index, count, 1)
    if n == 0 or out.numel() == 0:
        return out
    ordered, positions = _sorted(keys)
    if width > 1 and values.stride(2) != 1:
        values = values.contiguous()
    chosen = schedule or row_schedule_for(width, values.element_size())
    from_self = self is not None and include_self
    tensors = (ordered, positions, self if from_self else None, values, out)
    what = (_STEPS[reduce], _STARTS[reduce], from_self, divide or reduce == "mean")
    acc = tl.float64 if values.dtype == torch.float64 else tl.float32

    def walk(kernel: Any, starts: int, block: int, ahead: int, warps: int) -> None:
        blocks = triton.cdiv(width, block)
        strides = (values.stride(0), values.stride(1), count * width)
        integers = (n, width, blocks, outer * blocks, *strides, skipped)
        constants = (*what, block, ahead, chosen.long, acc)
        _launch(kernel, starts * outer * blocks, tensors, integers, constants, warps)

    walk(walk_rows_kernel, n, chosen.block, chosen.ahead, chosen.warps)
    if chosen.long and n >= chosen.long:
        walk(walk_long_rows_kernel, n // chosen.long, chosen.long_block, chosen.long_ahead, 1)
    return out


def walk_elements(
    total: Tensor, keys: Tensor, values: Tensor, how: str, schedule: ElementSchedule | None = None
) -> None:
    """Take ``values`` [length, columns] into ``total`` at ``keys`` [length * columns], each column from first to last.

    Args:
        total: the running values, flat and contiguous, in the accumulating dtype; changed in place.
        keys: where each value goes; values of different columns never go to the same place.
        values: contiguous.
    """
    length, columns = values.shape
    n = values.numel()
    if n == 0:
        return
    require_scatters(values.device)
    num_sms = 128 if INTERPRETED else device_key(values.device.index).num_sms
    chosen = schedule or element_schedule_for(length, columns, num_sms)
    if chosen.walk == "columns":
        tensors, programs = (keys, values, total), triton.cdiv(columns, chosen.block)
        constants = (how, chosen.block, chosen.ahead)
        _launch(walk_columns_kernel, programs, tensors, (length, columns), constants, warps=chosen.block // 32)
        return
    ordered, positions = _sorted(keys)
    constants = (how, chosen.block, chosen.ahead)
    programs = triton.cdiv(n, chosen.block)
    _launch(walk_sorted_kernel, programs, (ordered, positions, values, total), (n,), constants)


# -- The ops ----------------------------------------------------------------------------------------------------------


@on_device
def index_add(self: Tensor, dim: int, index: Tensor, source: Tensor, alpha: float) -> Tensor:
    """``self`` plus the slices of ``source`` times ``alpha`` (rounded), each at the place that ``index`` names."""
    source = source if alpha == 1 else source * alpha
    if self.dim() == 0:
        return index_add(self.reshape(1), 0, index.reshape(1), source.reshape(1), 1.0).reshape(())
    return _along(self, dim % self.dim(), index.reshape(-1), source, "sum", True)


@on_device
def segment_add(self: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """``self`` [outer, m, width] plus ``values`` [outer, n, width] at ``index`` [n] of its middle dim."""
    return _along(self, 1, index, values, "sum", True)


@on_device
def embedding_dense_backward(
    grad: Tensor, indices: Tensor, num_weights: int, padding_idx: int, scale_grad_by_freq: bool
) -> Tensor:
    """The gradient of an embedding's weight, [num_weights, width]."""
    width = grad.shape[-1]
    values = grad.reshape(1, indices.numel(), width)
    index = indices.reshape(-1)
    out = walk_rows(None, index, values, num_weights, skipped=padding_idx, divide=scale_grad_by_freq)
    return out.view(num_weights, width)


@on_device
def scatter_reduce(self: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, include_self: bool) -> Tensor:
    """``out[i][index[i][j]] = step(out[i][index[i][j]], src[i][j])`` for ``dim=1``, j ascending, and so for others."""
    if index.numel() == 0:
        return _canonical(self)
    if self.dim() == 0:
        flat = (self.reshape(1), 0, index.reshape(-1), src.reshape(-1))
        return scatter_reduce(*flat, reduce, include_self).reshape(())
    dim = dim % self.dim()
    src = _cut(src, index)
    others = [d for d in range(self.dim()) if d != dim]
    if all(index.shape[d] == self.shape[d] and (index.stride(d) == 0 or index.shape[d] == 1) for d in others):
        at = index.movedim(dim, 0).reshape(index.shape[dim], -1)[:, 0]
        return _along(self, dim, at, src, reduce, include_self)
    index, src = index.movedim(dim, 0), src.movedim(dim, 0)
    if all(index.shape[place] == self.shape[d] for place, d in enumerate(others, 1)):
        result = _scatter_columns(self.movedim(dim, 0), index, src, reduce, include_self)
        return result.movedim(0, dim).contiguous()
    out = _canonical(self)
    part = out.movedim(dim, 0)
    for place in range(1, part.dim()):
        part = part.narrow(place, 0, index.shape[place])
    part.copy_(_scatter_columns(part, index, src, reduce, include_self))
    return out


def checked_index(index: Tensor, count: int) -> Tensor:
    """``index`` of any shape as int64 in [0, count), negative ones counted from the end."""
    keys = _keys(index.reshape(-1), count, 1, wrap=True)
    return keys.long().view(index.shape)


def _along(self: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, include_self: bool) -> Tensor:
    """``walk_rows`` along ``dim``, with the dims before it as ``outer`` and those after it as ``width``."""
    shape, n = self.shape, index.numel()
    outer, count, width = shape[:dim].numel(), shape[dim], shape[dim + 1 :].numel()
    if outer > 1 and width < 32:
        # The slices in front, so that a program's columns lie side by side.
        front = self.movedim(dim, 0), source.movedim(dim, 0)
        moved = _along(front[0], 0, index, front[1], reduce, include_self)
        return moved.movedim(0, dim).contiguous()
    out = walk_rows(
        self.reshape(outer, count, width),
        index,
        source.reshape(outer, n, width),
        count,
        reduce=reduce,
        include_self=include_self,
    )
    return out.view(shape)


def _scatter_columns(part: Tensor, index: Tensor, src: Tensor, reduce: str, include_self: bool) -> Tensor:
    """The result for ``part`` [m, ...], whose columns ``index`` and ``src`` [n, ...] name the same way."""
    count, columns = part.shape[0], part.shape[1:].numel()
    keys = _keys(index.reshape(index.shape[0], columns), count, columns)
    values = src.reshape(index.shape[0], columns).contiguous()
    total = torch.empty(part.shape, dtype=order_for(part.dtype).accumulate, device=part.device)
    total = total.copy_(part).view(-1)
    if not include_self:
        total.index_fill_(0, keys.long(), _STARTS[reduce])
    walk_elements(total, keys, values, _STEPS[reduce])
    if reduce == "mean":
        counts = torch.full_like(total, 1 if include_self else 0, dtype=torch.int32)
        counts.index_add_(0, keys, torch.ones_like(keys, dtype=torch.int32))
        total = total / counts.clamp(min=1)
    return _canonical(total.to(part.dtype)).view(part.shape)


def _cut(src: Tensor, index: Tensor) -> Tensor:
    """The first elements of ``src`` in every dim, as many as ``index`` has."""
    for d in range(src.dim()):
        src = src.narrow(d, 0, index.shape[d])
    return src
