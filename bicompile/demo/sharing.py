"""Compile a Llama's decoder layer once and run all its layers through it.

Compiled whole, a model of thirty layers is thirty copies of the same code, and every one costs compile time.  Here
the layer is the unit: ``torch.compile`` sees one function of one layer, whose weights are graph inputs.  With
``one_graph``, batch, queries and keys are marked as unbacked, so that one graph serves every layer, prefill and decode,
in any batch; without, there are a few graphs, which know a batch or a query of one and are faster for it.  What
surrounds the layers (rotary table, final norm and output projection) is compiled too; embedding lookup and mask
building are exact in eager mode.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.decorators import mark_unbacked

MAX_POSITIONS = 512
KERNELS = ("reduction", "attention", "matmul")  # what a Llama computes with

Compiler = Callable[[Callable[..., Any]], Callable[..., Any]]


@contextlib.contextmanager
def one_graph_settings() -> Iterator[None]:
    """Dynamo's settings for few graphs, each traced once, while this is entered.

    Two sizes that happen to be equal do not make a graph that wants them equal.  The layer's numbers, such as an
    epsilon, are constants at once: Dynamo would try them as variables first, and trace again.
    """
    sizes = torch.fx.experimental._config.patch(use_duck_shape=False)
    with sizes, torch._dynamo.config.patch(specialize_float=True):
        yield


def share_layers(model: Any, compile: Compiler, attention: str = "batch_invariant", *, one_graph: bool = True) -> None:
    """Rewire ``model`` (a ``LlamaForCausalLM``), in place, to run on three compiled functions.

    Run the model inside :func:`one_graph_settings`, and with a cache.  ``attention`` is transformers' name of one;
    ``one_graph`` needs ours, which asks no sizes.
    """
    model.set_attn_implementation(attention)
    run_layer = compile(_layer)
    model.model.layers = nn.ModuleList(
        _SharedLayer(layer, index, run_layer, one_graph) for index, layer in enumerate(model.model.layers)
    )
    model.lm_head = _Head(model.model.norm, model.lm_head, compile(_head))
    model.model.norm = nn.Identity()  # _Head applies it, after generate() has dropped the rows it does not need
    model.model.rotary_emb = _RotaryTable(model.model.rotary_emb, compile(_rotary))


class _Cache:
    """One layer's keys and values, time first: the strides of ``[T, B, H, D]`` do not depend on ``T``."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def update(self, keys: Tensor, values: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        """Append ``[B, H, T, D]`` keys and values; all of them, in the same form."""
        # .contiguous(): appended to nothing they would keep their own strides, and the next step would compile anew.
        self.keys = torch.cat([self.keys, keys.permute(2, 0, 1, 3)]).contiguous()
        self.values = torch.cat([self.values, values.permute(2, 0, 1, 3)]).contiguous()
        return self.keys.permute(1, 2, 0, 3), self.values.permute(1, 2, 0, 3)


def _layer(
    layer: nn.Module, hidden: Tensor, mask: Tensor | None, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor
) -> Any:
    """One decoder layer; the compiler learns which sizes belong together, so that none is tied to a number."""
    batch, length = hidden.shape[0], hidden.shape[1]
    for other in (cos, sin):
        torch._check(other.shape[0] == batch)
        torch._check(other.shape[1] == length)
    for past in (keys, values):
        torch._check(past.shape[1] == batch)
    torch._check(keys.shape[0] == values.shape[0])
    if mask is not None:
        torch._check(mask.shape[0] == batch)
        torch._check(mask.shape[1] == 1)
        torch._check(mask.shape[2] == length)
        torch._check(mask.shape[3] == length + keys.shape[0])
    cache = _Cache(keys, values)
    hidden = layer(hidden, attention_mask=mask, position_embeddings=(cos, sin), past_key_values=cache)
    return hidden, cache.keys, cache.values


def _head(norm: nn.Module, linear: nn.Module, hidden: Tensor) -> Tensor:
    return linear(norm(hidden))


def _rotary(rotary: nn.Module, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    return rotary(like, positions)


class _SharedLayer(nn.Module):
    """Layer ``index`` of the model: unpacks the cache that transformers hands it and calls the shared graph."""

    def __init__(self, layer: Any, index: int, run: Callable[..., Any], one_graph: bool) -> None:
        super().__init__()
        self.layer, self.index, self.run, self.one_graph = layer, index, run, one_graph
        layer.self_attn.layer_idx = 0  # else the number would be a constant of the graph

    def forward(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: Any,
        **_: Any,
    ) -> Tensor:
        slot = past_key_values.layers[self.index]
        if slot.is_initialized:
            past = [_time_first(slot.keys), _time_first(slot.values)]
        else:
            attention: Any = self.layer.self_attn
            heads = attention.config.num_key_value_heads
            past = [hidden.new_empty(0, len(hidden), heads, attention.head_dim) for _ in range(2)]
            slot.lazy_initialization(*past)
        batch, length = hidden.shape[:2]
        cos, sin = (table.expand(batch, -1, -1) for table in position_embeddings)
        if self.one_graph:
            if attention_mask is None:
                attention_mask = _causal(batch, length, past[0].shape[0], hidden.device)
            for tensor, dims in ((hidden, (0, 1)), (attention_mask, (0, 2, 3)), (cos, (0, 1)), (sin, (0, 1))):
                mark_unbacked(tensor, dims)
            for tensor in past:
                mark_unbacked(tensor, (0, 1))
        hidden, keys, values = self.run(self.layer, hidden, attention_mask, cos, sin, *past)
        slot.keys, slot.values = keys.permute(1, 2, 0, 3), values.permute(1, 2, 0, 3)
        return hidden


def _time_first(heads_first: Tensor) -> Tensor:
    """``[B, H, T, D]`` as a contiguous ``[T, B, H, D]``; the stride of a dim of one is what the others say."""
    time_first = heads_first.permute(2, 0, 1, 3)
    return time_first.reshape(-1).view(time_first.shape)


@functools.lru_cache(maxsize=1)  # the layers of one step ask for the same
def _causal(batch: int, length: int, past: int, device: torch.device) -> Tensor:
    """The mask transformers leaves out where nothing is padded: a query sees the past and itself."""
    visible = torch.ones(length, past + length, dtype=torch.bool, device=device).tril(past)
    return visible.repeat(batch, 1, 1, 1)


class _Head(nn.Module):
    """Final norm and output projection."""

    def __init__(self, norm: nn.Module, linear: nn.Module, run: Callable[..., Any]) -> None:
        super().__init__()
        self.norm, self.linear, self.run = norm, linear, run

    def forward(self, hidden: Tensor) -> Tensor:
        rows = hidden.flatten(0, 1).clone(memory_format=torch.contiguous_format)
        mark_unbacked(rows, 0)
        return self.run(self.norm, self.linear, rows).unflatten(0, hidden.shape[:2])


class _RotaryTable(nn.Module):
    """Rotary embeddings, computed once for every position; a step then only looks its positions up."""

    def __init__(self, rotary: nn.Module, run: Callable[..., Any]) -> None:
        super().__init__()
        self.rotary, self.run = rotary, run
        self.tables: tuple[Tensor, Tensor] | None = None

    def forward(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        if self.tables is None:
            cos, sin = self.run(self.rotary, hidden[:1, :1], torch.arange(MAX_POSITIONS, device=hidden.device)[None])
            self.tables = cos[0], sin[0]
        return self.tables[0][position_ids], self.tables[1][position_ids]
