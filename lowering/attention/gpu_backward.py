"""Launching the attention kernels: backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from bicompile.lowering.gpu.device import device_key
from bicompile.lowering.gpu.launch import INTERPRETED, on_device

from .admitted import TWIN, choose, twins
from .backward_kernels import begin_kernel, delta_kernel, key_kernel, mask_kernel, query_kernel, sum_kernel
from .gpu import run_tiles
from .problem import TYPES, Problem, RowInfo, cdiv, launch, mask_strides, problem_of, row_info, two_parts
from .schedule import REFERENCE, REFERENCE_BACKWARD, BackwardSchedule, Tiles, backward_schedules


def run_backward(
    p: Problem, grad: Tensor, out: Tensor, lse: Tensor, scale: float, mask_grad: bool, schedule: BackwardSchedule
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and, if wanted, of the mask; ``scale`` with the sign that ``p`` has put into q."""
    call = prepare(p, grad, out, lse)
    dq = query_gradient(call, scale, schedule.queries)
    dk, dv = key_gradient(call, schedule.keys)
    dmask = _mask_gradient(p, p.mask, call) if mask_grad and p.mask is not None else p.q.new_empty(0)
    return dq, dk, dv, dmask


@dataclass(frozen=True)
class Backward:
    """What all backward kernels are given: a problem, and of its rows the gradient, the statistics and the mask."""

    p: Problem
    grad: Tensor
    lse: Tensor
    delta: Tensor
    info: RowInfo

    @property
    def sizes(self) -> tuple[Any, ...]:
        """Numbers that no kernel is specialised on."""
        q, k = self.p.q, self.p.k
        return q.shape[2], k.shape[2], q.shape[1], k.shape[1], *self.p.scales

    @property
    def strides(self) -> tuple[int, ...]:
        """Of q, k, v, the mask and its rows; the depths; of the gradient."""
        p = self.p
        return (
            *p.q.stride()[:3], *p.k.stride()[:3], *p.v.stride()[:3], *mask_strides(p.mask), *self.info.strides,
            p.q.shape[3], p.v.shape[3], *self.grad.stride()[:3],
        )  # fmt: skip

    def constants(self, queries: int, keys: int, stages: int) -> tuple[Any, ...]:
        """For blocks of ``queries`` and of ``keys``."""
        p, (width, value_width) = self.p, self.p.widths
        return (
            queries, keys, width, value_width, width == p.q.shape[3], value_width == p.v.shape[3], p.kind, p.causal,
            p.hidden, stages, TYPES[p.q.dtype], p.drops,
        )  # fmt: skip


def prepare(p: Problem, grad: Tensor, out: Tensor, lse: Tensor) -> Backward:
    """Compute each row's delta, and read the mask's rows."""
    batch, heads, queries, value_depth = out.shape
    num_rows = batch * heads * queries
    grad, out = (t if t.stride(3) == 1 or value_depth <= 1 else t.contiguous() for t in (grad, out))
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    launch(
        delta_kernel, (cdiv(num_rows, 16),), (grad, out, delta), (queries, heads, num_rows),
        (*grad.stride()[:3], *out.stride()[:3], value_depth), (16, p.widths[1], TYPES[p.q.dtype]), 4, 1,
    )  # fmt: skip
    return Backward(p, grad, lse, delta, row_info(p))


def query_gradient(call: Backward, scale: float, tiles: Tiles) -> Tensor:
    """The gradient of q."""
    p, info = call.p, call.info
    batch, heads, queries, _ = p.q.shape
    dq = torch.empty(p.q.shape, dtype=p.q.dtype, device=p.q.device)
    launch(
        query_kernel, (batch * heads, cdiv(queries, tiles.own)),
        (p.q, p.k, p.v, p.mask_or_q, info.first, info.hole, info.last, call.grad, call.lse, call.delta, dq,
         p.seeds_or_q),
        (*call.sizes, *two_parts(scale), *p.dropout), call.strides, call.constants(tiles.own, tiles.step, tiles.stages),
        tiles.warps, tiles.stages,
    )  # fmt: skip
    return dq


def key_gradient(call: Backward, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """The gradients of k and v."""
    p, info = call.p, call.info
    batch, kv_heads, keys, _ = p.k.shape
    dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (p.k, p.v))
    begin, begin_strides = _begin(p, info)
    launch(
        key_kernel, (batch * kv_heads, cdiv(keys, tiles.own)),
        (p.q, p.k, p.v, p.mask_or_q, info.first, info.hole, info.last, begin, call.grad, call.lse, call.delta, dk, dv,
         p.seeds_or_q),
        (*call.sizes, *two_parts(p.scale), *p.dropout), (*call.strides, *begin_strides),
        call.constants(tiles.step, tiles.own, tiles.stages), tiles.warps, tiles.stages,
    )  # fmt: skip
    return dk, dv


