"""The forward and backward kernels as they are compiled, for tests that have no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from bicompile.lowering.gpu.ahead import Compilation

from .backward_kernels import key_kernel, query_kernel
from .hopper import ROWS, hopper_kernel
from .kernels import tile_kernel
from .order import gpu_order_for
from .schedule import (
    DEEP_BACKWARD,
    MERGE_WARPS,
    PLAIN_BACKWARD,
    REFERENCE,
    REFERENCE_BACKWARD,
    TABLES,
    BackwardSchedule,
    HopperSchedule,
    SplitSchedule,
    TileSchedule,
    merged_at_once,
    read_table,
)
from .split_kernels import merge_kernel, split_kernel

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
_LOOSE = ("queries", "keys", "heads", "kv_heads", "splits", "shift", "even", "threshold")


_OF_DROPOUT = ("inverse_high", "inverse_low")


def _how(causal: bool, dropout: bool) -> str:
    return f"{' causal' if causal else ''}{' dropout' if dropout else ''}"


def compilation(
    schedule: TileSchedule | SplitSchedule, dtype: torch.dtype, depth: int, mask: str = "none", *,
    causal: bool = False, dropout: bool = False,
) -> Compilation:  # fmt: skip
    """One forward kernel for heads of ``depth``, a power of two; ``dropout`` only by tiles."""
    import triton.language as tl

    split = isinstance(schedule, SplitSchedule)
    kernel = split_kernel if split else tile_kernel
    tma = schedule.tma
    name, order = _NAMES[dtype], gpu_order_for(depth, dtype)
    wide = "fp64" if dtype == torch.float64 else "fp32"
    constants: dict[str, Any] = dict(
        BM=schedule.rows, BN=order.block, BD=depth, BDV=depth, EVEN=True, EVEN_V=True, LANES=order.lanes, MASK=mask,
        CAUSAL=causal, HIDDEN=-1e38, TMA=tma, STAGES=schedule.stages, FLAGGED=0, DROPOUT=dropout,
        DTYPE=tl.float64 if dtype == torch.float64 else tl.float32, SPLITS=order.levels,
    )  # fmt: skip
    if isinstance(schedule, SplitSchedule):
        del constants["FLAGGED"], constants["DROPOUT"]
        columns = depth // schedule.v_programs
        constants |= {"EARLY": tma and schedule.span > 0, "SPLIT": schedule.span > 0}  # early on sm_90, as TMA is
        constants |= {"V_PROGRAMS": schedule.v_programs, "BDV": columns}
    signature = {a: "i32:16" for a in kernel.arg_names if a not in constants}
    signature |= {a: "i32" for a in _LOOSE if a in signature}
    signature |= {a: f"*{wide}:16" for a in ("lse_ptr", "part_ptr", "stats_ptr") if a in signature}
    signature |= {a: "*i32:16" for a in ("first_ptr", "hole_ptr", "last_ptr", "flag_ptr")}
    signature |= {a: "fp32" for a in ("c_high", "c_low", *_OF_DROPOUT)} | {"seeds_ptr": "*i64:16"}
    signature |= {a: f"*{name}:16" for a in ("q_ptr", "k_p", "v_p", "out_ptr") if a in signature}
    signature["mask_ptr"] = f"*{name}:16" if mask == "additive" else "*u8:16"
    if tma:
        for a, width in (("k_p", depth), ("v_p", constants["BDV"])):
            signature[a] = f"tensordesc<{name}[1, 1, {order.block}, {width}]>"
    if mask != "none":
        constants["mask_k"] = 1
    label = f"attention {name} {depth} {mask}{_how(causal, dropout)} {schedule}"
    return Compilation(
        label,
        kernel,
        signature,
        constants,
        schedule.warps,
        schedule.stages,
        needs=90 if tma or schedule in (TileSchedule(128, 8, 2), *_tuned_splits()) else 80,
    )


def merge_compilation(dtype: torch.dtype, depth: int, mask: str, splits: int, *, early: bool) -> Compilation:
    """The kernel that merges ``splits`` splits; ``early``: started before they have ended."""
    import triton.language as tl

    at_once = merged_at_once(splits)
    constants: dict[str, Any] = dict(
        EARLY=early, BDV=depth, AT_ONCE=at_once, AGAIN=splits > at_once, MASK=mask, CAUSAL=False, DTYPE=tl.float32,
        SPLITS=gpu_order_for(depth, dtype).levels,
    )  # fmt: skip
    signature = {a: "i32:16" for a in merge_kernel.arg_names if a not in constants}
    signature |= {a: "i32" for a in _LOOSE if a in signature}
    signature |= {"part_ptr": "*fp32:16", "stats_ptr": "*fp32:16", "lse_ptr": "*fp32:16"}
    signature |= {"first_ptr": "*i32:16", "last_ptr": "*i32:16", "out_ptr": f"*{_NAMES[dtype]}:16"}
    label = f"attention merge {_NAMES[dtype]} {depth} {mask} {splits}{' early' if early else ''}"
    return Compilation(label, merge_kernel, signature, constants, MERGE_WARPS, 1, needs=90 if early else 80)


def backward_compilations(
    schedule: BackwardSchedule, dtype: torch.dtype, depth: int, mask: str = "none", *,
    causal: bool = False, dropout: bool = False,
) -> Iterator[Compilation]:  # fmt: skip
    """The two large backward kernels for heads of ``depth``, a power of two."""
    import triton.language as tl

    name = _NAMES[dtype]
    wide = "fp64" if dtype == torch.float64 else "fp32"
    for kernel in (query_kernel, key_kernel):
        mine = kernel is query_kernel
        tiles = schedule.queries if mine else schedule.keys
        constants: dict[str, Any] = dict(
            BM=tiles.own if mine else tiles.step, BN=tiles.step if mine else tiles.own, BD=depth, BDV=depth,
            EVEN=True, EVEN_V=True, MASK=mask, CAUSAL=causal, HIDDEN=-1e38, STAGES=tiles.stages,
            DTYPE=tl.float64 if dtype == torch.float64 else tl.float32, DROPOUT=dropout,
        )  # fmt: skip
        signature = {a: "i32:16" for a in kernel.arg_names if a not in constants}
        signature |= {a: "i32" for a in _LOOSE if a in signature}
        signature |= {a: f"*{wide}:16" for a in ("lse_ptr", "delta_ptr")}
        signature |= {a: "*i32:16" for a in ("first_ptr", "hole_ptr", "last_ptr", "begin_ptr") if a in signature}
        signature |= {a: "fp32" for a in ("c_high", "c_low", "scale", "scale_low", *_OF_DROPOUT)}
        signature["seeds_ptr"] = "*i64:16"
        halves = ("q_ptr", "k_p", "v_p", "grad_ptr", "dq_ptr", "dk_ptr", "dv_ptr")
        signature |= {a: f"*{name}:16" for a in halves if a in signature}
        signature["mask_ptr"] = f"*{name}:16" if mask == "additive" else "*u8:16"
        if mask != "none":
            constants["mask_k"] = 1
        label = f"attention {name} {depth} {mask}{_how(causal, dropout)} {'dq' if mine else 'dk, dv'} {tiles}"
        yield Compilation(label, kernel, signature, constants, tiles.warps, tiles.stages)


def hopper_compilation(
    schedule: HopperSchedule, depth: int, mask: str = "none", *, causal: bool = False
) -> Compilation:
    """The kernel of sm_90 for bf16."""
    from triton.experimental.gluon import language as gl

    order = gpu_order_for(depth, torch.bfloat16)
    constants: dict[str, Any] = dict(
        ROWS=ROWS, BN=order.block, BD=depth, LANES=order.lanes, MASK=mask, CAUSAL=causal,
        STAGES=schedule.stages, OVERLAP=schedule.overlap, DTYPE=gl.bfloat16, SPLITS=order.levels,
    )  # fmt: skip
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    signature = {a: "i32" for a in hopper_kernel.arg_names if a not in constants}
    signature |= {"out_ptr": "*bf16:16", "lse_ptr": "*fp32:16", "mask_ptr": "*u8:16"}
    signature |= {a: "*i32:16" for a in ("flag_ptr", "first_ptr", "hole_ptr", "last_ptr")}
    if mask != "none":
        constants["mask_k"] = 1
    signature |= {"q_desc": f"tensordesc<bf16[1, 1, {ROWS}, {depth}],{layout!r}>", "c": "fp32"}
    signature |= {a: f"tensordesc<bf16[1, 1, {order.block}, {depth}],{layout!r}>" for a in ("k_desc", "v_desc")}
    label = f"attention bf16 {depth} {mask}{_how(causal, False)} {schedule}"
    return Compilation(label, hopper_kernel, signature, constants, 4, 1, {"maxnreg": 168}, needs=90, up_to=90)


def aot_cases() -> Iterator[Compilation]:
    """Every schedule, with the depths and masks it meets."""
    half, quarter = torch.bfloat16, torch.float16
    tiles: list[TileSchedule | SplitSchedule] = [REFERENCE, TileSchedule(64, 8, 2), TileSchedule(64, 8, 1)]
    splits: list[TileSchedule | SplitSchedule] = [
        SplitSchedule(16, 4, 1),
        SplitSchedule(16, 4, 2),
        SplitSchedule(32, 8, 2),
        *_tuned_splits(),
    ]
    for mask, causal in (("none", False), ("none", True), ("bool", False), ("additive", False)):
        for schedule in (*tiles, TileSchedule(128, 8, 2, True), TileSchedule(128, 8, 2), *splits):
            yield compilation(schedule, half, 128, mask, causal=causal)
        if not causal:
            for count in (4, 8, 16, 32):
                yield from (merge_compilation(half, 128, mask, count, early=early) for early in (False, True))
        for depth, kernels in ((128, PLAIN_BACKWARD), *_tuned_backward()):
            yield from backward_compilations(kernels, half, depth, mask, causal=causal)
        if mask != "additive":
            yield from (hopper_compilation(HopperSchedule(2, True), d, mask, causal=causal) for d in (64, 128))
    for dtype, depth in ((quarter, 64), (half, 32), (half, 256), (torch.float32, 128), (torch.float64, 64)):
        for mask, causal in (("none", True), ("bool", False)):
            yield compilation(REFERENCE, dtype, depth, mask, causal=causal)
            yield compilation(SplitSchedule(16, 4, 1), dtype, depth, mask, causal=causal)
            yield from backward_compilations(REFERENCE_BACKWARD, dtype, depth, mask, causal=causal)
    for mask, causal in (("none", True), ("bool", False)):
        for schedule in (*tiles, TileSchedule(128, 8, 2, True), TileSchedule(128, 8, 2)):
            yield compilation(schedule, half, 128, mask, causal=causal, dropout=True)
        yield from backward_compilations(PLAIN_BACKWARD, half, 128, mask, causal=causal, dropout=True)
    yield compilation(TileSchedule(32, 8, 1), half, 256, causal=True, dropout=True)
    yield from backward_compilations(DEEP_BACKWARD, half, 256, causal=True, dropout=True)
    yield compilation(REFERENCE, torch.float64, 64, "additive", dropout=True)
    yield from backward_compilations(REFERENCE_BACKWARD, torch.float64, 64, "additive", dropout=True)
    yield compilation(TileSchedule(32, 8, 1), half, 256, causal=True)
    yield compilation(SplitSchedule(32, 8, 2), half, 256, causal=True)
    yield from backward_compilations(DEEP_BACKWARD, half, 256, causal=True)


def _tuned_splits() -> list[SplitSchedule]:
    """What the tables prefer on any architecture, and the same with all splits in one program."""
    found = [s for path in sorted(TABLES.glob("*.json")) for s in read_table(path).splits.values()]
    return list(dict.fromkeys(replace(s, span=n, v_programs=v) for s in found for n, v in ((1, 1), (1, 2), (0, 1))))


def _tuned_backward() -> list[tuple[int, BackwardSchedule]]:
    """What the tables prefer, with the depth of heads that it is for."""
    return list(dict.fromkeys(e for path in sorted(TABLES.glob("*.json")) for e in read_table(path).backward.items()))
