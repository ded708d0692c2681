"""Launching the attention kernels: forward."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bicompile.lowering.gpu.device import device_key
from bicompile.lowering.gpu.launch import INTERPRETED, Describe, Launch
from bicompile.lowering.gpu.plans import Planned, new_dense

from .admitted import choose
from .kernels import tile_kernel
from .op import check_op, statistics_dtype
from .order import GpuAttentionOrder
from .problem import TYPES, Problem, RowInfo, cdiv, info_strides, mask_strides, prepared, problem_of, row_info
from .schedule import (
    MERGE_WARPS,
    REFERENCE,
    HopperSchedule,
    Schedule,
    SplitSchedule,
    TileSchedule,
    hopper_schedules,
    merged_at_once,
    split_schedules,
    tile_schedules,
    wants_split,
)
from .split_kernels import merge_kernel, split_kernel

Plan = Callable[[Problem], tuple[Tensor, Tensor]]
"""Output and statistics of a problem whose tensors lie like those that it was made for."""


def outputs_of(p: Problem) -> Callable[[], tuple[Tensor, Tensor]]:
    """What makes output and statistics of a problem, laid out as the fake kernel says."""
    batch, heads, queries, _ = p.q.shape
    new_out = new_dense(p.q, (batch, heads, queries, p.v.shape[3]), order=(0, 2, 1, 3))
    new_lse = new_dense(p.q, (batch, heads, queries), statistics_dtype(p.q.dtype))
    return lambda: (new_out(), new_lse())


def _strides(p: Problem) -> tuple[int, ...]:
    return (
        *p.q.stride()[:3], *p.k.stride()[:3], *p.v.stride()[:3], *mask_strides(p.mask), *info_strides(p),
        p.q.shape[3], p.v.shape[3],
    )  # fmt: skip


def _tile_launch(p: Problem, schedule: TileSchedule, flagged: int) -> Launch:
    """By tiles of queries, or of every ``flagged`` tiles those whose flag is set."""
    batch, heads, queries, _ = p.q.shape
    tiles = cdiv(queries, schedule.rows)
    tail = p.tail(schedule.tma, schedule.stages)
    return Launch(
        tile_kernel, (batch * heads, cdiv(tiles, max(flagged, 1))),
        (queries, p.k.shape[2], heads, p.k.shape[1], *p.scales, *p.dropout, *_strides(p)),
        (schedule.rows, *tail[:-1], flagged, p.drops, *tail[-1:]), schedule.warps, schedule.stages,
        _described(p, schedule.tma),
    )  # fmt: skip


def tiles_plan(p: Problem, schedule: TileSchedule) -> Plan:
    """Forward by tiles of queries."""
    launch, device, new = _tile_launch(p, schedule, 0), p.q.device.index, outputs_of(p)

    def run(p: Problem) -> tuple[Tensor, Tensor]:
        out, lse = new()
        launch(device, p.q, p.k, p.v, p.mask_or_q, *row_info(p), out, lse, p.q, p.seeds_or_q)
        return out, lse

    return run


def splits_plan(p: Problem, schedule: SplitSchedule) -> Plan:
    """Forward by splits of keys over programs, and a merge if a row has several programs."""
    batch, heads, queries, _ = p.q.shape
    keys, kv_heads, value_depth = p.k.shape[2], p.k.shape[1], p.v.shape[3]
    num_rows, group, device = batch * heads * queries, heads // kv_heads, p.q.device.index
    splits, programs, early, several = 1, 1, False, schedule.span > 0
    span = max(schedule.span, p.order.splits[0][1])
    if several:
        splits, programs = p.order.num_splits(keys), p.order.num_splits(keys, schedule.span)
        early = not INTERPRETED and device_key(device).capability >= (9, 0)
    tail = p.tail(schedule.tma, schedule.stages, schedule.v_programs)
    split = Launch(
        split_kernel, (batch * kv_heads, cdiv(queries * group, schedule.rows) * schedule.v_programs, programs),
        (queries, keys, heads, kv_heads, splits, span.bit_length() - 1, p.order.even_until(span), *p.scales,
         *_strides(p)),
        (early, several, schedule.v_programs, schedule.rows, *tail), schedule.warps, schedule.stages,
        _described(p, schedule.tma, schedule.v_programs),
    )  # fmt: skip
    at_once = merged_at_once(splits)
    merge = Launch(
        merge_kernel, (num_rows,), (queries, keys, heads, splits, *info_strides(p), value_depth),
        (early, p.widths[1], at_once, splits > at_once, p.kind, p.causal, TYPES[p.q.dtype], p.order.levels),
        MERGE_WARPS, launch_pdl=early,
    )  # fmt: skip
    new, wide = outputs_of(p), statistics_dtype(p.q.dtype)
    new_part, new_stats = (new_dense(p.q, (num_rows, splits, width), wide) for width in (value_depth, 2))

    def run(p: Problem) -> tuple[Tensor, Tensor]:
        part, stats = out, lse = new()
        info = row_info(p)
        if several:
            part, stats = new_part(), new_stats()
        split(device, p.q, p.k, p.v, p.mask_or_q, *info, part, stats)
        if several:
            merge(device, part, stats, info.first, info.last, out, lse)
        return out, lse

    return run


def num_pieces(order: GpuAttentionOrder, keys: int) -> int:
    """``keys`` keys in splits of the smallest size."""
    return cdiv(keys, order.splits[0][1])


def _described(p: Problem, by_tma: bool, v_programs: int = 1) -> dict[int, Describe]:
    """How keys and values are read by TMA, of whose columns ``v_programs`` programs take a part each."""
    if not by_tma:
        return {}
    from triton.tools.tensor_descriptor import TensorDescriptor

    width, value_width = p.widths
    blocks = (p.k, [1, 1, p.order.block, width]), (p.v, [1, 1, p.order.block, value_width // v_programs])
    return {place: _like(TensorDescriptor, *block) for place, block in enumerate(blocks, start=1)}


def _like(descriptor: Any, t: Tensor, block: list[int], *layout: Any) -> Describe:
    """What describes tensors that lie like ``t``, read in blocks, with Triton's or Gluon's class of descriptors."""
    shape, strides = list(t.shape), list(t.stride())  # what is kept must not keep a tensor alive
    return lambda base: descriptor(base, shape, strides, block, *layout)


def hopper_plan(p: Problem, schedule: HopperSchedule) -> Plan:
    """Forward by the kernel of sm_90, for problems without an additive mask whose tensors TMA can read."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from .hopper import ROWS, hopper_kernel

    batch, heads, queries, depth = p.q.shape
    block, device = p.order.block, p.q.device.index
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    described = {
        place: _like(TensorDescriptor, t, [1, 1, rows, depth], layout)
        for place, (t, rows) in enumerate(((p.q, ROWS), (p.k, block), (p.v, block)))
    }
    launch = Launch(
        hopper_kernel, (batch * heads, cdiv(queries, 2 * ROWS)),
        (queries, p.k.shape[2], heads, p.k.shape[1], p.scales[0], *mask_strides(p.mask), *info_strides(p)),
        (ROWS, block, depth, p.order.lanes, p.kind, p.causal, schedule.stages, schedule.overlap,
         gl.bfloat16 if p.q.dtype == torch.bfloat16 else gl.float16, p.order.levels),
        4, described=described, maxnreg=168,
    )  # fmt: skip
    looks_twice = p.causal or p.mask is not None
    look_again = flagged_plan(p, ROWS)
    num_flags = batch * heads * cdiv(queries, ROWS) if looks_twice else 0
    new, new_flags = outputs_of(p), new_dense(p.q, (num_flags,), torch.int32)

    def run(p: Problem) -> tuple[Tensor, Tensor]:
        out, lse = new()
        info, flags = row_info(p), new_flags()
        launch(device, p.q, p.k, p.v, p.mask_or_q, *info, out, lse, flags)
        if looks_twice:
            look_again(p, info, flags, out, lse)
        return out, lse

    return run


