"""Compile kernels ahead of time, for GPUs that are not here: do they fit, and do they spill?

Each op family names its compilations in ``aot_cases()`` of its module ``aot`` (or of ``gpu``).
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

FAMILIES = ("matmul", "reduction", "softmax", "norm", "scan", "scatter", "attention", "elementwise")

SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
"""Bytes of shared memory that one program may use, by compute capability (CUDA programming guide, table of
technical specifications per compute capability)."""


@dataclass(frozen=True)
class Compilation:
    """One kernel with one set of constants.

    Attributes:
        name: for messages, such as ``matmul bf16 128x128x64``.
        kernel: a function under ``triton.jit``.
        signature: each argument's Triton type, by name: ``*bf16``, ``i32``, ``i64``, ``fp32``; ``*bf16:16`` and
            ``i32:16`` for what is divisible by 16; ``tensordesc<bf16[128,64]>``.  Those in ``constants`` may be left
            out.
        constants: the ``constexpr`` arguments.
        warps, stages: Triton's ``num_warps`` and ``num_stages``.
        options: further options of the compiler, such as ``maxnreg``.
        needs: the oldest compute capability that this is for, such as 90 for what uses TMA.
        up_to: the newest one, for instructions that a later one dropped.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    warps: int
    stages: int
    options: dict[str, Any] = field(default_factory=dict)
    needs: int = 80
    up_to: int = 1000


@dataclass(frozen=True)
class Compiled:
    """What became of a compilation.

    Attributes:
        shared: bytes of shared memory.
        registers: of one thread.
        stack: bytes of local memory of one thread; what does not fit into registers is spilled there.
        error: what the compiler said where it failed, and then nothing above holds.
    """

    shared: int = 0
    registers: int = 0
    stack: int = 0
    error: str = ""


def compile_for(compilation: Compilation, capability: int) -> Compiled:
    """Compile for a GPU of ``capability`` (such as 90), which need not be here."""
    import triton
    from triton.backends.compiler import GPUTarget

    options = {
        "num_warps": compilation.warps,
        "num_stages": compilation.stages,
        "enable_fp_fusion": False,
        **compilation.options,
    }
    try:
        source = _source_class(compilation.kernel)(compilation.kernel, *arguments_of(compilation))
        binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    except Exception as error:  # the compiler's own classes are many and private
        return Compiled(error=f"{type(error).__name__}: {str(error).strip()[:500]}")
    registers, stack = _resources(binary.asm["cubin"])
    return Compiled(binary.metadata.shared, registers, stack)


def _source_class(kernel: Any) -> Any:
    """How the compiler takes a kernel: Triton's or Gluon's."""
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        return GluonASTSource
    from triton.compiler import ASTSource

    return ASTSource


def arguments_of(compilation: Compilation) -> tuple[dict[str, str], dict[Any, Any], dict[Any, Any]]:
    """Types by name in the kernel's order, constants by name, and attributes by position."""
    types: dict[str, str] = {}
    attributes: dict[Any, Any] = {}
    for position, name in enumerate(compilation.kernel.arg_names):
        if name in compilation.constants:
            types[name] = "constexpr"
            continue
        given, _, divisor = compilation.signature[name].partition(":")
        types[name] = given
        if divisor:
            attributes[(position,)] = [["tt.divisibility", int(divisor)]]
    return types, dict(compilation.constants), attributes


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of each thread, as the binary itself says."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"REG:(\d+) STACK:(\d+)", text)
    assert found, f"cuobjdump -res-usage said {text!r}"
    return max(int(registers) for registers, _ in found), max(int(stack) for _, stack in found)


def all_cases() -> Iterator[Compilation]:
    """The compilations of every family."""
    for family in FAMILIES:
        for name in ("aot", "gpu"):
            module = f"bicompile.lowering.{family}.{name}"
            if importlib.util.find_spec(module) is None:
                continue
            cases: Callable[[], Iterable[Compilation]] | None
            if (cases := getattr(importlib.import_module(module), "aot_cases", None)) is not None:
                yield from cases()
                break
