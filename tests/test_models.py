"""Models keep a row's bits under ``batch_invariant``: alone, in any batch, permuted, among NaN rows, statically and
dynamically compiled, forward and input gradient.  Prefill is decode, and left padding is invisible.

Compiling dominates the time, so the companies are tried in eager code, and compiled code is compared with it and tried
in few of them.  ``-k llama`` or ``-k vit`` selects a model.
"""

from __future__ import annotations

import itertools
import os
import random

import pytest
import torch
from model_zoo import MODELS, TOKENS, VOCABULARY, Model, llama
from torch import Tensor, nn

import bicompile
from bicompile.errors import BatchInvarianceError
from bicompile.testing import assert_batch_invariant, same_bits
from bicompile.testing.trials import BatchInvariance

pytest.importorskip("transformers")

# By sizes: 4 makes a static graph, 1 the graph of one row, 3 and 2 a dynamic one.
STATIC = ("again", "permuted", "nan", "alone", "duplicated", "offset")
DYNAMIC = ("permuted", "nan", "sub-batch")
COMPANY = (*STATIC, "sub-batch", "autograd")
# Compiling gradients is slow: each day two of the other models, and of one the two graphs that a row alone makes.
_draw = random.Random(os.environ["BICOMPILE_SAMPLE_SEED"])
DYNAMIC_TODAY = ("ordinary", "llama", *_draw.sample(sorted(MODELS.keys() - {"ordinary", "llama"}), 2))
ALONE_TODAY = _draw.choice(DYNAMIC_TODAY)

ALTERNATELY = dict(zip(MODELS, itertools.cycle((torch.float32, torch.bfloat16)), strict=False))


def compile_it(module: nn.Module, dynamic: bool | None = None) -> nn.Module:
    return torch.compile(module, backend="batch_invariant", dynamic=dynamic)


def value_and_gradients(module: nn.Module, x: Tensor, *weights: Tensor) -> list[Tensor]:
    """The output and the gradients of the input and of ``weights``, for an incoming one that is exactly known."""
    x = x.clone().requires_grad_()
    y = module(x)
    return [y.detach(), *torch.autograd.grad(y, (x, *weights), y.detach().abs())]


every_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


@every_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_and_their_gradients_keep_their_bits_in_eager(model: Model, dtype: torch.dtype):
    """In every company, at no compilation's price; the tests below show that compiled code has these bits."""
    module, x = model.module(dtype), model.rows(4, dtype)
    with bicompile.eager(allow=["aten.randn"]):  # the gradient that the check sends back
        assert_batch_invariant(module, x, check_input_grad=True, situations=COMPANY)


@every_model
def test_gradients_of_inputs_keep_their_bits_in_any_batch_that_is_drawn(
    model: Model, batch_invariance: BatchInvariance
):
    """Other rows, rows twice, in any order, beside hostile ones, anywhere in memory, on any number of threads."""
    dtype = ALTERNATELY[model.name]
    module, x = model.module(dtype), model.rows(4, dtype)
    with bicompile.eager(allow=["aten.randn", "aten.randint"]):  # values and gradients that the check draws
        batch_invariance.check(module, x, check_input_grad=True)


@pytest.mark.parametrize(
    "model", [model for name, model in MODELS.items() if name != "ordinary"], ids=lambda model: model.name
)
def test_rows_keep_their_bits_with_static_shapes(model: Model):
    """Forward; gradients are for the tests below.  The llama also with the dynamic shapes of other batches."""
    module, x = model.module(torch.float32), model.rows(4, torch.float32)
    compiled = compile_it(module)
    situations = (*STATIC, "sub-batch") if model.name == "llama" else STATIC
    with torch.no_grad():
        assert_batch_invariant(compiled, x, situations=situations)
        found = compiled(x)
        with bicompile.eager():
            assert same_bits(found, module(x))


def test_rows_of_an_ordinary_block_keep_their_bits_in_training():
    """Forward and backward, with static shapes and then dynamic ones; the weights are trained too, as in eager code."""
    module, x = MODELS["ordinary"].module(torch.float32).requires_grad_(True), MODELS["ordinary"].rows(4, torch.float32)
    compiled = compile_it(module)
    assert_batch_invariant(compiled, x, check_input_grad=True, situations=COMPANY)
    found = value_and_gradients(compiled, x, *module.parameters())
    with bicompile.eager():
        assert same_bits(found, value_and_gradients(module, x, *module.parameters()))


