"""Turn a schedule and a problem into something to call; no choices."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bicompile.lowering.gpu.launch import INTERPRETED, Describe, Launch

from . import cublaslt
from .gpu_kernels import stream_kernel, tile_kernel
from .problem import ALIGNED, Problem
from .schedule import StreamSchedule, TileSchedule

Runner = Callable[[Tensor, Tensor, Tensor | None, Tensor], None]
"""Writes ``a @ b``, or ``a @ b + c``, into its last argument.  ``c`` has the result's shape, by expansion."""


def tile_runner(schedule: TileSchedule, problem: Problem, device: int) -> Runner:
    """Run by :func:`tile_kernel`: any strides, any sizes."""
    s, p = schedule, problem
    tiles = p.batch * triton.cdiv(p.m, s.block_m) * triton.cdiv(p.n, s.block_n)
    constants: tuple[Any, ...] = (
        *(s.block_m, s.block_n, s.block_k, s.group, s.swap),
        p.k % s.block_k == 0,
        p.wide,
        p.add,
        "tf32" if p.tf32 else "ieee",
        tl.float64 if p.dtype == torch.float64 else tl.float32,
    )
    strides = (p.a.row, p.a.column, p.b.row, p.b.column)

    def launch_for(c_strides: tuple[int, ...]) -> Launch:
        step_c, *rest = c_strides
        integers = (p.m, p.n, p.k, *strides, *rest, p.a.step, p.b.step, step_c)
        return Launch(tile_kernel, (tiles,), integers, constants, s.warps, s.stages)

    if not p.add:
        plain = launch_for((0, 0, 0))
        return lambda a, b, c, out: plain(device, a, b, out, out)

    launches = functools.cache(lambda strides, aligned: launch_for(strides))

    def run(a: Tensor, b: Tensor, c: Tensor | None, out: Tensor) -> None:
        assert c is not None
        strides = c.stride() if c.dim() == 3 else (0, *c.stride())
        launches(strides, c.data_ptr() % ALIGNED == 0)(device, a, b, c, out)

    return run


def stream_runner(schedule: StreamSchedule, problem: Problem, device: int) -> Runner:
    """Run by :func:`stream_kernel`; the problem must be one that :func:`can_stream`."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    s, p = schedule, problem
    tiles = triton.cdiv(p.m, s.block_m) * triton.cdiv(p.n, s.block_n)
    programs = s.programs * num_sms(device)
    constants = (
        *(programs, s.block_m, s.block_n, s.block_k, s.group, s.swap),
        *(p.a_by_k, p.b_by_k, s.parts, s.flatten, p.add),
    )
    a_shape, a_block = ([p.m, p.k], [s.block_m, s.block_k]) if p.a_by_k else ([p.k, p.m], [s.block_k, s.block_m])
    b_shape, b_block = ([p.n, p.k], [s.block_n, s.block_k]) if p.b_by_k else ([p.k, p.n], [s.block_k, s.block_n])
    a_strides, b_strides, out_strides = [p.a_step, 1], [p.b_step, 1], [p.n, 1]
    out_block = [s.block_m, s.block_n // s.parts]

    def described(shape: list[int], strides: list[int], block: list[int]) -> Describe:
        return lambda base: TensorDescriptor(base, shape, strides, block)

    maps = {
        0: described(a_shape, a_strides, a_block),
        1: described(b_shape, b_strides, b_block),
        3: described([p.m, p.n], out_strides, out_block),
    }

    @functools.cache
    def launch_for(c_strides: tuple[int, ...], aligned: bool) -> Launch:
        integers = (p.m, p.n, p.k, *c_strides)
        return Launch(stream_kernel, (min(programs, tiles),), integers, constants, s.warps, s.stages, maps)

    def run(a: Tensor, b: Tensor, c: Tensor | None, out: Tensor) -> None:
        addend = out if c is None else c
        launch = launch_for((0, 0) if c is None else addend.stride(), addend.data_ptr() % ALIGNED == 0)
        launch(device, a, b, addend, out)

    return run


def can_ask_library(problem: Problem) -> bool:
    """Whether cuBLASLt can be asked for this problem."""
    p = problem
    return min(p.batch, p.m, p.n, p.k) > 0 and p.is_dense and p.dtype.itemsize > 1 and p.out == p.dtype


def library_product(problem: Problem) -> cublaslt.Product:
    """The problem in cuBLASLt's terms."""
    p = problem
    size = p.dtype.itemsize
    return cublaslt.Product(
        dtype=p.dtype,
        m=p.m,
        n=p.n,
        k=p.k,
        left_transposed=not p.a_by_k,
        right_transposed=p.b_by_k,
        left_step=p.a_step,
        right_step=p.b_step,
        out_step=p.n,
        batch=p.batch,
        left_batch=p.a.step,
        right_batch=p.b.step,
        out_batch=p.m * p.n,
        tf32=p.tf32,
        factor_alignment=ALIGNED if p.is_aligned else size,
        out_alignment=ALIGNED if p.n * size % ALIGNED == 0 else size,
    )


def library_runner(algorithm: cublaslt.Algorithm, problem: Problem, device: int) -> Runner:
    """Run by an algorithm of cuBLASLt; the addend is added after it, which rounds as our kernels do."""

    def run(a: Tensor, b: Tensor, c: Tensor | None, out: Tensor) -> None:
        stream = torch._C._cuda_getCurrentRawStream(device)
        algorithm(a.data_ptr(), b.data_ptr(), out.data_ptr(), stream)
        if c is not None:
            out.add_(c)

    return run


@functools.cache
def num_sms(device: int) -> int:
    """Streaming multiprocessors of a CUDA device."""
    return 4 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count
