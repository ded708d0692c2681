"""The CPU kernels give the same bits under other instruction sets than this machine's own."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bicompile.lowering import native
from bicompile.testing import same_bits

ROOT = Path(__file__).resolve().parent.parent
# Without AVX-512 the native code is AVX2 already.
OTHERS = ("avx2", "scalar") if torch.backends.cpu.get_cpu_capability() == "AVX512" else ("scalar",)
# The modules that say what to compute: ``results_on_any_processor`` of each.  Elementwise functions have a test of
# their own, without a library around them.
FAMILIES = ("attention", "matmul", "norm", "reduction", "scan", "scatter", "softmax")

_PROGRAM = "import sys, test_instruction_sets as t; t.torch.save(t.results(), sys.argv[1])"


def results() -> dict[str, list[Tensor]]:
    """What each family's kernels compute in this process."""
    native.load(*(name for name in native.libraries() if name.split("_")[0] in FAMILIES))  # compiles several at once
    return {
        family: tree_leaves(importlib.import_module(f"test_{family}").results_on_any_processor()) for family in FAMILIES
    }


def test_instruction_sets_give_the_same_bits(tmp_path: Path):
    """One process for each other instruction set: most of its time would go into imports."""
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    running = {}
    for isa in OTHERS:
        command = [sys.executable, "-c", _PROGRAM, str(tmp_path / isa)]
        env = os.environ | {"BICOMPILE_ISA": isa, "PYTHONPATH": path}
        running[isa] = subprocess.Popen(command, env=env, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    ours = results()
    for isa, process in running.items():
        _, errors = process.communicate()
        assert process.returncode == 0, errors
        theirs = torch.load(tmp_path / isa)
        assert theirs.keys() == ours.keys()
        differing = [family for family in FAMILIES if not same_bits(theirs[family], ours[family])]
        assert not differing, isa
