"""What does batch invariance cost a training step of a language model on a GPU?

    python examples/benchmarks/bench_training_gpu.py [--layers 16] [--batch 4] [--length 1024] [--no-write]

A Llama of 1.2 billion random bf16 weights: forward, cross entropy and backward; the optimizer, the same for both, is
left out.  Compiled with this backend and with stock Inductor, the steps take turns on the GPU.  Prints, and writes to
``results/<device>/training.json``, the ratio of their times and of their peak memory; and whether the gradient that
flows into a sequence has the same bits wherever it stands in the batch, and all weights' gradients the same bits in a
second step.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a bare checkout

from bench_model_gpu import model, tokens  # noqa: E402

from bicompile.bench import Report, Row, gpu_interleaved  # noqa: E402
from bicompile.testing import same_bits  # noqa: E402

TIME_BAR, MEMORY_BAR = 0.85, 1 / 1.1
AGREE = 0.1
"""Gradients of two bf16 models that agree differ by less than this, relative to their norm."""
MS = 6000.0


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
        torch.cuda.synchronize()
        return time.perf_counter() - start

    def peak(self) -> float:
        """GiB of the GPU's memory in use at a step's highest point, weights and gradients included."""
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


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--no-write", action="store_true")
    args = parser.parse_args()
    llama, ids = model(args.layers).requires_grad_(True), tokens(args.batch, args.length)
    ours, theirs = (Training(llama, backend, ids) for backend in ("batch_invariant", "inductor"))
    report, case = Report("training", device="cuda"), f"training step {args.batch}x{args.length}"

    firsts = {"ours_s": ours.first(), "theirs_s": theirs.first()}
    report.rows.append(Row("first step", "inductor", firsts["theirs_s"] / firsts["ours_s"], extra=firsts))
    found, again, other = ours.gradients(), ours.gradients(), theirs.gradients()
    difference = max(float((a - b).norm() / b.norm()) for a, b in zip(found, other, strict=True))
    assert difference < AGREE, f"gradients differ from Inductor's by {difference:.1%}"
    repeats = same_bits(found, again)
    del found, again, other
    embeddings = llama.get_input_embeddings()(ids).detach()
    moves = not same_bits(
        input_gradient(ours.forward, embeddings), input_gradient(ours.forward, embeddings.flip(0)).flip(0)
    )
    same = repeats and not moves

    timings = gpu_interleaved({"ours": ours.step, "theirs": theirs.step}, ms=MS)
    ours_ms, theirs_ms = (timings[name].median_us / 1e3 for name in ("ours", "theirs"))
    extra = {"ours_ms": ours_ms, "theirs_ms": theirs_ms, "difference": difference}
    report.rows.append(Row(case, "inductor", theirs_ms / ours_ms, same, extra))
    memory = {"ours_gib": ours.peak(), "theirs_gib": theirs.peak()}
    report.rows.append(Row(f"peak memory, {case}", "inductor", memory["theirs_gib"] / memory["ours_gib"], extra=memory))

    report.summarise(f"{case} / Inductor", theirs_ms / ours_ms, TIME_BAR)
    saved = memory["theirs_gib"] / memory["ours_gib"]
    report.summarise("peak memory: Inductor's / ours (at least 1/1.1)", saved, MEMORY_BAR)
    report.summarise("bits: gradients repeat, and a sequence's does not see its place", float(same), 1.0)
    for row in report.rows:
        print(f"{row.case:42s} {row.against:16s} {row.ratio:7.3f} same bits {row.same_bits} {row.extra}")
    for name, entry in report.summary.items():
        print(f"{name:60s} {entry['value']}  (bar {entry['bar']})")
    if not args.no_write:
        print(report.write())


if __name__ == "__main__":
    main()