@pytest.mark.parametrize("model", [MODELS[name] for name in DYNAMIC_TODAY], ids=DYNAMIC_TODAY)
def test_rows_keep_their_bits_in_bfloat16_with_dynamic_shapes(
    model: Model, monkeypatch: pytest.MonkeyPatch, batch_invariance: BatchInvariance
):
    """Forward and input gradient, which are those of eager code; one model's also alone.

    And in batches that are drawn, of 2 rows or more: these are of one graph.
    """
    module, x = model.module(torch.bfloat16), model.rows(4, torch.bfloat16)
    compiled = compile_it(module, dynamic=True)
    situations = (*DYNAMIC, "alone") if model.name == ALONE_TODAY else DYNAMIC
    # transformers gives attention grouped keys where it makes no mask, as when it is not compiled, and else repeats
    # them: another function, whose gradients of the keys are rounded more often.
    monkeypatch.setattr("transformers.integrations.sdpa_attention.use_gqa_in_sdpa", lambda *args, **kwargs: False)
    assert_batch_invariant(compiled, x, check_input_grad=True, situations=situations)
    batch_invariance.check(compiled, x, check_input_grad=True, min_rows=2)
    found = value_and_gradients(compiled, x)
    with bicompile.eager():
        assert same_bits(found, value_and_gradients(module, x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_rows_keep_their_bits_in_other_dtypes(dtype: torch.dtype):
    model = MODELS["ordinary"]
    compiled = compile_it(model.module(dtype))
    with torch.no_grad():
        assert_batch_invariant(compiled, model.rows(4, dtype), situations=["again", "permuted", "nan"])


def test_layouts_of_the_input_do_not_matter():
    model = MODELS["ordinary"]
    compiled = compile_it(model.module(torch.float32))
    with torch.no_grad():
        assert_batch_invariant(compiled, model.rows(4, torch.float32), situations=["strided", "transposed", "offset"])


def test_the_same_checks_catch_stock_eager():
    model = MODELS["llama"]
    with pytest.raises(BatchInvarianceError):
        assert_batch_invariant(model.module(torch.float32), model.rows(4, torch.float32), situations=COMPANY)


# Masks travel with their rows, and padding is not seen.


def _mask(valid: list[int], total: int, side: str) -> Tensor:
    """``[rows, total]`` of ones where a token is, padded with zeros on one side."""
    positions = torch.arange(total)
    rows = [positions >= total - n if side == "left" else positions < n for n in valid]
    return torch.stack(rows).long()


def test_bert_rows_keep_their_bits_with_their_padding_masks():
    model = MODELS["bert"]
    compiled = compile_it(model.module(torch.float32))
    mask = _mask([7, 3, 5, 1], TOKENS, "right")
    with torch.no_grad():
        assert_batch_invariant(
            compiled, model.rows(4, torch.float32), attention_mask=mask, situations=["permuted", "nan", "alone"]
        )


def test_bert_does_not_see_right_padding():
    model = MODELS["bert"]
    compiled = compile_it(model.module(torch.float32), dynamic=True)
    x = model.rows(3, torch.float32)
    with torch.no_grad():
        whole = compiled(x, attention_mask=_mask([4, 4, 4], 7, "right"))
        short = compiled(x[:, :5], attention_mask=_mask([4, 4, 4], 5, "right"))
    assert same_bits(whole[:, :4], short[:, :4])


def test_encoder_rows_keep_their_bits_with_their_padding_masks():
    model = MODELS["encoder"]
    compiled = compile_it(model.module(torch.float32))
    mask = _mask([7, 3, 5], TOKENS, "right") == 0
    with torch.no_grad():
        assert_batch_invariant(
            compiled, model.rows(3, torch.float32), src_key_padding_mask=mask, situations=["permuted", "nan", "alone"]
        )


# Generation: left padding, and prefill against decode over a prompt that crosses a block of 192 keys.

PROMPT = 200


def _tokens(num_rows: int, length: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (num_rows, length), generator=torch.Generator().manual_seed(2))


def _left_padded(ids: Tensor, padding: int) -> dict[str, Tensor]:
    mask = torch.cat([ids.new_zeros(len(ids), padding), torch.ones_like(ids)], dim=1)
    return {
        "input_ids": torch.cat([ids.new_zeros(len(ids), padding), ids], dim=1),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }


def test_llama_does_not_see_left_padding():
    model = Model("llama", llama).module(torch.bfloat16)
    compiled = compile_it(model, dynamic=True)
    ids = _tokens(2, PROMPT)
    with torch.no_grad():
        plain = compiled(**_left_padded(ids, 0)).logits
        for padding in (1, 3, 40):
            assert same_bits(compiled(**_left_padded(ids, padding)).logits[:, padding:], plain), f"{padding=}"
        with bicompile.eager():
            assert same_bits(model(**_left_padded(ids, 0)).logits, plain)


def test_llama_prefills_as_it_decodes():
    """In eager code; tests/test_transformers_generate.py compares compiled prefills and steps with it."""
    from transformers import DynamicCache

    module = Model("llama", llama).module(torch.float32)
    batch = _left_padded(_tokens(2, PROMPT), 3)
    length = batch["input_ids"].shape[1]

    def run(start: int, end: int, cache: DynamicCache) -> Tensor:
        part = {"input_ids": batch["input_ids"][:, start:end], "position_ids": batch["position_ids"][:, start:end]}
        mask = batch["attention_mask"][:, :end]
        return module(**part, attention_mask=mask, past_key_values=cache, use_cache=True).logits

    with torch.no_grad(), bicompile.eager():
        prefill = run(0, length, DynamicCache())
        cache = DynamicCache()
        chunks = [run(0, 150, cache), run(150, length - 4, cache)]
        steps = [run(i, i + 1, cache) for i in range(length - 4, length)]
    assert same_bits(torch.cat([*chunks, *steps], dim=1)[:, 3:], prefill[:, 3:])


def test_llama_generates_the_same_tokens_in_any_batch():
    """With transformers' own attention; tests/test_transformers_generate.py compiles the steps."""
    module = Model("llama", llama).module(torch.float32)
    ids = _tokens(3, 12)

    def complete(rows: Tensor, padding: int) -> Tensor:
        batch = _left_padded(rows, padding)
        del batch["position_ids"]
        settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "use_cache": True}
        with bicompile.eager():
            return module.generate(**batch, **settings)[:, padding + 12 :]

    together = complete(ids, 0)
    assert same_bits(complete(ids[1:2], 3), together[1:2])
    assert same_bits(complete(ids[[2, 0]], 1), together[[2, 0]])
