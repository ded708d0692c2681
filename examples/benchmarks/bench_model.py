"""What does batch invariance cost a whole language model on the CPU?

    python examples/benchmarks/bench_model.py [--threads 2] [--seconds 60] [--no-write]

SmolLM2-135M, whose layers share their compiled graphs.  Prints, and writes to ``results/<device>/model.json``, tokens
per second of stock PyTorch and of ``batch_invariant``: one decode step and one prefill, in fp32 against stock
``torch.compile``, in bf16 against stock eager.  Also the time to compile, each compiler in processes of its own, and
what a lowered call costs beyond its kernel next to Inductor's own extern call.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._inductor.utils import fresh_cache
from transformers import DynamicCache

import bicompile
from bicompile.bench import Report, Row, compare
from bicompile.demo.models import subject
from bicompile.demo.sharing import one_graph_settings, share_layers
from bicompile.lowering import loading
from bicompile.testing import same_bits

PROMPT, PREFILL = 64, 256
BATCHES = (1, 4, 8)
COMPILERS = ("batch_invariant", "inductor")


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60.0, help="for each comparison (decode: a quarter)")
    parser.add_argument("--no-write", action="store_true")
    parser.add_argument("--compile-with", choices=COMPILERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.compile_with:
        print(_first_calls(args.compile_with))
        return
    report = Report("model")
    parts = (_call_overhead(report), _compile_time(report, args.threads), _speed(report, args.seconds))
    for row in itertools.chain(*parts):
        report.rows.append(row)
        print(f"{row.case:34s} against {row.against:14s} {row.ratio:6.2f}", flush=True)
    for name, entry in report.summary.items():
        print(f"{name:52s} {entry['value']}  (bar {entry['bar']})")
    if not args.no_write:
        print(report.write())


def _speed(report: Report, seconds: float) -> Iterator[Row]:
    for dtype, against in ((torch.float32, "inductor"), (torch.bfloat16, "eager")):
        name = str(dtype).removeprefix("torch.")
        with _one_graph_for_all_layers():
            ours = _compiled(dtype, "batch_invariant")
            theirs = _compiled(dtype, against) if against in COMPILERS else _model(dtype)
            for kind in ("decode", "prefill"):
                ratios = []
                for batch in BATCHES:
                    yield (row := _compare(kind, name, batch, ours, theirs, against, seconds))
                    ratios.append(row.ratio)
                bar = 0.95 if against == "inductor" else (2.0 if kind == "prefill" else None)
                report.summarise(f"{kind} {name} / {against}, worst batch size", min(ratios), bar)


def _compile_time(report: Report, threads: int, pairs: int = 2) -> Iterator[Row]:
    """Taking turns, in new processes: whoever compiles second in a process finds much of the work done."""
    taken: dict[str, list[float]] = {name: [] for name in COMPILERS}
    for compiler in COMPILERS * pairs:
        command = [sys.executable, __file__, "--threads", str(threads), "--compile-with", compiler]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        taken[compiler].append(float(done.stdout.split()[-1]))
    ours, theirs = (statistics.median(taken[name]) for name in COMPILERS)
    extra = {"ours_s": ours, "theirs_s": theirs}
    yield Row("compile, 4 graphs of a layer", "inductor", theirs / ours, extra=extra)
    report.summarise("compile time: inductor's / ours (at least 1/1.5)", theirs / ours, 0.667)


def _first_calls(compiler: str) -> float:
    """Seconds of the first call at each specialisation, one row and many, one token and many, with empty caches."""
    loading.load(*loading.KERNELS)  # the kernels are compiled once a machine
    torch.compile(lambda x: x + 1)(torch.ones(2))  # imports and the precompiled header are nobody's cost
    with _one_graph_for_all_layers():
        model = _compiled(torch.float32, compiler)
        with fresh_cache():
            start = time.perf_counter()
            for batch in (2, 1):
                for run in (_decode(model, batch), _prefill(model, batch)):
                    run()
            return time.perf_counter() - start


@contextlib.contextmanager
def _one_graph_for_all_layers() -> Iterator[None]:
    """Both compilers meet the same functions: what is few graphs for each is many for Dynamo, which counts together."""
    with torch.no_grad(), one_graph_settings(), torch._dynamo.config.patch(recompile_limit=64):
        yield


def _model(dtype: torch.dtype) -> Any:
    return subject("auto", lambda text: print(text, file=sys.stderr)).load(dtype)


def _compiled(dtype: torch.dtype, backend: str) -> Any:
    model = _model(dtype)
    share_layers(model, functools.partial(torch.compile, backend=backend, dynamic=True))
    return model


def _compare(kind: str, dtype: str, batch: int, ours: Any, theirs: Any, against: str, seconds: float) -> Row:
    make, seconds = (_decode, seconds / 4) if kind == "decode" else (_prefill, seconds)
    found = compare(make(ours, batch), make(theirs, batch), seconds=seconds, rounds=11)
    tokens = batch * (1 if kind == "decode" else PREFILL)
    speed = {"ours_tokens_per_s": tokens * 1e6 / found.ours.median_us}
    speed["theirs_tokens_per_s"] = tokens * 1e6 / found.theirs.median_us
    alone = make(ours, batch, rows=1)()
    same = same_bits(make(ours, batch)()[:1], alone)
    return Row(f"{kind} {dtype} B={batch}", against, found.ratio, same, extra=speed)


def _tokens(batch: int, length: int) -> Tensor:
    return torch.randint(9, 40_000, (batch, length), generator=torch.Generator().manual_seed(0))


def _prefill(model: Any, batch: int, rows: int | None = None) -> Callable[[], Tensor]:
    tokens = _tokens(batch, PREFILL)[:rows]
    return lambda: model(input_ids=tokens, past_key_values=DynamicCache(config=model.config), logits_to_keep=1).logits


def _decode(model: Any, batch: int, rows: int | None = None) -> Callable[[], Tensor]:
    """One step behind a prompt; the cache is put back to the prompt's length each time."""
    cache, tokens = DynamicCache(config=model.config), _tokens(batch, PROMPT)[:rows]
    model(input_ids=tokens, past_key_values=cache, logits_to_keep=1)
    step = tokens[:, -1:].contiguous()

    def run() -> Tensor:
        cache.crop(PROMPT)
        return model(input_ids=step, past_key_values=cache).logits

    return run


def _call_overhead(report: Report) -> Iterator[Row]:
    """Twenty tiny products in a chain: nearly all of their time is the way into the kernel."""
    weights = [torch.randn(8, 8) for _ in range(20)]

    def chain(x: Tensor) -> Tensor:
        for weight in weights:
            x = x @ weight
        return x

    x = torch.randn(8, 8)
    ours, theirs = (torch.compile(chain, backend=backend) for backend in ("batch_invariant", "inductor"))
    found = compare(lambda: ours(x), lambda: theirs(x), seconds=2.0)
    yield Row("20 products of 8x8 in one graph", "inductor", found.ratio, extra={"ours_us": found.ours.median_us})
    report.summarise("call overhead: inductor's / ours (at least 1/2)", found.ratio, 0.5)


assert bicompile  # registers the backend's name where the package is not installed

if __name__ == "__main__":
    main()
