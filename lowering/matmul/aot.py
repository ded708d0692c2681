"""The matrix product kernels as they are compiled ahead of time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton.language as tl

from bicompile.lowering.gpu.ahead import Compilation

from . import gpu_grouped, gpu_scaled
from .gpu_kernels import grouped_depths_kernel, grouped_rows_kernel, scaled_kernel, stream_kernel, tile_kernel
from .schedule import OTHERS, REFERENCES, TABLES, StreamSchedule, TileSchedule, fits, read_table

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
_SMS = 132


def aot_cases() -> Iterator[Compilation]:
    """Every schedule that a table names, in both half-precision dtypes; those of the others; each with the epilogue."""
    schedules = [s for path in sorted(TABLES.glob("sm_*.json")) for s in read_table(path).own_schedules()]
    for schedule, dtype in itertools.product(dict.fromkeys(schedules), (torch.bfloat16, torch.float16)):
        for b_by_k, add in itertools.product((True, False), repeat=2):
            if isinstance(schedule, TileSchedule):
                yield _tile(schedule, dtype, b_by_k, add, "ieee")
            elif fits(schedule, dtype.itemsize, add):
                yield _stream(schedule, dtype, b_by_k, add)
    for dtype, reference in REFERENCES.items():
        yield _tile(reference, dtype, True, False, "ieee")
        for _, schedule in OTHERS.get(dtype, ()):
            yield _tile(schedule, dtype, True, True, "ieee")
            if dtype == torch.float32:
                yield _tile(schedule, dtype, True, True, "tf32")
    for schedule in gpu_grouped.SCHEDULES:
        yield _grouped_rows(schedule)
        yield _grouped_depths(schedule)
    for schedule in gpu_scaled.SCHEDULES:
        yield _scaled(schedule)


def _tile(s: TileSchedule, dtype: torch.dtype, b_by_k: bool, add: bool, precision: str) -> Compilation:
    name = _NAMES[dtype]
    signature = {pointer: f"*{name}:16" for pointer in ("a_ptr", "b_ptr", "c_ptr", "out_ptr")}
    integers = "num_n num_k stride_am stride_ak stride_bk stride_bn stride_cm stride_cn step_a step_b step_c"
    signature |= {integer: "i32:16" for integer in integers.split()} | {"num_m": "i32"}
    constants: dict[str, Any] = {
        **{"stride_ak": 1, "stride_bk" if b_by_k else "stride_bn": 1},
        **{"BLOCK_M": s.block_m, "BLOCK_N": s.block_n, "BLOCK_K": s.block_k, "GROUP": s.group, "SWAP": s.swap},
        **{"EVEN": not add, "WIDE": False, "ADD": add, "PRECISION": precision},
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
    }
    title = f"matmul {name} {precision} {s} b_by_k={b_by_k} add={add}"
    return Compilation(title, tile_kernel, signature, constants, s.warps, s.stages)


def _stream(s: StreamSchedule, dtype: torch.dtype, b_by_k: bool, add: bool) -> Compilation:
    name = _NAMES[dtype]
    b_block = (s.block_n, s.block_k) if b_by_k else (s.block_k, s.block_n)
    signature = {
        "a_desc": f"tensordesc<{name}[{s.block_m},{s.block_k}]>",
        "b_desc": f"tensordesc<{name}[{b_block[0]},{b_block[1]}]>",
        "out_desc": f"tensordesc<{name}[{s.block_m},{s.block_n // s.parts}]>",
        "c_ptr": f"*{name}:16",
        **{integer: "i32:16" for integer in ("num_n", "num_k", "stride_cm")},
        "num_m": "i32",
    }
    constants: dict[str, Any] = {
        **{"stride_cn": 1, "PROGRAMS": s.programs * _SMS, "GROUP": s.group, "SWAP": s.swap, "PARTS": s.parts},
        **{"BLOCK_M": s.block_m, "BLOCK_N": s.block_n, "BLOCK_K": s.block_k, "FLATTEN": s.flatten},
        **{"A_BY_K": True, "B_BY_K": b_by_k, "ADD": add},
    }
    title = f"matmul {name} {s} b_by_k={b_by_k} add={add}"
    return Compilation(title, stream_kernel, signature, constants, s.warps, s.stages, needs=90)


def _blocks(s: TileSchedule) -> dict[str, Any]:
    return {"BLOCK_M": s.block_m, "BLOCK_N": s.block_n, "BLOCK_K": s.block_k, "SWAP": s.swap}


def _grouped_rows(s: TileSchedule) -> Compilation:
    signature = {"a_ptr": "*bf16:16", "b_ptr": "*bf16:16", "ends_ptr": "*i32:16", "out_ptr": "*bf16:16"}
    signature |= {name: "i32:16" for name in "num_n num_k num_groups stride_am stride_bn step_b stride_out".split()}
    signature |= {"num_m": "i32", "tiles_m": "i32"}
    constants: dict[str, Any] = {**{"stride_ak": 1, "stride_bk": 1, "GROUPS": 128}, **_blocks(s)}
    constants |= {"EVEN": True, "WIDE": False, "PRECISION": "ieee", "ACC": tl.float32}
    return Compilation(f"grouped rows {s}", grouped_rows_kernel, signature, constants, s.warps, s.stages)


def _grouped_depths(s: TileSchedule) -> Compilation:
    signature = {"a_ptr": "*bf16:16", "b_ptr": "*bf16:16", "ends_ptr": "*i32:16", "out_ptr": "*bf16:16"}
    signature |= {name: "i32:16" for name in "num_m num_n num_groups stride_ak stride_bk stride_out".split()}
    signature |= {"num_k": "i32"}
    constants: dict[str, Any] = {**{"stride_am": 1, "stride_bn": 1, "GROUP": s.group}, **_blocks(s)}
    constants |= {"WIDE": False, "PRECISION": "ieee", "ACC": tl.float32}
    return Compilation(f"grouped depths {s}", grouped_depths_kernel, signature, constants, s.warps, s.stages)


def _scaled(s: TileSchedule) -> Compilation:
    signature = {"a_ptr": "*fp8e4nv:16", "b_ptr": "*fp8e4nv:16", "bias_ptr": "*bf16:16", "out_ptr": "*bf16:16"}
    signature |= {"a_scale_ptr": "*fp32:16", "b_scale_ptr": "*fp32:16", "num_m": "i32"}
    signature |= {name: "i32:16" for name in "num_n num_k stride_am stride_bn".split()}
    constants = {"stride_ak": 1, "stride_bk": 1, "step_a_scale": 1, "step_b_scale": 1, "GROUP": s.group}
    constants |= {**_blocks(s), "EVEN": True, "ADD": True}
    return Compilation(f"scaled {s}", scaled_kernel, signature, constants, s.warps, s.stages, needs=89)
