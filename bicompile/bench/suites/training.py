"""What does batch invariance cost a training step of a language model?

A Llama with random weights, 1.2 billion in bf16 on a GPU, a small one in fp32 on a CPU: forward, cross entropy and
backward; the optimizer, the same for both, is left out.  Compiled with this backend and with stock Inductor, the steps
take turns.  Also, on a GPU, the ratio of their peak memory; and whether the gradient that flows into a sequence has the
same bits wherever it stands in the batch, and all weights' gradients the same bits in a second step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch._inductor.utils import fresh_cache
from transformers import LlamaForCausalLM

import bicompile
from bicompile.testing import same_bits

from ..results import Report, Row
from ..suite import Suite
from .llama import model, tokens

TIME_BARS, MEMORY_BAR = {"cpu": 1.0, "cuda": 0.85}, 1 / 1.1
AGREE = {torch.bfloat16: 0.1, torch.float32: 1e-3}
"""Gradients of two models that agree differ by less than this, relative to their norm."""
FIRST, MEMORY = "first step", "peak memory, "


@dataclass(frozen=True)
class Case:
    """A step of a model of ``layers`` layers, ``width`` wide, on ``batch`` sequences of ``length`` tokens."""

    layers: int
    width: int
    batch: int
    length: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"training step {self.batch}x{self.length}"


class Training:
    """Steps of one model under one compiler."""

    def __init__(self, llama: LlamaForCausalLM, backend: str, ids: Tensor) -> None:
        self.llama, self.forward, self.ids = llama, torch.compile(llama, backend=backend), ids

    def step(self) -> None:
        """Forward, loss and backward; the gradients replace those of the last step."""
        self.llama.zero_grad(set_to_none=True)
        self.forward(input_ids=self.ids, labels=self.ids, use_cache=False).loss.backward()

    def first(self) -> float:
        """Seconds that the first step takes."""
        start = time.perf_counter()
        self.step()
        if self.ids.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def peak(self) -> float:
        """GiB of a GPU's memory in use at a step's highest point, weights and gradients included."""
        self.step()
        self.llama.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self.step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 2**30

    def gradients(self) -> list[Tensor]:
        """Copies of the weights' gradients after a step."""
        self.step()
        return [weight.grad.clone() for weight in self.llama.parameters() if weight.grad is not None]


def input_gradient(forward: Callable[..., object], embeddings: Tensor) -> Tensor:
    """What flows into the embeddings [batch, length, width] from a sum over all logits' squares."""
    leaf = embeddings.clone().requires_grad_()
    logits = forward(inputs_embeds=leaf, use_cache=False).logits  # type: ignore[attr-defined]
    (gradient,) = torch.autograd.grad(logits.float().square().sum(), leaf)
    return gradient


class Measured(Suite):
    """A Llama's training step against Inductor."""

    name = "training"
    case_seconds = 6.0

    def cases(self) -> Sequence[Case]:
        """One case, smaller on a CPU and with ``quick``."""
        quick, on_gpu = self.settings.quick, self.settings.device == "cuda"
        case = Case(16, 2048, 4, 1024, torch.bfloat16) if on_gpu else Case(4, 512, 4, 128, torch.float32)
        if quick:
            case = replace(case, layers=2) if on_gpu else Case(1, 256, 2, 32, torch.float32)
        layers = self.settings.layers
        return [case if layers is None else replace(case, layers=layers)]

    def measure(self, case: Case) -> list[Row]:
        """First step, time of a step, and on a GPU the memory."""
        device = self.settings.device
        llama = model(case.layers, device, case.dtype, case.width).requires_grad_(True)
        ids = tokens(case.batch, case.length, device)
        ours, theirs = (Training(llama, backend, ids) for backend in ("batch_invariant", "inductor"))
        with fresh_cache():
            firsts = {"ours_s": ours.first(), "theirs_s": theirs.first()}
        rows = [Row(FIRST, "inductor", firsts["theirs_s"] / firsts["ours_s"], extra=firsts)]

        found, again, other = ours.gradients(), ours.gradients(), theirs.gradients()
        difference = max(float((a - b).norm() / b.norm()) for a, b in zip(found, other, strict=True))
        if not difference < AGREE[case.dtype]:
            raise AssertionError(f"{case}: gradients differ from Inductor's by {difference:.2%}")
        repeats = same_bits(found, again)
        del found, again, other
        embeddings = llama.get_input_embeddings()(ids).detach()
        moves = not same_bits(
            input_gradient(ours.forward, embeddings), input_gradient(ours.forward, embeddings.flip(0)).flip(0)
        )

        timings = self.in_turns({"ours": ours.step, "theirs": theirs.step}, rounds=200)
        ours_ms, theirs_ms = (timings[name].median_us / 1e3 for name in ("ours", "theirs"))
        extra = {"ours_ms": ours_ms, "theirs_ms": theirs_ms, "difference": difference}
        rows.append(Row(str(case), "inductor", theirs_ms / ours_ms, repeats and not moves, extra))
        if device == "cuda":
            memory = {"ours_gib": ours.peak(), "theirs_gib": theirs.peak()}
            rows.append(Row(f"{MEMORY}{case}", "inductor", memory["theirs_gib"] / memory["ours_gib"], extra=memory))
        return rows

    def summarise(self, report: Report) -> None:
        """Time, memory, and whether the bits were the same."""
        for row in report.rows:
            if row.case.startswith(MEMORY):
                report.summarise("peak memory: Inductor's / ours (at least 1/1.1)", row.ratio, MEMORY_BAR)
            elif row.case != FIRST:
                report.summarise(f"{row.case} / Inductor", row.ratio, TIME_BARS[report.device])
                same = "bits: gradients repeat, and a sequence's does not see its place"
                report.summarise(same, float(bool(row.same_bits)), 1.0)


assert bicompile  # registers the backend's name where the package is not installed
