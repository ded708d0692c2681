"""What does batch invariance cost a whole language model on a GPU?

    python examples/benchmarks/bench_model_gpu.py [--layers 16] [--caches DIRECTORY] [--no-write]

A Llama of 1.2 billion random bf16 weights.  Prints, and writes to ``results/<device>/model.json``, against stock
Inductor with the same settings: the time of a prefill, of a decode step with a static cache under CUDA graphs, and of
the first call with empty caches; and whether the first sequence's logits have the same bits in all of them.

Every case of either compiler is a process of its own.  They compile at the same time, and then take turns on the GPU.
``--caches`` keeps their caches: a second run with the same directory starts sooner, and repeats the first calls' times
from the run that filled it.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a bare checkout

import bicompile  # noqa: E402
from bicompile.bench import Report, Row, gpu_interleaved

VOCABULARY = 32_000
CONTEXT, ROOM = 1024, 192
"""Tokens of each sequence, and free places behind them in a static cache."""
TURNS, TURN_MS = 5, 60.0
AGREE = 0.1
"""Logits of two bf16 models that agree differ by less than this, relative to their norm."""
BACKENDS = ("batch_invariant", "inductor")


@dataclass(frozen=True)
class Case:
    """One thing to time: sequences, tokens of each, and how."""

    name: str
    batch: int
    length: int
    decodes: bool = False
    dynamic: bool = False


CASES = (
    Case("prefill 8x1024", 8, 1024),
    Case("prefill 1x2048", 1, 2048),
    Case("decode B=1, CUDA graphs", 1, 1, decodes=True),
    Case("decode B=16, CUDA graphs", 16, 1, decodes=True),
    Case("decode B=64, CUDA graphs", 64, 1, decodes=True),
)
DYNAMIC = Case("prefill 3x1024, dynamic shapes", 3, 1024, dynamic=True)
FIRST_CALL = "prefill 1x2048"


def main() -> None:
    """Measure, print and write; or, as a worker, serve one case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--caches", type=Path, help="directory for compilers' caches (default: a temporary one)")
    parser.add_argument("--no-write", action="store_true")
    parser.add_argument("--worker", nargs=2, metavar=("BACKEND", "CASE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        backend, name = args.worker
        serve(next(case for case in (*CASES, DYNAMIC) if case.name == name), backend, args.layers)
        return
    report = Report("model", device="cuda")
    with tempfile.TemporaryDirectory() as temporary:
        caches = args.caches or Path(temporary)
        cold = not caches.exists() or not any(caches.iterdir())
        for row in measure(report, args.layers, caches, cold):
            report.rows.append(row)
            print(
                f"{row.case:42s} {row.against:16s} {row.ratio:7.3f} same bits {row.same_bits} {row.extra}", flush=True
            )
            if not args.no_write:
                report.write()
    for name, entry in report.summary.items():
        print(f"{name:60s} {entry['value']}  (bar {entry['bar']})")
    if not args.no_write:
        print(report.write())


def measure(report: Report, layers: int, caches: Path, cold: bool) -> Iterator[Row]:
    """Start all workers, then go through the cases one by one."""
    wanted = [(backend, case) for case in CASES for backend in BACKENDS] + [("batch_invariant", DYNAMIC)]
    with contextlib.ExitStack() as stack:
        workers = {key: stack.enter_context(Worker(*key, layers, caches)) for key in wanted}
        first = {key: worker.answer() for key, worker in workers.items()}
        for backend, case in wanted:
            print(f"first call of {case.name}, {backend}: {first[backend, case]:.1f} s", flush=True)
        record = caches / "first-calls.json"
        if cold:
            seconds = [first[backend, case] for backend in BACKENDS for case in CASES if case.name == FIRST_CALL]
            record.write_text(json.dumps(seconds))
        if record.exists():
            ours, theirs = json.loads(record.read_text())
            extra = {"ours_s": ours, "theirs_s": theirs, "processes": len(workers)}
            yield Row(f"first call, {FIRST_CALL}", "inductor", theirs / ours, extra=extra)
            report.summarise("first call: inductor's time / ours (at least 1/2)", theirs / ours, 0.5)
        for case in CASES:
            yield timed(report, case, *(workers[backend, case] for backend in BACKENDS))
        yield from compared(report, {case: workers["batch_invariant", case] for case in (*CASES, DYNAMIC)})


class Worker:
    """A process that has compiled one case with one compiler, and answers questions about it."""

    def __init__(self, backend: str, case: Case, layers: int, caches: Path) -> None:
        # The first calls that are compared share no cache with anybody.
        own = caches / (f"{backend}-first" if case.name == FIRST_CALL else backend)
        names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "BICOMPILE_CACHE_DIR")
        environment = {**os.environ, **{name: str(own / name.lower()) for name in names}}
        command = [sys.executable, __file__, "--layers", str(layers), "--worker", backend, case.name]
        self.name = f"{case.name}, {backend}"
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )

    def answer(self) -> Any:
        """The next answer."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("ANSWER "):
                return json.loads(line.removeprefix("ANSWER "))
        self.errors.seek(0)
        raise RuntimeError(f"{self.name}: the worker ended\n{self.errors.read()[-4000:]}")

    def ask(self, question: str) -> Any:
        """Ask, and wait for the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(question + "\n")
        self.process.stdin.flush()
        return self.answer()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.errors.close()