def flagged_plan(p: Problem, rows: int) -> Callable[[Problem, RowInfo, Tensor, Tensor, Tensor], None]:
    """Compute again, with the care of ``tile_kernel``, the tiles of ``rows`` queries whose flag is set.

    The flags are [batch * heads, tiles], int32.  Nearly always none is set, so a program looks at several.
    """
    launch, device = _tile_launch(p, TileSchedule(rows, warps=8, stages=1), 8), p.q.device.index

    def run(p: Problem, info: RowInfo, flags: Tensor, out: Tensor, lse: Tensor) -> None:
        launch(device, p.q, p.k, p.v, p.mask_or_q, *info, out, lse, flags, p.seeds_or_q)

    return run


def takes_tma(t: Tensor) -> bool:
    """Whether TMA can read ``t``: addresses and strides of 16 bytes."""
    itemsize = t.element_size()
    return t.data_ptr() % 16 == 0 and all(s * itemsize % 16 == 0 and s > 0 for s in t.stride()[:3])


def takes_hopper(p: Problem, capability: tuple[int, int]) -> bool:
    """Whether the kernel of sm_90 can run ``p``."""
    depth = p.q.shape[3]
    return (
        capability == (9, 0) and p.kind != "additive" and p.q.element_size() == 2 and depth in (64, 128)
        and p.v.shape[3] == depth and takes_tma(p.q) and takes_tma(p.k) and takes_tma(p.v)
    )  # fmt: skip


