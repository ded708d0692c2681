"""A process that compiles one case of a whole model on a GPU, and answers questions about it.

    python -m bicompile.bench.suites.model_worker BACKEND CASE LAYERS

Questions come on the standard input, a line each: ``time``, ``sample`` and ``bits``.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, StaticCache

import bicompile

from ..gpu_timing import gpu_interleaved
from .llama import model, tokens

CONTEXT, ROOM = 1024, 192
"""Tokens of each sequence, and free places behind them in a static cache."""
TURN_MS = 60.0
ANSWER = "ANSWER "
"""How an answer begins: like no library's own output."""


@dataclass(frozen=True)
class Case:
    """One thing to time: sequences, tokens of each, and how."""

    name: str
    batch: int
    length: int
    decodes: bool = False
    dynamic: bool = False

    def __str__(self) -> str:
        return self.name


CASES = (
    Case("prefill 8x1024", 8, 1024),
    Case("prefill 1x2048", 1, 2048),
    Case("decode B=1, CUDA graphs", 1, 1, decodes=True),
    Case("decode B=16, CUDA graphs", 16, 1, decodes=True),
    Case("decode B=64, CUDA graphs", 64, 1, decodes=True),
)
DYNAMIC = Case("prefill 3x1024, dynamic shapes", 3, 1024, dynamic=True)


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
    """Tell the parent."""
    print(f"{ANSWER}{json.dumps(what)}", flush=True)


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
    wanted, layers = sys.argv[2], int(sys.argv[3])
    serve(next(case for case in (*CASES, DYNAMIC) if case.name == wanted), sys.argv[1], layers)
