"""Every schedule compiles for every architecture that it is meant for, within its shared memory: no GPU needed.

All of them take an hour, so a run draws a sample, another one every day: pytest prints the seed, and
``BICOMPILE_SAMPLE_SEED`` repeats it.  ``--all-schedules`` compiles all.
"""

from __future__ import annotations

import functools
import os
import random
import re
from collections import defaultdict
from unittest import mock

import pytest

pytest.importorskip("triton")

import torch
import triton
import triton.language as tl

from bicompile.lowering.attention import admitted
from bicompile.lowering.attention import gpu as attention_gpu
from bicompile.lowering.attention.aot import backward_compilations, forward_compilations, problem
from bicompile.lowering.attention.backward_kernels import key_kernel, query_kernel
from bicompile.lowering.attention.problem import Problem
from bicompile.lowering.attention.rows_kernel import rows_kernel
from bicompile.lowering.attention.schedule import REFERENCE, REFERENCE_BACKWARD, HopperSchedule, SplitSchedule
from bicompile.lowering.attention.split_kernels import merge_kernel
from bicompile.lowering.gpu.ahead import (
    SHARED_MEMORY,
    Compilation,
    _source_class,
    all_cases,
    arguments_of,
    compile_for,
)
from bicompile.lowering.gpu.device import DeviceKey
from bicompile.lowering.gpu.driver import laid_out
from bicompile.lowering.gpu.launch import Launch
from bicompile.lowering.gpu.recording import recorded
from bicompile.lowering.matmul.problem import problem_of
from bicompile.lowering.matmul.runners import stream_runner
from bicompile.lowering.matmul.schedule import StreamSchedule
from bicompile.lowering.reduction import gpu as reduction_gpu
from bicompile.lowering.scatter.aot import aot_cases as scatter_cases

CAPABILITIES = (80, 90, 100)
SAMPLE = 1
"""Compilations of each family and capability in one run."""


