"""SmolLM2-135M with layers that share their compiled graphs, and calls of it, for the CPU suites.

With ``quick`` the demo's small random Llama takes its place.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import bicompile
from bicompile.demo.models import subject
from bicompile.demo.sharing import one_graph_settings, share_layers

PROMPT, PREFILL = 64, 256
COMPILERS = ("batch_invariant", "inductor")


@contextlib.contextmanager
def one_function_for_all_layers() -> Iterator[None]:
    """Both compilers meet the same functions: what is few graphs for each is many for Dynamo, which counts together."""
    with torch.no_grad(), one_graph_settings(), torch._dynamo.config.patch(recompile_limit=64):
        yield


def stock(dtype: torch.dtype, quick: bool) -> Any:
    """The model as it is."""
    return subject("random" if quick else "auto", lambda text: print(text, file=sys.stderr)).load(dtype)


def compiled(dtype: torch.dtype, backend: str, quick: bool) -> Any:
    """The model on a few compiled functions; run it inside :func:`one_function_for_all_layers`.

    Inductor gets PyTorch's attention, as it would without this package.  Both compile graphs for the sizes they meet.
    """
    model, attention = stock(dtype, quick), "batch_invariant" if backend == "batch_invariant" else "sdpa"
    share_layers(model, functools.partial(torch.compile, backend=backend, dynamic=True), attention, one_graph=False)
    return model


def _tokens(model: Any, batch: int, length: int) -> Tensor:
    most = min(40_000, model.config.vocab_size)
    return torch.randint(9, most, (batch, length), generator=torch.Generator().manual_seed(0))


def prefill(model: Any, batch: int, rows: int | None = None) -> Callable[[], Tensor]:
    """All tokens of each sequence at once; or of the first ``rows`` of them."""
    tokens = _tokens(model, batch, PREFILL)[:rows]
    return lambda: model(input_ids=tokens, past_key_values=DynamicCache(config=model.config), logits_to_keep=1).logits


def decode(model: Any, batch: int, rows: int | None = None) -> Callable[[], Tensor]:
    """One step behind a prompt; the cache is put back to the prompt's length each time."""
    cache, tokens = DynamicCache(config=model.config), _tokens(model, batch, PROMPT)[:rows]
    model(input_ids=tokens, past_key_values=cache, logits_to_keep=1)
    step = tokens[:, -1:].contiguous()

    def run() -> Tensor:
        cache.crop(PROMPT)
        return model(input_ids=step, past_key_values=cache).logits

    return run


assert bicompile  # registers the backend's name where the package is not installed