@Planned
def sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float, rows: Tensor | None = None,
    seeds: Tensor | None = None, dropout_p: float = 0.0,
) -> Callable[..., tuple[Tensor, Tensor]]:  # fmt: skip
    """Attention and its lse; see ``op.py`` for shapes and ``order.GpuAttentionOrder`` for the order."""
    check_op("sdpa", q, k, v, mask, seeds, dropout_p)
    plan = _plan(problem_of("sdpa", q, k, v, mask, is_causal, scale, rows, seeds, dropout_p))
    return lambda *arguments: plan(prepared(*arguments))


def _plan(p: Problem) -> Plan:
    """The plan of the first schedule among the preferences that is admitted."""
    (batch, heads, queries, _), (kv_heads, keys) = p.q.shape, p.k.shape[1:3]
    if batch * heads * queries == 0 or keys == 0:
        return _nothing
    group_rows = queries * (heads // kv_heads)
    if INTERPRETED:
        return plan_of(p, SplitSchedule(16, 4, 1) if group_rows <= 16 and not p.drops else REFERENCE)
    device = device_key(p.q.device.index)
    tma = takes_tma(p.k) and takes_tma(p.v)
    candidates: list[Schedule] = []
    if not p.drops and wants_split(queries, heads // kv_heads, keys, batch * heads, device.num_sms):
        programs = batch * kv_heads * cdiv(group_rows, 16)
        pieces = num_pieces(p.order, keys)
        schedules = split_schedules(group_rows, pieces, programs, p.mask is not None, p.widths, p.q.dtype, device)
        candidates += [s for s in schedules if tma or not s.tma]
    else:
        if not p.drops and takes_hopper(p, device.capability):
            candidates += hopper_schedules(queries)
        candidates += [s for s in tile_schedules(queries, p.widths, p.q.dtype, device) if tma or not s.tma]
    return plan_of(p, choose(p, tuple(candidates), REFERENCE, run))


def _nothing(p: Problem) -> tuple[Tensor, Tensor]:
    """Of rows without keys, or of no rows."""
    out, lse = outputs_of(p)()
    return out.zero_(), lse.fill_(-math.inf)


def plan_of(p: Problem, schedule: Schedule) -> Plan:
    """Forward under any schedule."""
    if isinstance(schedule, SplitSchedule):
        return splits_plan(p, schedule)
    if isinstance(schedule, HopperSchedule):
        return hopper_plan(p, schedule)
    return tiles_plan(p, schedule)


def run(p: Problem, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """``p`` under any schedule, at once."""
    return plan_of(p, schedule)(p)
