"""How long do the first calls of a language model take on the CPU?

SmolLM2-135M, whose layers share their compiled graphs; or with ``quick`` a small Llama with random weights, compiled
whole.  Each compiler is a process of its own with empty caches; they take turns.  Our C++ kernels, which are compiled
once a machine, are there before.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch._inductor.utils import fresh_cache

from bicompile.lowering import loading

from ..results import Report, Row
from ..suite import Suite
from .llama import model, tokens
from .smollm import COMPILERS, compiled, decode, one_function_for_all_layers, prefill

PAIRS = 2


@dataclass(frozen=True)
class Case:
    """The model: SmolLM2, or a random one of so many layers."""

    layers: int | None

    def __str__(self) -> str:
        return "first calls, 4 shapes" if self.layers is None else f"first call, {self.layers} random layers"


class Measured(Suite):
    """First calls against Inductor's."""

    name = "compile"
    case_seconds = 0.0  # a first call is made once

    def cases(self) -> Sequence[Case]:
        """One case."""
        layers = self.settings.layers
        return [Case(1 if layers is None else layers) if self.settings.quick else Case(None)]

    def measure(self, case: Case) -> list[Row]:
        """Taking turns, in new processes: whoever compiles second in a process finds much of the work done."""
        taken: dict[str, list[float]] = {name: [] for name in COMPILERS}
        for compiler in COMPILERS * (1 if self.settings.quick else PAIRS):
            command = [sys.executable, "-m", __name__, compiler, str(case.layers), str(torch.get_num_threads())]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            taken[compiler].append(float(done.stdout.split()[-1]))
        ours, theirs = (statistics.median(taken[name]) for name in COMPILERS)
        return [Row(str(case), "inductor", theirs / ours, extra={"ours_s": ours, "theirs_s": theirs})]

    def summarise(self, report: Report) -> None:
        """The ratio."""
        for row in report.rows:
            report.summarise(f"{row.case}: inductor's / ours (at least 1/1.5)", row.ratio, 0.667)


@torch.no_grad()
def first_call(compiler: str, layers: int) -> float:
    """Seconds of the first call of a random model compiled whole."""
    compiled_model = torch.compile(model(layers, "cpu", torch.float32, width=256), backend=compiler)
    start = time.perf_counter()
    compiled_model(input_ids=tokens(2, 16, "cpu"), use_cache=False)
    return time.perf_counter() - start


def first_calls(compiler: str) -> float:
    """Seconds of the first calls of one row and of two, of one token and of many."""
    with one_function_for_all_layers():
        smollm = compiled(torch.float32, compiler, quick=False)
        start = time.perf_counter()
        for batch in (2, 1):
            for make in (decode, prefill):
                make(smollm, batch)()
        return time.perf_counter() - start


def worker(compiler: str, layers: str, threads: str) -> float:
    """Seconds that ``compiler`` takes with empty caches."""
    torch.set_num_threads(int(threads))
    loading.load(*loading.KERNELS)  # the kernels are compiled once a machine
    torch.compile(lambda x: x + 1)(torch.ones(2))  # imports and the precompiled header are nobody's cost
    with fresh_cache():
        return first_calls(compiler) if layers == "None" else first_call(compiler, int(layers))


if __name__ == "__main__":
    print(worker(*sys.argv[1:]))
