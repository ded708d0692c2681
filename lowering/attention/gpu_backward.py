"""Launching the attention kernels: backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from bicompile.lowering.gpu.device import device_key
from bicompile.lowering.gpu.launch import INTERPRETED, Launch
from bicompile.lowering.gpu.plans import Planned, new_dense

from .admitted import TWIN, choose, twins
from .backward_kernels import begin_kernel, delta_kernel, key_kernel, mask_kernel, query_kernel, sum_kernel
from .gpu import run as run_forward
from .op import check_op
from .problem import (
    TYPES,
    Problem,
    RowInfo,
    cdiv,
    info_strides,
    mask_strides,
    prepared,
    problem_of,
    row_info,
    two_parts,
)
from .schedule import REFERENCE, REFERENCE_BACKWARD, BackwardSchedule, Tiles, backward_schedules


@dataclass(frozen=True)
class Call:
    """What all backward kernels are given: a problem, and of its rows the gradient, the statistics and the mask."""

    p: Problem
    grad: Tensor
    out: Tensor
    lse: Tensor
    delta: Tensor
    info: RowInfo

    @property
    def device(self) -> int:
        """The CUDA device's index."""
        return self.p.q.device.index

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
            *p.q.stride()[:3], *p.k.stride()[:3], *p.v.stride()[:3], *mask_strides(p.mask), *info_strides(p),
            p.q.shape[3], p.v.shape[3], *self.grad.stride()[:3],
        )  # fmt: skip

    def constants(self, queries: int, keys: int, stages: int) -> tuple[Any, ...]:
        """For blocks of ``queries`` and of ``keys``."""
        p, (width, value_width) = self.p, self.p.widths
        return (
            queries, keys, width, value_width, width == p.q.shape[3], value_width == p.v.shape[3], p.kind, p.causal,
            p.hidden, stages, TYPES[p.q.dtype], p.drops,
        )  # fmt: skip


def call_of(p: Problem, grad: Tensor, out: Tensor, lse: Tensor) -> Call:
    """Bring what the kernels are given into their form, read the mask's rows, and leave room for each row's delta."""
    grad, out = (t if t.stride(3) == 1 or out.shape[3] <= 1 else t.contiguous() for t in (grad, out))
    lse = lse.contiguous()
    return Call(p, grad, out, lse, torch.empty_like(lse), row_info(p))


def backward_plan(
    call: Call, scale: float, mask_grad: bool, schedule: BackwardSchedule
) -> Callable[[Call], tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Gradients of q, k, v and, if wanted, of the mask; ``scale`` with the sign that the problem has put into q."""
    compute_delta = delta_plan(call)
    query_gradient, key_gradient = query_plan(call, scale, schedule.queries), key_plan(call, schedule.keys)
    mask_gradient = _mask_plan(call, call.p.mask) if mask_grad and call.p.mask is not None else _no_gradient

    def run(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        compute_delta(call)
        return query_gradient(call), *key_gradient(call), mask_gradient(call)

    return run


def delta_plan(call: Call) -> Callable[[Call], None]:
    """Compute each row's delta."""
    batch, heads, queries, value_depth = call.out.shape
    num_rows, rows, p, device = batch * heads * queries, 16, call.p, call.device
    launch = Launch(
        delta_kernel, (cdiv(num_rows, rows),),
        (queries, heads, num_rows, *call.grad.stride()[:3], *call.out.stride()[:3], value_depth),
        (rows, p.widths[1], TYPES[p.q.dtype]), 4,
    )  # fmt: skip
    return lambda call: launch(device, call.grad, call.out, call.delta)


def query_plan(call: Call, scale: float, tiles: Tiles) -> Callable[[Call], Tensor]:
    """The gradient of q."""
    (batch, heads, queries, _), device = call.p.q.shape, call.device
    launch = Launch(
        query_kernel, (batch * heads, cdiv(queries, tiles.own)),
        (*call.sizes, *two_parts(scale), *call.p.dropout, *call.strides),
        call.constants(tiles.own, tiles.step, tiles.stages), tiles.warps, tiles.stages,
    )  # fmt: skip

    def run(call: Call) -> Tensor:
        p = call.p
        dq = torch.empty(p.q.shape, dtype=p.q.dtype, device=p.q.device)
        launch(
            device, p.q, p.k, p.v, p.mask_or_q, *call.info, call.grad, call.lse, call.delta, dq, p.seeds_or_q
        )  # fmt: skip
        return dq

    return run


def key_plan(call: Call, tiles: Tiles) -> Callable[[Call], tuple[Tensor, Tensor]]:
    """The gradients of k and v."""
    (batch, kv_heads, keys, _), device = call.p.k.shape, call.device
    begin_of, begin_strides = _begin_plan(call)
    launch = Launch(
        key_kernel, (batch * kv_heads, cdiv(keys, tiles.own)),
        (*call.sizes, *two_parts(call.p.scale), *call.p.dropout, *call.strides, *begin_strides),
        call.constants(tiles.step, tiles.own, tiles.stages), tiles.warps, tiles.stages,
    )  # fmt: skip

    def run(call: Call) -> tuple[Tensor, Tensor]:
        p = call.p
        dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (p.k, p.v))
        launch(
            device, p.q, p.k, p.v, p.mask_or_q, *call.info, begin_of(call), call.grad, call.lse, call.delta, dk, dv,
            p.seeds_or_q,
        )  # fmt: skip
        return dk, dv

    return run


