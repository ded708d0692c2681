"""Launching the attention kernels: forward."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bicompile.lowering.gpu.device import device_key
from bicompile.lowering.gpu.launch import INTERPRETED, on_device

from .admitted import choose
from .kernels import tile_kernel
from .order import GpuAttentionOrder
from .problem import TYPES, Problem, RowInfo, cdiv, launch, mask_strides, problem_of, row_info
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


def new_outputs(p: Problem) -> tuple[Tensor, Tensor]:
    """Output and statistics, laid out as the fake kernel says."""
    batch, heads, queries, _ = p.q.shape
    out = torch.empty((batch, queries, heads, p.v.shape[3]), dtype=p.q.dtype, device=p.q.device).transpose(1, 2)
    wide = torch.float64 if p.q.dtype == torch.float64 else torch.float32
    return out, torch.empty((batch, heads, queries), dtype=wide, device=p.q.device)


def _strides(p: Problem, info: RowInfo) -> tuple[int, ...]:
    return (
        *p.q.stride()[:3], *p.k.stride()[:3], *p.v.stride()[:3], *mask_strides(p.mask), *info.strides,
        p.q.shape[3], p.v.shape[3],
    )  # fmt: skip


def _tile_constants(p: Problem, schedule: TileSchedule, flagged: int) -> tuple[Any, ...]:
    tail = p.tail(schedule.tma, schedule.stages)
    return (schedule.rows, *tail[:-1], flagged, p.drops, *tail[-1:])


def run_tiles(p: Problem, schedule: TileSchedule) -> tuple[Tensor, Tensor]:
    """Forward by tiles of queries."""
    batch, heads, queries, _ = p.q.shape
    out, lse = new_outputs(p)
    info = row_info(p)
    k, v = descriptors(p) if schedule.tma else (p.k, p.v)
    launch(
        tile_kernel, (batch * heads, cdiv(queries, schedule.rows)),
        (p.q, k, v, p.mask if p.mask is not None else p.q, info.first, info.hole, info.last, out, lse, p.q,
         p.seeds_or_q),
        (queries, p.k.shape[2], heads, p.k.shape[1], *p.scales, *p.dropout), _strides(p, info),
        _tile_constants(p, schedule, 0), schedule.warps, schedule.stages,
    )  # fmt: skip
    return out, lse


def run_splits(p: Problem, schedule: SplitSchedule) -> tuple[Tensor, Tensor]:
    """Forward by splits of keys over programs, and a merge if a row has several programs."""
    batch, heads, queries, _ = p.q.shape
    keys, kv_heads, value_depth = p.k.shape[2], p.k.shape[1], p.v.shape[3]
    out, lse = new_outputs(p)
    info = row_info(p)
    num_rows, group = batch * heads * queries, heads // kv_heads
    v_programs = schedule.v_programs
    tail = p.tail(schedule.tma, schedule.stages, v_programs)
    k, v = descriptors(p, v_programs) if schedule.tma else (p.k, p.v)
    part, stats, splits, programs, early = out, lse, 1, 1, False
    span = max(schedule.span, p.order.splits[0][1])
    if schedule.span > 0:
        splits = p.order.num_splits(keys)
        part = torch.empty((num_rows, splits, value_depth), dtype=lse.dtype, device=lse.device)
        stats = torch.empty((num_rows, splits, 2), dtype=lse.dtype, device=lse.device)
        programs = p.order.num_splits(keys, schedule.span)
        early = not INTERPRETED and device_key(p.q.device.index).capability >= (9, 0)
    launch(
        split_kernel, (batch * kv_heads, cdiv(queries * group, schedule.rows) * v_programs, programs),
        (p.q, k, v, p.mask if p.mask is not None else p.q, info.first, info.hole, info.last, part, stats),
        (queries, keys, heads, kv_heads, splits, span.bit_length() - 1, p.order.even_until(span), *p.scales),
        _strides(p, info),
        (early, schedule.span > 0, v_programs, schedule.rows, *tail), schedule.warps, schedule.stages,
    )  # fmt: skip
    if schedule.span > 0:
        at_once = merged_at_once(splits)
        again = splits > at_once
        constants = (early, p.widths[1], at_once, again, p.kind, p.causal, TYPES[p.q.dtype], *tail[-1:])
        launch(
            merge_kernel, (num_rows,), (part, stats, info.first, info.last, out, lse),
            (queries, keys, heads, splits), (*info.strides, value_depth), constants, MERGE_WARPS, 1,
            launch_pdl=early,
        )  # fmt: skip
    return out, lse


def num_pieces(order: GpuAttentionOrder, keys: int) -> int:
    """``keys`` keys in splits of the smallest size."""
    return cdiv(keys, order.splits[0][1])


def descriptors(p: Problem, v_programs: int = 1) -> tuple[Any, Any]:
    """TMA descriptors of keys and values, of whose columns ``v_programs`` programs take a part each."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    width, value_width = p.widths
    block = p.order.block
    return (
        TensorDescriptor.from_tensor(p.k, [1, 1, block, width]),
        TensorDescriptor.from_tensor(p.v, [1, 1, block, value_width // v_programs]),
    )


def run_hopper(p: Problem, schedule: HopperSchedule) -> tuple[Tensor, Tensor]:
    """Forward by the kernel of sm_90, for problems without a mask whose tensors TMA can read."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from .hopper import ROWS, hopper_kernel

    batch, heads, queries, depth = p.q.shape
    block = p.order.block
    out, lse = new_outputs(p)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    descs = tuple(
        TensorDescriptor.from_tensor(t, [1, 1, rows, depth], layout)
        for t, rows in ((p.q, ROWS), (p.k, block), (p.v, block))
    )
    dtype = gl.bfloat16 if p.q.dtype == torch.bfloat16 else gl.float16
    groups = cdiv(queries, ROWS)
    looks_twice = p.causal or p.mask is not None
    flags = torch.empty(batch * heads * groups if looks_twice else 0, dtype=torch.int32, device=out.device)
    info = row_info(p)
    mask = p.mask if p.mask is not None else p.q
    sizes = (queries, p.k.shape[2], heads, p.k.shape[1])
    launch(
        hopper_kernel, (batch * heads, cdiv(queries, 2 * ROWS)),
        (*descs, mask, info.first, info.hole, info.last, out, lse, flags), (*sizes, p.scales[0]),
        (*mask_strides(p.mask), *info.strides),
        (ROWS, block, depth, p.order.lanes, p.kind, p.causal, schedule.stages, schedule.overlap, dtype,
         p.order.levels),
        4, 1, maxnreg=168,
    )  # fmt: skip
    if looks_twice:
        run_flagged(p, info, ROWS, flags, out, lse)
    return out, lse


def run_flagged(p: Problem, info: RowInfo, rows: int, flags: Tensor, out: Tensor, lse: Tensor) -> None:
    """Compute again, with the care of ``tile_kernel``, the tiles of ``rows`` queries whose flag is set.

    ``flags`` is [batch * heads, tiles], int32.  Nearly always none is set, so a program looks at several.
    """
    batch, heads, queries, _ = p.q.shape
    schedule, at_once = TileSchedule(rows, warps=8, stages=1), 8
    launch(
        tile_kernel, (batch * heads, cdiv(cdiv(queries, rows), at_once)),
        (p.q, p.k, p.v, p.mask if p.mask is not None else p.q, info.first, info.hole, info.last, out, lse, flags,
         p.seeds_or_q),
        (queries, p.k.shape[2], heads, p.k.shape[1], *p.scales, *p.dropout), _strides(p, info),
        _tile_constants(p, schedule, at_once), schedule.warps, schedule.stages,
    )  # fmt: skip


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


@on_device
def sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float, rows: Tensor | None = None,
    seeds: Tensor | None = None, dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention and its lse; see ``op.py`` for shapes and ``order.GpuAttentionOrder`` for the order."""
    p = problem_of("sdpa", q, k, v, mask, is_causal, scale, rows, seeds, dropout_p)
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    if batch * heads * queries == 0 or keys == 0:
        out, lse = new_outputs(p)
        return out.zero_(), lse.fill_(-math.inf)
    group_rows = queries * (heads // k.shape[1])
    if INTERPRETED:
        return run(p, SplitSchedule(16, 4, 1) if group_rows <= 16 and not p.drops else REFERENCE)
    device = device_key(q.device.index)
    candidates: list[Schedule] = []
    if not p.drops and wants_split(queries, heads // k.shape[1], keys, batch * heads, device.num_sms):
        programs = batch * k.shape[1] * cdiv(group_rows, 16)
        pieces = num_pieces(p.order, keys)
        schedules = split_schedules(group_rows, pieces, programs, mask is not None, p.widths, q.dtype, device)
        candidates += [s for s in schedules if not s.tma or (takes_tma(p.k) and takes_tma(p.v))]
    else:
        if not p.drops and takes_hopper(p, device.capability):
            candidates += hopper_schedules(queries)
        tma = takes_tma(p.k) and takes_tma(p.v)
        candidates += [s for s in tile_schedules(queries, p.widths, q.dtype, device) if tma or not s.tma]
    return run(p, choose(p, tuple(candidates), REFERENCE, run, run))


def run(p: Problem, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """Forward under any schedule."""
    if isinstance(schedule, SplitSchedule):
        return run_splits(p, schedule)
    if isinstance(schedule, HopperSchedule):
        return run_hopper(p, schedule)
    return run_tiles(p, schedule)