@triton.jit
def _copy_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """``out[i] = x[i]`` for ``i < n``."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < n), mask=i < n)


@triton.jit
def _wrong_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """Adds vectors of two lengths, which no compiler accepts."""
    tl.store(out_ptr, tl.arange(0, BLOCK) + tl.arange(0, 2 * BLOCK))


def _sample(cases: list[tuple[Compilation, int]], seed: str) -> list[tuple[Compilation, int]]:
    """A few for each family and capability; the same ones for the same seed."""
    groups: dict[tuple[str, int], list[Compilation]] = defaultdict(list)
    for case, capability in cases:
        groups[case.kernel.fn.__module__.split(".")[2], capability].append(case)
    draw = random.Random(seed)
    return [
        (case, capability)
        for (_, capability), group in sorted(groups.items(), key=lambda item: item[0])
        for case in draw.sample(group, min(SAMPLE, len(group)))
    ]


def test_schedules_compile_and_fit(request):
    cases = [
        (case, capability)
        for case in all_cases()
        for capability in CAPABILITIES
        if case.needs <= capability <= case.up_to
    ]
    if not request.config.getoption("--all-schedules"):
        cases = _sample(cases, os.environ["BICOMPILE_SAMPLE_SEED"])
    failures = []
    for case, capability in cases:
        found = compile_for(case, capability)
        if found.error:
            failures.append(f"{case.name} for sm_{capability}: {found.error}")
        elif found.shared > SHARED_MEMORY[capability]:
            failures.append(
                f"{case.name} for sm_{capability}: {found.shared} bytes of shared memory, which has "
                f"{SHARED_MEMORY[capability]}"
            )
        print(f"sm_{capability} {case.name}: {found}")
    assert not failures, "\n".join(failures)


def test_a_kernel_that_fits_and_one_that_does_not_compile_are_told_apart():
    types = {"x_ptr": "*fp32:16", "out_ptr": "*fp32", "n": "i32"}
    good = compile_for(Compilation("copy", _copy_kernel, types, {"BLOCK": 256}, 4, 1), 90)
    assert not good.error and good.registers > 0 and good.stack == 0
    wrong = compile_for(Compilation("wrong", _wrong_kernel, types, {"BLOCK": 16}, 4, 1), 90)
    assert wrong.error


def test_divisibility_reaches_the_compiler():
    types = {"x_ptr": "*fp32:16", "out_ptr": "*fp32:16", "n": "i32:16"}
    aligned = Compilation("aligned", _copy_kernel, types, {"BLOCK": 512}, 4, 1)
    loose = Compilation("loose", _copy_kernel, {name: t[:-3] for name, t in types.items()}, {"BLOCK": 512}, 4, 1)
    vector, scalar = (triton_text(case) for case in (aligned, loose))
    assert ".v4" in vector and ".v4" not in scalar


def test_columns_and_scattered_rows_are_loaded_16_bytes_at_a_time():
    """Whatever the batch: a width that the compiler is not told to be divisible by 16 costs eight loads for one."""
    x = torch.empty(65536, 1024, dtype=torch.bfloat16, device="meta")
    (columns, *_) = recorded("columns", reduction_gpu.reduce, "sum", x, [0], False, x.dtype)
    scattered = [case for case in scatter_cases() if case.name.startswith("scatter rows bf16 add mean=False")]
    (rows,) = (case for case in scattered if case.constants["BLOCK"] == 1024)
    for case in (columns, rows):
        code = triton_text(case)
        assert "ld.global.v4.b32" in code and "ld.global.b16" not in code, case.name


def triton_text(case: Compilation, stage: str = "ptx") -> str:
    """The code of a compilation for sm_90, at a stage of the compiler."""
    return binary(case).asm[stage]


def _with_tensor_maps():
    """Kernels that read and write by TMA: attention's for decoding and of sm_90, and a product's."""
    p = problem(torch.bfloat16, 64, causal=True)
    yield functools.partial(attention_gpu.run, p, SplitSchedule(16, 4, 3, tma=True))
    yield functools.partial(attention_gpu.run, p, HopperSchedule(2, True))
    x, w = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((48, 512), (384, 512)))
    product = problem_of(x, w.t(), x.dtype, tf32=False, add=False)
    schedule = StreamSchedule(64, 64, 128, warps=4, stages=3)
    yield lambda: stream_runner(schedule, product, 0)(x, w.t(), None, x.new_empty(48, 384))


@pytest.mark.parametrize("call", _with_tensor_maps())
def test_parameters_are_laid_out_as_the_code_reads_them(call):
    """What the driver says of a loaded kernel, its code says too."""
    given, library = [], mock.Mock(cuTensorMapEncodeTiled=lambda *arguments: 0)
    device = DeviceKey("", (9, 0), num_sms=132, shared_memory=0, versions="")
    arguments = Launch.arguments
    with (
        mock.patch.object(
            Launch, "arguments", lambda self, tensors: given.append(arguments(self, tensors)) or given[-1]
        ),
        mock.patch.object(attention_gpu, "device_key", lambda index: device),
        mock.patch("bicompile.lowering.matmul.runners.num_sms", lambda index: 132),
    ):
        cases = recorded("launch", call)
    with_maps = [
        (case, values) for case, values in zip(cases, given, strict=True) if "tensordesc" in str(case.signature)
    ]
    assert len(with_maps) == 1
    for case, values in with_maps:
        compiled = binary(case)
        layout = laid_out(library, compiled.src.signature, compiled.metadata, values)
        assert layout is not None and layout.sizes == _parameter_sizes(compiled.asm["ptx"])
        assert 128 in layout.sizes and len(layout.maps) == str(case.signature).count("tensordesc")


def _parameter_sizes(ptx: str) -> list[int]:
    """Bytes of each parameter of the one entry in a PTX text."""
    (declared,) = re.findall(r"\.entry \w+\((.*?)\)", ptx, flags=re.DOTALL)
    found = re.findall(r"\.param (?:\.align \d+ )?\.([bfsu])(\d+)[^,\[]*(?:\[(\d+)\])?", declared)
    return [int(bits) // 8 * int(count or 1) for _, bits, count in found]


def binary(case: Compilation):
    """A compilation for sm_90."""
    from triton.backends.compiler import GPUTarget

    source = _source_class(case.kernel)(case.kernel, *arguments_of(case))
    options = {"num_warps": case.warps, "num_stages": case.stages, **case.options}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


@pytest.mark.parametrize("dropout", [False, True])
def test_a_mask_of_bytes_does_not_regroup_the_keys_of_a_product(dropout: bool):
    """A dot operand of 16 bits has pairs of numbers (``kWidth``) together, whatever mask its numbers come from."""
    p = problem(torch.float16, 64, "bool", dropout=dropout)
    forward = [REFERENCE, *([] if dropout else [SplitSchedule(16, 4, 1, span=0)])]
    cases = [case for schedule in forward for case in forward_compilations(p, schedule)]
    cases += [
        case for case in backward_compilations(p, REFERENCE_BACKWARD) if case.kernel in (query_kernel, key_kernel)
    ]
    cases = [case for case in cases if case.kernel is not rows_kernel]
    for case in cases:
        assert set(re.findall(r"kWidth = (\d+)", triton_text(case, "ttgir"))) == {"2"}, case.name


_WAYS = {
    "tiles": functools.partial(forward_compilations, schedule=REFERENCE),
    "splits": functools.partial(forward_compilations, schedule=SplitSchedule(16, 4, 3, 1)),
    "sm_90": functools.partial(forward_compilations, schedule=HopperSchedule(2, True)),
    "backward": functools.partial(backward_compilations, schedule=REFERENCE_BACKWARD),
}
_KINDS = ["none", "bool", "loose bool", "additive", "loose additive"]


@pytest.mark.parametrize(
    ("way", "kind"), [(w, k) for w in _WAYS for k in _KINDS if not (w == "sm_90" and "additive" in k)]
)
def test_what_the_probes_admit_is_the_binary_that_is_used(way: str, kind: str):
    causal, dtype = kind == "none", torch.bfloat16

    def compiled(p: Problem) -> set[str]:
        cases = _WAYS[way](p)
        own = [case for case in cases if case.kernel is not merge_kernel]  # which differs with the number of splits
        return {f"{case.kernel.fn.__name__} {case.signature} {case.constants} {case.options}" for case in own}

    keys = 2040 if "loose" in kind else 2048
    used = compiled(problem(dtype, 64, kind.removeprefix("loose "), causal=causal, queries=1026, keys=keys))
    probes = admitted.probes_of(torch.device("cpu"), dtype, 64, 64, kind, causal, False)
    admitted_ones = set.union(*map(compiled, probes))
    assert used <= admitted_ones
    assert "loose" in kind or used == admitted_ones  # to compile others takes seconds
