"""Whole models on a GPU: rows alone, permuted, among NaNs; padding; prefill and decode; static caches, CUDA graphs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bicompile.testing import assert_batch_invariant, same_bits

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model_zoo import MODELS, VOCABULARY, Model, llama  # noqa: E402

pytest.importorskip("transformers")
PROMPT = 150


def on_gpu(model: Model, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """The module, and a batch of 9 rows."""
    return model.module(dtype).cuda(), model.rows(9, dtype).cuda()


def compile_it(module: nn.Module, **options: Any) -> Any:
    """``module`` under our backend, which must take it in one graph."""
    return torch.compile(module, backend="batch_invariant", fullgraph=True, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["ordinary", "encoder", "gpt2"])
def test_rows_keep_their_bits_in_any_company(name, dtype):
    module, x = on_gpu(MODELS[name], dtype)
    with torch.no_grad():
        assert_batch_invariant(compile_it(module), x, situations=["again", "permuted", "nan", "alone"])


def test_gradients_of_inputs_keep_their_bits():
    module, x = on_gpu(MODELS["ordinary"], torch.bfloat16)
    compiled = compile_it(module)

    def gradient(rows: Tensor) -> Tensor:
        leaf = rows.clone().requires_grad_()
        y = compiled(leaf)
        return torch.autograd.grad(y, leaf, torch.ones_like(y))[0]

    whole = gradient(x)
    assert same_bits(gradient(x[4:5]), whole[4:5])
    assert same_bits(gradient(x.flip(0)).flip(0), whole)
    with torch.no_grad():
        without = compiled(x)
    assert same_bits(compiled(x.clone().requires_grad_()).detach(), without)


def test_static_and_dynamic_graphs_give_the_same_bits():
    module, x = on_gpu(MODELS["llama"], torch.bfloat16)
    with torch.no_grad():
        static = compile_it(module, dynamic=False)(x)
        torch._dynamo.reset()
        dynamic = compile_it(module, dynamic=True)
        for rows in (slice(None), slice(1, 3), slice(2, 3)):
            assert same_bits(dynamic(x[rows]), static[rows])


def _tokens(num_rows: int, length: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (num_rows, length), generator=torch.Generator().manual_seed(2)).cuda()


def _left_padded(ids: Tensor, padding: int) -> dict[str, Tensor]:
    mask = torch.cat([ids.new_zeros(len(ids), padding), torch.ones_like(ids)], dim=1)
    return {
        "input_ids": torch.cat([ids.new_zeros(len(ids), padding), ids], dim=1),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }


def test_llama_does_not_see_left_padding():
    compiled = compile_it(Model("llama", llama).module(torch.bfloat16).cuda(), dynamic=True)
    ids = _tokens(2, PROMPT)
    with torch.no_grad():
        plain = compiled(**_left_padded(ids, 0)).logits
        for padding in (1, 3, 70):
            assert same_bits(compiled(**_left_padded(ids, padding)).logits[:, padding:], plain), f"{padding=}"


def test_llama_prefills_as_it_decodes_from_a_static_cache():
    """With and without CUDA graphs, of several rows and of one."""
    from transformers import StaticCache

    model = Model("llama", lambda: llama(2)).module(torch.bfloat16).cuda()
    ids = _tokens(5, PROMPT + 4)
    config = model.config
    with torch.no_grad():
        prefill = compile_it(model, dynamic=True)
        whole = prefill(input_ids=ids, use_cache=False).logits
        for rows, mode in ((5, "reduce-overhead"), (1, "default")):
            cache = StaticCache(config=config, max_cache_len=PROMPT + 40)
            depth = config.hidden_size // config.num_attention_heads
            cache.early_initialization(rows, config.num_key_value_heads, depth, torch.bfloat16, torch.device("cuda"))
            part = ids[:rows]
            first = prefill(input_ids=part[:, :PROMPT], past_key_values=cache, use_cache=True).logits
            assert same_bits(first, whole[:rows, :PROMPT])
            decode = compile_it(model, dynamic=False, mode=mode)
            for place in range(PROMPT, PROMPT + 4):
                torch.compiler.cudagraph_mark_step_begin()
                positions = torch.full((rows, 1), place, device="cuda")
                step = decode(
                    input_ids=part[:, place : place + 1], past_key_values=cache, use_cache=True, position_ids=positions
                )
                assert same_bits(step.logits[:, 0], whole[:rows, place]), (rows, place)


def test_llama_generates_the_same_tokens_in_any_batch():
    model = Model("llama", llama).module(torch.bfloat16).cuda()
    model.forward = torch.compile(model.forward, backend="batch_invariant", dynamic=True)
    ids = _tokens(3, 12)

    def complete(rows: Tensor, padding: int) -> Tensor:
        batch = _left_padded(rows, padding)
        del batch["position_ids"]
        settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "use_cache": True}
        return model.generate(**batch, **settings)[:, padding + 12 :]

    together = complete(ids, 0)
    assert same_bits(complete(ids[1:2], 3), together[1:2])
    assert same_bits(complete(ids[[2, 0]], 1), together[[2, 0]])