def _begin_plan(call: Call) -> tuple[Callable[[Call], Tensor], tuple[int, int]]:
    """The first query of each row of the mask that sees any key, and its strides."""
    p, device = call.p, call.device
    if p.mask is None:
        return lambda call: call.p.q, (0, 0)  # which no kernel reads
    batch, heads = p.mask.shape[:2]
    launch = Launch(begin_kernel, (batch * heads,), (p.q.shape[2], p.k.shape[2]), (1024,), 4)

    def run(call: Call) -> Tensor:
        begin = torch.empty((batch, heads), dtype=torch.int32, device=call.p.q.device)
        launch(device, call.info.first, begin)
        return begin

    return run, (heads if batch > 1 else 0, 1 if heads > 1 else 0)


def _no_gradient(call: Call) -> Tensor:
    """Of a mask that wants none."""
    return call.p.q.new_empty(0)


def _mask_plan(call: Call, mask: Tensor) -> Callable[[Call], Tensor]:
    """The masked scores' gradient, summed over the dims in which the mask was broadcast, in ascending order."""
    p, device = call.p, call.device
    batch, heads, queries, depth = p.q.shape
    keys, value_depth = p.k.shape[2], p.v.shape[3]
    batches, mask_heads, mask_queries, mask_keys = mask.shape
    rows = cols = 16 if call.lse.dtype == torch.float64 else 32
    width, value_width = p.widths
    launch = Launch(
        mask_kernel, (cdiv(keys, cols), cdiv(queries, rows), batches * mask_heads),
        (queries, keys, batch, heads, p.k.shape[1], batches, mask_heads, *p.scales, *p.dropout, *call.strides),
        (rows, cols, width, value_width, width == depth, value_width == value_depth, p.causal, p.hidden,
         TYPES[p.q.dtype], p.drops), 4,
    )  # fmt: skip

    def run(call: Call) -> Tensor:
        p, lse = call.p, call.lse
        ds = torch.empty((batches, mask_heads, queries, keys), dtype=lse.dtype, device=lse.device)
        launch(
            device, p.q, p.k, p.v, p.mask_or_q, call.info.first, call.grad, lse, call.delta, ds, p.seeds_or_q
        )  # fmt: skip
        if mask_queries == 1 and queries != 1:
            ds = _sum(ds, batches * mask_heads, queries, keys).view(batches, mask_heads, 1, keys)
        if mask_keys == 1 and keys != 1:
            ds = _sum(ds, ds.numel() // keys, keys, 1).view(batches, mask_heads, -1, 1)
        return ds.to(p.mask_or_q.dtype)

    return run


@Planned
def _sum(x: Tensor, outer: int, length: int, inner: int) -> Callable[..., Tensor]:
    """Sum the middle dim of ``x``, seen as [outer, length, inner], in ascending order."""
    new, block, device = new_dense(x, (outer, inner)), min(triton.next_power_of_2(inner), 128), x.device.index
    launch = Launch(sum_kernel, (outer, cdiv(inner, block)), (outer, length, inner), (block,), 1)

    def run(x: Tensor, outer: int, length: int, inner: int) -> Tensor:
        out = new()
        launch(device, x, out)
        return out

    return run


def probe(p: Problem, schedule: BackwardSchedule) -> tuple[Tensor, ...]:
    """The gradients of ``p`` for a gradient that is the output itself, but of the other sign for twins."""
    out, lse = run_forward(p, REFERENCE)
    grad = out.clone()
    twin = twins(grad.shape[2], grad.device)
    grad[:, :, twin] = -grad[:, :, twin - TWIN]
    return run(p, grad, out, lse, schedule)[:3]


def run(
    p: Problem, grad: Tensor, out: Tensor, lse: Tensor, schedule: BackwardSchedule
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of ``p`` under any schedule, at once; none of the mask."""
    call = call_of(p, grad, out, lse)
    return backward_plan(call, p.scale, False, schedule)(call)


@Planned
def sdpa_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor, is_causal: bool,
    scale: float, mask_grad: bool, seeds: Tensor | None = None, dropout_p: float = 0.0,
) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:  # fmt: skip
    """Gradients of q, k, v and, if wanted, of the mask; see ``op.py``."""
    check_op("sdpa_backward", q, k, v, mask, seeds, dropout_p)
    p = problem_of("sdpa_backward", q, k, v, mask, is_causal, scale, None, seeds, dropout_p)
    new = [new_dense(t, t.shape) for t in (q, k, v)]
    new_mask = new_dense(q, (0,)) if mask is None or not mask_grad else new_dense(mask, mask.shape)
    if q.numel() == 0 or k.numel() == 0 or v.numel() == 0:
        return lambda *arguments: (*(new_one().zero_() for new_one in new), new_mask().zero_())
    schedule = REFERENCE_BACKWARD
    if not INTERPRETED:
        candidates = backward_schedules(p.widths, q.dtype, device_key(q.device.index))
        schedule = choose(p, tuple(candidates), REFERENCE_BACKWARD, probe)
    plan = backward_plan(call_of(p, grad, out, lse), scale, mask_grad, schedule)

    def run(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor, is_causal: bool,
        scale: float, mask_grad: bool, seeds: Tensor | None = None, dropout_p: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        p = prepared(q, k, v, mask, is_causal, scale, None, seeds, dropout_p)
        dq, dk, dv, dmask = plan(call_of(p, grad, out, lse))
        return dq, dk, dv, dmask.view(mask.shape) if mask is not None and mask_grad else dmask

    return run
