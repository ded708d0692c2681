"""What does batch invariance cost a whole language model on a GPU?

    python examples/benchmarks/bench_model_gpu.py [--only first-call prefill decode bits] [--layers 16] [--no-write]

A Llama of 1.2 billion random bf16 weights.  Prints, and writes to ``results/<device>/model.json``, the time of a
prefill and of a decode step with a static cache under CUDA graphs, against stock Inductor with the same settings; the
time of the first call in a fresh process with empty caches; and whether bits stay the same in every batch.
``--only`` keeps the other parts of the file.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import bicompile
from bicompile.bench import Comparison, Report, Row, gpu_interleaved, interleaved
from bicompile.testing import same_bits

PARTS = ("first-call", "prefill", "decode", "bits")
VOCABULARY = 32_000
PREFILLS = ((8, 1024), (1, 2048))
BATCHES = (1, 16, 64)
CONTEXT, ROOM = 1024, 192
"""Tokens in the cache before a decode step, and free places behind them."""
BACKENDS = ("batch_invariant", "inductor")


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--no-write", action="store_true")
    parser.add_argument("--time-first-call", choices=BACKENDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.time_first_call:
        print(json.dumps(first_call(model(args.layers), args.time_first_call)))
        return
    report = Report("model", device="cuda")
    parts: dict[str, Callable[[Report, int], Iterator[Row]]] = {
        "first-call": first_calls,
        "prefill": prefills,
        "decode": decodes,
        "bits": bits,
    }
    # Both compilers meet the same functions: what is few graphs for each is many for Dynamo, which counts together.
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=64):
        for part in args.only:
            for row in parts[part](report, args.layers):
                report.rows.append(row)
                print(f"{row.case:42s} {row.against:24s} {row.ratio:6.3f} same bits {row.same_bits}", flush=True)
            torch._dynamo.reset()
    for name, entry in report.summary.items():
        print(f"{name:60s} {entry['value']}  (bar {entry['bar']})")
    if not args.no_write:
        keep_other_parts(report, args.only)
        print(report.write())


def model(layers: int) -> LlamaForCausalLM:
    """The model, with the same random weights each time."""
    torch.manual_seed(0)
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
    with torch.device("cuda"):
        return LlamaForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)


def tokens(batch: int, length: int) -> Tensor:
    """Random tokens [batch, length]; the first rows are the same for every batch."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(VOCABULARY, (max(BATCHES), length), generator=generator)[:batch].cuda()


def prefill(forward: Any, ids: Tensor) -> Tensor:
    """The logits of all tokens."""
    return forward(input_ids=ids, use_cache=False).logits