def timed(report: Report, case: Case, ours: Worker, theirs: Worker) -> Row:
    """Both compilers' times, in turns, on a GPU that nobody else uses meanwhile."""
    mine, other = (torch.tensor(worker.ask("sample")) for worker in (ours, theirs))
    difference = ((mine - other).norm() / other.norm()).item()
    assert difference < AGREE, f"{case.name}: logits differ from Inductor's by {difference:.1%}"
    taken: dict[Worker, list[float]] = {ours: [], theirs: []}
    for turn in range(TURNS):
        for worker in (ours, theirs) if turn % 2 else (theirs, ours):
            taken[worker] += worker.ask("time")
    ours_us, theirs_us = (statistics.median(taken[worker]) for worker in (ours, theirs))
    report.summarise(f"{case.name} / Inductor", theirs_us / ours_us, 0.95)
    extra = {"ours_us": ours_us, "theirs_us": theirs_us, "difference": difference}
    return Row(case.name, "inductor", theirs_us / ours_us, None, extra)


def compared(report: Report, workers: dict[Case, Worker]) -> Iterator[Row]:
    """The bits of the first sequence's logits: each prefill's, and each decoder's from its first token to its last."""
    bits = {case: worker.ask("bits") for case, worker in workers.items()}
    prefix, last = bits[CASES[0]]["prefix"], bits[CASES[0]]["last"]
    same = {}
    for case, found in bits.items():
        same[case] = found["last"] == last and found.get("prefix", prefix) == prefix and found.get("permuted", True)
        yield Row(f"logits of {case.name}", "prefill 8x1024", float(same[case]), same[case])
    report.summarise(
        "bits: alone = in batch = permuted, prefill = decode, static = dynamic", float(all(same.values())), 1.0
    )


# -- In a worker ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def serve(case: Case, backend: str, layers: int) -> None:
    """Compile, say how many seconds the first call took, and answer questions until the parent goes away."""
    llama = model(layers)
    mode = "reduce-overhead" if case.decodes else None
    compiled = torch.compile(llama, backend=backend, dynamic=case.dynamic, mode=mode)
    subject: Prefill | Decoding = Decoding(llama, compiled, case) if case.decodes else Prefill(compiled, case)
    torch.cuda.synchronize()
    start = time.perf_counter()
    subject.run()
    torch.cuda.synchronize()
    answer(time.perf_counter() - start)
    questions: dict[str, Callable[[], Any]] = {
        "time": lambda: [s * 1e6 for s in gpu_interleaved({"run": subject.run}, ms=TURN_MS)["run"].seconds],
        "sample": lambda: subject.run()[0, -1].float().tolist(),
        "bits": subject.bits,
    }
    for line in sys.stdin:
        answer(questions[line.strip()]())


def answer(what: Any) -> None:
    """Tell the parent, in a line that no library's own output looks like."""
    print(f"ANSWER {json.dumps(what)}", flush=True)


def model(layers: int) -> LlamaForCausalLM:
    """The model, with the same random weights each time."""
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        return LlamaForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)


def tokens(batch: int, length: int) -> Tensor:
    """Random tokens [batch, length]: the same for a row and a place in every batch and at every length."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(VOCABULARY, (2048,), generator=generator)[:length] for _ in range(batch)]
    return torch.stack(rows).cuda()


class Prefill:
    """Logits of all tokens at once."""

    def __init__(self, forward: Any, case: Case) -> None:
        self.forward, self.ids = forward, tokens(case.batch, case.length)

    def run(self) -> Tensor:
        """The logits [batch, length, vocabulary]."""
        return self.forward(input_ids=self.ids, use_cache=False).logits

    def bits(self) -> dict[str, Any]:
        """Of the first row: its first ``CONTEXT`` tokens, the last of them; and whether a permutation is seen."""
        whole = self.run()
        flipped = self.forward(input_ids=self.ids.flip(0), use_cache=False).logits.flip(0)
        same = torch.equal(whole.view(torch.int16), flipped.view(torch.int16))
        return {"prefix": digest(whole[0, :CONTEXT]), "last": digest(whole[0, CONTEXT - 1]), "permuted": same}


class Decoding:
    """Sequences of ``CONTEXT`` tokens, the last of which is decoded from a static cache that holds the others."""

    def __init__(self, llama: LlamaForCausalLM, forward: Any, case: Case) -> None:
        config, self.forward, self.ids = llama.config, forward, tokens(case.batch, CONTEXT)
        self.cache = StaticCache(config=config, max_cache_len=CONTEXT + ROOM)
        # Its tensors are inputs of the compiled code, and must stay where they are.
        device = torch.device("cuda")
        self.cache.early_initialization(case.batch, config.num_key_value_heads, config.head_dim, torch.bfloat16, device)
        self.lengths = [layer.cumulative_length for layer in self.cache.layers]
        self.place = torch.zeros_like(self.lengths[0])
        self.token, self.position = (
            self.ids[:, :1].clone(),
            torch.zeros(case.batch, 1, dtype=torch.int64, device=device),
        )

    def step(self, place: int) -> Tensor:
        """The logits [batch, 1, vocabulary] of the token at ``place``, whose predecessors are in the cache."""
        torch._foreach_copy_(self.lengths, [self.place.fill_(place)] * len(self.lengths))
        self.token.copy_(self.ids[:, place : place + 1])
        self.position.fill_(place)
        torch.compiler.cudagraph_mark_step_begin()
        return self.forward(
            input_ids=self.token, past_key_values=self.cache, use_cache=True, position_ids=self.position
        ).logits

    def run(self) -> Tensor:
        """The last step."""
        return self.step(CONTEXT - 1)

    def bits(self) -> dict[str, Any]:
        """Of the first row's last token, after all before it were decoded one by one."""
        for place in range(CONTEXT):
            logits = self.step(place)
        return {"last": digest(logits[0, 0])}


def digest(x: Tensor) -> str:
    """A hash of the bits."""
    return hashlib.sha256(x.contiguous().view(torch.int16).cpu().numpy().tobytes()).hexdigest()


assert bicompile  # registers the backend's name where the package is not installed

if __name__ == "__main__":
    main()
