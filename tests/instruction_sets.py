"""The CPU kernels under other instruction sets than this machine's own, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent

# Without AVX-512 the native code is AVX2 already.
OTHERS = ("avx2", "scalar") if torch.backends.cpu.get_cpu_capability() == "AVX512" else ("scalar",)


def start_under(isa: str, program: str, *arguments: object, **environment: object) -> subprocess.Popen[str]:
    """``python -c program arguments``, with kernels for ``isa``; it may import ``bicompile`` and what lies in tests."""
    env = os.environ | {"BICOMPILE_ISA": isa, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    env |= {name: str(value) for name, value in environment.items()}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    """What it printed; fails if it did."""
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return output.strip()


def printed(program: str) -> dict[str, str]:
    """What ``program`` prints under every instruction set, this machine's own among them."""
    return {isa: finish(start_under(isa, program)) for isa in ("native", *OTHERS)}