def _begin(p: Problem, info: RowInfo) -> tuple[Tensor, tuple[int, int]]:
    """The first query of each row of the mask that sees any key."""
    if p.mask is None:
        return p.q, (0, 0)
    batch, heads = p.mask.shape[:2]
    begin = torch.empty((batch, heads), dtype=torch.int32, device=p.q.device)
    launch(
        begin_kernel, (batch * heads,), (info.first, begin), (p.q.shape[2], p.k.shape[2]), (), (1024,), 4, 1
    )  # fmt: skip
    return begin, (heads if batch > 1 else 0, 1 if heads > 1 else 0)


def _mask_gradient(p: Problem, mask: Tensor, call: Backward) -> Tensor:
    """The masked scores' gradient, summed over the dims in which the mask was broadcast, in ascending order."""
    batch, heads, queries, depth = p.q.shape
    keys, value_depth = p.k.shape[2], p.v.shape[3]
    batches, mask_heads = mask.shape[:2]
    ds = torch.empty((batches, mask_heads, queries, keys), dtype=call.lse.dtype, device=call.lse.device)
    rows = cols = 16 if call.lse.dtype == torch.float64 else 32
    width, value_width = p.widths
    launch(
        mask_kernel, (cdiv(keys, cols), cdiv(queries, rows), batches * mask_heads),
        (p.q, p.k, p.v, mask, call.info.first, call.grad, call.lse, call.delta, ds, p.seeds_or_q),
        (queries, keys, batch, heads, p.k.shape[1], batches, mask_heads, *p.scales, *p.dropout), call.strides,
        (rows, cols, width, value_width, width == depth, value_width == value_depth, p.causal, p.hidden,
         TYPES[p.q.dtype], p.drops), 4, 1,
    )  # fmt: skip
    if mask.shape[2] == 1 and queries != 1:
        ds = _sum(ds, batches * mask_heads, queries, keys).view(batches, mask_heads, 1, keys)
    if mask.shape[3] == 1 and keys != 1:
        ds = _sum(ds, ds.numel() // keys, keys, 1).view(batches, mask_heads, -1, 1)
    return ds.to(mask.dtype)


def _sum(x: Tensor, outer: int, length: int, inner: int) -> Tensor:
    """Sum the middle dim of ``x``, seen as [outer, length, inner], in ascending order."""
    out = torch.empty((outer, inner), dtype=x.dtype, device=x.device)
    block = min(triton.next_power_of_2(inner), 128)
    launch(sum_kernel, (outer, cdiv(inner, block)), (x, out), (outer, length, inner), (), (block,), 1, 1)
    return out


def probe(p: Problem, schedule: BackwardSchedule) -> tuple[Tensor, ...]:
    """The gradients of ``p`` for a gradient that is the output itself, but of the other sign for twins."""
    out, lse = run_tiles(p, REFERENCE)
    grad = out.clone()
    twin = twins(grad.shape[2], grad.device.index)
    grad[:, :, twin] = -grad[:, :, twin - TWIN]
    return run_backward(p, grad, out, lse, p.scale, False, schedule)[:3]


@on_device
def sdpa_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor, is_causal: bool,
    scale: float, mask_grad: bool, seeds: Tensor | None = None, dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v and, if wanted, of the mask; see ``op.py``."""
    p = problem_of("sdpa_backward", q, k, v, mask, is_causal, scale, None, seeds, dropout_p)
    if q.numel() == 0 or k.numel() == 0 or v.numel() == 0:
        dq, dk, dv = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
        if mask is None or not mask_grad:
            return dq, dk, dv, q.new_empty(0)
        return dq, dk, dv, torch.zeros(mask.shape, dtype=mask.dtype, device=q.device)
    schedule = REFERENCE_BACKWARD
    if not INTERPRETED:
        candidates = backward_schedules(p.widths, q.dtype, device_key(q.device.index))
        schedule = choose(p, tuple(candidates), REFERENCE_BACKWARD, probe, probe)
    dq, dk, dv, dmask = run_backward(p, grad, out, lse, scale, mask_grad, schedule)
    return dq, dk, dv, dmask.view(mask.shape) if mask is not None and mask_grad else dmask
