"""The scatter kernels as they are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator

import triton.language as tl

from bicompile.lowering.gpu.ahead import Compilation

from . import gpu, gpu_kernels
from .schedule import REFERENCE, REFERENCE_ELEMENTS, element_schedule_for, row_schedule_for

_TYPES = {"fp32": tl.float32, "bf16": tl.float32, "fp16": tl.float32, "fp64": tl.float64}
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}


def aot_cases() -> Iterator[Compilation]:
    """Every schedule of every kernel, in every dtype."""
    for keys in ("i32", "i64"):
        signature = {"index_ptr": "*i64:16", "keys_ptr": f"*{keys}:16"}
        signature |= {name: "i64" for name in ("n", "columns", "count", "step")}
        constants = {"WRAP": True, "BLOCK": gpu._FLAT}
        yield Compilation(f"scatter keys {keys}", gpu_kernels.keys_kernel, signature, constants, 4, 1, {"debug": True})
    for dtype, acc in _TYPES.items():
        yield _canonical(dtype)
        for how, mean in (("add", False), ("add", True), ("multiply", False), ("larger", False), ("smaller", False)):
            yield from _rows(dtype, acc, how, mean)
            yield from _elements(dtype, acc, how)


def _canonical(dtype: str) -> Compilation:
    signature = {"x_ptr": f"*{dtype}:16", "out_ptr": f"*{dtype}:16", "n": "i64"}
    return Compilation(f"scatter copy {dtype}", gpu_kernels.canonical_kernel, signature, {"BLOCK": gpu._FLAT}, 4, 1)


def _rows(dtype: str, acc: tl.dtype, how: str, mean: bool) -> Iterator[Compilation]:
    signature = {"keys_ptr": "*i32:16", "positions_ptr": "*i64:16"}
    signature |= {name: f"*{dtype}:16" for name in ("self_ptr", "values_ptr", "out_ptr")}
    signature |= {name: "i64" for name in "n blocks programs skipped".split()}
    signature |= {name: "i64:16" for name in "width values_outer values_row out_outer".split()}
    schedules = {row_schedule_for(width, _BYTES[dtype]) for width in (1, 64, 4096)} | {REFERENCE}
    for schedule in schedules:
        what = {"HOW": how, "START": 0.0, "FROM_SELF": True, "MEAN": mean, "ACC": acc, "LONG": schedule.long}
        constants = {**what, "BLOCK": schedule.block, "AHEAD": schedule.ahead}
        name = f"scatter rows {dtype} {how} mean={mean} {schedule}"
        yield Compilation(name, gpu_kernels.walk_rows_kernel, signature, constants, schedule.warps, 1)
        if schedule.long:
            constants = {**what, "BLOCK": schedule.long_block, "AHEAD": schedule.long_ahead}
            yield Compilation(f"long {name}", gpu_kernels.walk_long_rows_kernel, signature, constants, 1, 1)


def _elements(dtype: str, acc: tl.dtype, how: str) -> Iterator[Compilation]:
    total = "fp64" if acc == tl.float64 else "fp32"
    signature = {"keys_ptr": "*i32:16", "values_ptr": f"*{dtype}:16", "total_ptr": f"*{total}:16"}
    for schedule in {element_schedule_for(4, 10_000, 132), element_schedule_for(10_000, 4, 132), REFERENCE_ELEMENTS}:
        constants = {"HOW": how, "BLOCK": schedule.block, "AHEAD": schedule.ahead}
        name = f"scatter elements {dtype} {how} {schedule}"
        if schedule.walk == "columns":
            types = {**signature, "length": "i64", "columns": "i64"}
            yield Compilation(name, gpu_kernels.walk_columns_kernel, types, constants, schedule.block // 32, 1)
        else:
            types = {**signature, "positions_ptr": "*i64:16", "n": "i64"}
            yield Compilation(name, gpu_kernels.walk_sorted_kernel, types, constants, 4, 1)