class Decoding:
    """Sequences of ``CONTEXT`` tokens in a static cache, filled by ``fill``, and the step that sees the next token."""

    def __init__(self, llama: LlamaForCausalLM, fill: Any, batch: int) -> None:
        config = llama.config
        self.cache = StaticCache(config=config, max_cache_len=CONTEXT + ROOM)
        # Its tensors are to be inputs of compiled code, at addresses that stay.
        heads, depth = config.num_key_value_heads, config.head_dim
        self.cache.early_initialization(batch, heads, depth, torch.bfloat16, torch.device("cuda"))
        self.ids = tokens(batch, CONTEXT + 1)
        fill(input_ids=self.ids[:, :CONTEXT], past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.last = self.ids[:, CONTEXT:].contiguous()
        self.positions = torch.full((batch, 1), CONTEXT, device="cuda")
        self.lengths = [layer.cumulative_length for layer in self.cache.layers]
        self.context = [length.clone() for length in self.lengths]

    def step(self, forward: Any) -> Tensor:
        """The logits [batch, 1, vocabulary] of the last token, which the next step writes to the same place."""
        torch._foreach_copy_(self.lengths, self.context)
        torch.compiler.cudagraph_mark_step_begin()
        out = forward(input_ids=self.last, past_key_values=self.cache, use_cache=True, position_ids=self.positions)
        return out.logits


def first_calls(report: Report, layers: int) -> Iterator[Row]:
    """The first prefill and the first decode step of a fresh process, all caches empty."""
    seconds = {}
    for backend in BACKENDS:
        with tempfile.TemporaryDirectory() as caches:
            names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "BICOMPILE_CACHE_DIR")
            env = {**os.environ, **{name: os.path.join(caches, name.lower()) for name in names}}
            command = [sys.executable, __file__, "--layers", str(layers), "--time-first-call", backend]
            done = subprocess.run(command, env=env, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")
        seconds[backend] = json.loads(done.stdout.splitlines()[-1])
    for kind in ("prefill", "decode"):
        ours, theirs = (seconds[backend][kind] for backend in BACKENDS)
        yield Row(f"first call, {kind}", "inductor", theirs / ours, extra={"ours_s": ours, "theirs_s": theirs})
    ours, theirs = (sum(seconds[backend].values()) for backend in BACKENDS)
    report.summarise("first call: inductor's time / ours (at least 1/2)", theirs / ours, 0.5)


@torch.no_grad()
def first_call(llama: LlamaForCausalLM, backend: str) -> dict[str, float]:
    """Seconds of the first prefill and of the first decode step, compiling included."""
    ids = tokens(1, 2048)
    torch.cuda.synchronize()
    times = {}
    start = time.perf_counter()
    prefill(torch.compile(llama, backend=backend, dynamic=False), ids)
    torch.cuda.synchronize()
    times["prefill"] = time.perf_counter() - start
    decoding = Decoding(llama, llama, 1)
    torch.cuda.synchronize()
    start = time.perf_counter()
    decoding.step(torch.compile(llama, backend=backend, dynamic=False, mode="reduce-overhead"))
    torch.cuda.synchronize()
    times["decode"] = time.perf_counter() - start
    return times


def prefills(report: Report, layers: int) -> Iterator[Row]:
    """Prefills of fixed size: each compiled for its size."""
    llama = model(layers)
    ours, theirs = (torch.compile(llama, backend=backend, dynamic=False) for backend in BACKENDS)
    for batch, length in PREFILLS:
        ids = tokens(batch, length)
        runs = {"ours": functools.partial(prefill, ours, ids), "theirs": functools.partial(prefill, theirs, ids)}
        error = relative_error(*(run() for run in runs.values()))
        found = Comparison(**gpu_interleaved(runs, ms=1500.0))
        yield Row(f"prefill {batch}x{length}", "inductor", found.ratio, None, times(found) | {"difference": error})
        report.summarise(f"prefill {batch}x{length} / Inductor", found.ratio, 0.95)


def decodes(report: Report, layers: int) -> Iterator[Row]:
    """Decode steps under CUDA graphs, each compiled for its batch."""
    llama = model(layers)
    ours, theirs = (
        torch.compile(llama, backend=backend, dynamic=False, mode="reduce-overhead") for backend in BACKENDS
    )
    for batch in BATCHES:
        decoding = Decoding(llama, llama, batch)
        runs = {
            "ours": functools.partial(decoding.step, ours),
            "theirs": functools.partial(decoding.step, theirs),
        }
        outputs = []
        for run in runs.values():
            for _ in range(3):  # the first calls compile, warm up and record
                last = run().clone()
            outputs.append(last)
        error = relative_error(*outputs)
        found = Comparison(**gpu_interleaved(runs, ms=300.0))
        wall = Comparison(**interleaved(runs, seconds=0.5, synchronize=torch.cuda.synchronize))
        extra = times(found) | {"wall_ratio": wall.ratio, "wall_ours_us": wall.ours.median_us, "difference": error}
        yield Row(f"decode B={batch}, CUDA graphs", "inductor, CUDA graphs", found.ratio, None, extra)
        report.summarise(f"decode B={batch} / Inductor, both under CUDA graphs", found.ratio, 0.95)


def bits(report: Report, layers: int) -> Iterator[Row]:
    """Whether a row's logits keep their bits; ``ratio`` is 1 where they do and 0 where not."""
    llama = model(layers)
    static = torch.compile(llama, backend="batch_invariant", dynamic=False)
    dynamic = torch.compile(llama, backend="batch_invariant", dynamic=True)
    ids = tokens(8, CONTEXT + 1)
    whole = prefill(static, ids)
    order = torch.tensor([3, 7, 0, 1, 6, 2, 5, 4], device="cuda")
    checks = {
        "permuted": lambda: same_bits(prefill(static, ids[order]), whole[order]),
        "static = dynamic": lambda: same_bits(prefill(dynamic, ids), whole),
        "3 rows of 8": lambda: same_bits(prefill(dynamic, ids[2:5]), whole[2:5]),
        "alone": lambda: same_bits(prefill(static, ids[4:5]), whole[4:5]),
    }
    for batch in (1, 8):
        checks[f"prefill = decode, B={batch}"] = functools.partial(decodes_as_it_prefills, llama, dynamic, whole, batch)
    for name, check in checks.items():
        same = check()
        yield Row(f"logits, {name}", "batch_invariant", float(same), same)
    same = all(row.same_bits for row in report.rows if row.case.startswith("logits, "))
    report.summarise("bits: alone = in batch = permuted, prefill = decode, static = dynamic", float(same), 1.0)
    stock = torch.compile(llama, backend="inductor", dynamic=False)
    changed = (prefill(stock, ids)[:1] != prefill(stock, ids[:1])).float().mean().item()
    yield Row("logits that change, alone or in a batch of 8", "inductor", changed, changed == 0.0)


def decodes_as_it_prefills(llama: LlamaForCausalLM, fill: Any, whole: Tensor, batch: int) -> bool:
    """Whether a step under CUDA graphs gives the last token's logits of the prefill, bit for bit."""
    decoding = Decoding(llama, fill, batch)
    graphed = torch.compile(llama, backend="batch_invariant", dynamic=False, mode="reduce-overhead")
    for _ in range(3):
        logits = decoding.step(graphed).clone()
    return same_bits(logits[:, 0], whole[:batch, CONTEXT])


def times(found: Comparison) -> dict[str, float]:
    """The medians, in microseconds."""
    return {"ours_us": found.ours.median_us, "theirs_us": found.theirs.median_us}


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """The difference of two logits relative to their size: right answers before timings."""
    error = ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()
    assert error < 0.05, f"logits differ from Inductor's by {error:.1%}"
    return error


def keep_other_parts(report: Report, parts: tuple[str, ...]) -> None:
    """Put the rows and figures of parts that were not run, from the file of an earlier run, before this run's."""
    begin = {"first-call": "first call", "prefill": "prefill", "decode": "decode", "bits": ("logits", "bits")}
    again = tuple(prefix for part in parts for prefix in (begin[part] if part == "bits" else (begin[part],)))
    if set(parts) == set(PARTS) or not report.path.exists():
        return
    old = json.loads(report.path.read_text())
    fixed = ("case", "against", "ratio", "same_bits")
    kept = [
        Row(*(row[key] for key in fixed), {key: value for key, value in row.items() if key not in fixed})
        for row in old["rows"]
        if not row["case"].startswith(again)
    ]
    report.rows[:0] = kept
    others = {name: entry for name, entry in old["summary"].items() if not name.startswith(again)}
    report.summary = {**others, **report.summary}


assert bicompile  # registers the backend's name where the package is not installed

if __name__ == "__main__":
    main()
