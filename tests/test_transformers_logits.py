"""The logits of a token are the same bits however its row gets there.

One-shot prefill, chunks, decode with each kind of cache; any batch; padding on the left or right; packed.  In
``bicompile.eager()``, which needs no compiling; compiled cases are in test_transformers_generate.py.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from torch import Tensor
from transformers_zoo import CAUSAL, SIZES, SPECIAL, VOCABULARY, Causal, in_chunks, padded, t5, tokens

import bicompile
from bicompile.testing import differing_bits, same_bits

LENGTH = 200  # more than a block of 192 keys
DTYPES = [torch.float32, torch.bfloat16]
each_model = pytest.mark.parametrize("model", CAUSAL.values(), ids=CAUSAL)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])


@each_dtype
@each_model
def test_rows_keep_their_logits_in_batches_of_1_to_9(model: Causal, dtype: torch.dtype):
    module, ids = model.build(dtype), tokens(9, 30)
    order = torch.tensor([4, 0, 8, 2, 6, 1, 7, 3, 5])
    with torch.no_grad(), bicompile.eager():
        whole = module(ids).logits
        for size in range(1, 9):
            assert same_bits(module(ids[9 - size :]).logits, whole[9 - size :]), f"{size=}"
        assert same_bits(module(ids[order]).logits, whole[order])


@pytest.mark.parametrize("experts", ["eager", "batched_mm"])
def test_rows_keep_their_logits_whichever_way_experts_are_computed(experts: str):
    """A loop over experts, and one product for each token; the other tests take the default, a grouped product."""
    module, ids = CAUSAL["gpt-oss"].build(torch.bfloat16), tokens(4, 30)
    module.config._experts_implementation = experts
    with torch.no_grad(), bicompile.eager():
        whole = module(ids).logits
        assert same_bits(module(ids[2:3]).logits, whole[2:3])
        assert same_bits(module(ids.flip(0)).logits, whole.flip(0))


@each_dtype
@each_model
def test_padding_is_invisible(model: Causal, dtype: torch.dtype):
    """Trap 18, for left padding."""
    module, ids = model.build(dtype), tokens(2, LENGTH)
    with torch.no_grad(), bicompile.eager():
        plain = module(ids).logits
        for padding in (1, 3, 40, 70):
            left = module(**padded(ids, padding)).logits[:, padding:]
            right = module(**padded(ids, padding, "right")).logits[:, :LENGTH]
            assert same_bits(left, plain) and same_bits(right, plain), f"{padding=}"


@each_dtype
@each_model
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_prefill_equals_chunks_equals_decode(model: Causal, dtype: torch.dtype, kind: str):
    """Also trap 6: a static cache has more keys than a dynamic one; both are sliding where the model's layers are."""
    module, ids = model.build(dtype), tokens(2, LENGTH)
    with torch.no_grad(), bicompile.eager():
        plain = module(ids).logits
        batch = padded(ids, 3)
        for chunk in (64, 7, 1):
            if kind == "static":
                cache: Any = transformers.StaticCache(config=module.config, max_cache_len=LENGTH + 20)
            else:
                cache = transformers.DynamicCache(config=module.config)
            # Decode steps one by one at the end, where they are the longest.
            first = LENGTH - 12 if chunk == 1 else chunk
            logits = in_chunks(module, batch, cache, itertools.chain([first], itertools.repeat(chunk)))
            assert same_bits(logits[:, 3:], plain), f"{chunk=}"


@each_dtype
@each_model
def test_packed_sequences_have_the_logits_they_have_alone(model: Causal, dtype: torch.dtype):
    module, ids = model.build(dtype), tokens(3, LENGTH)
    lengths = (30, 17, LENGTH)
    packed = torch.cat([row[:n] for row, n in zip(ids, lengths, strict=True)])[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with torch.no_grad(), bicompile.eager():
        whole = module(ids).logits
        logits = module(packed, position_ids=positions, use_cache=False).logits[0]
    for row, part in enumerate(logits.split(lengths)):
        assert same_bits(part, whole[row, : lengths[row]])


def test_the_same_checks_catch_stock():
    """Which of them stock fails depends on the processor; on most, all."""
    module, ids = CAUSAL["llama"].build(attention="sdpa"), tokens(9, LENGTH)
    with torch.no_grad():
        plain = module(ids).logits
        steps = itertools.chain([LENGTH - 2], itertools.repeat(1))
        decoded = in_chunks(module, padded(ids, 0), transformers.DynamicCache(config=module.config), steps)
        moved = {
            "left padding": differing_bits(module(**padded(ids, 3)).logits[:, 3:], plain),
            "decode": differing_bits(decoded[:, -2:], plain[:, -2:]),
            "batch": differing_bits(decoded[:1, -1], _last_step(module, ids[:1])),
        }
    assert any(moved.values()), moved


def _last_step(module: Any, ids: Tensor) -> Tensor:
    cache = transformers.DynamicCache(config=module.config)
    return in_chunks(module, padded(ids, 0), cache, itertools.chain([LENGTH - 2], itertools.repeat(1)))[:, -1]


# Encoders, and decoders that look at an encoder.


@each_dtype
def test_bert_keeps_its_bits_over_batches_and_padding(dtype: torch.dtype):
    config = transformers.BertConfig(
        **SIZES, num_hidden_layers=1, max_position_embeddings=512, attn_implementation="batch_invariant"
    )
    module = transformers.BertModel(config).to(dtype).eval()
    ids = tokens(9, LENGTH)
    with torch.no_grad(), bicompile.eager():
        whole = module(ids).last_hidden_state
        for size in (1, 2, 5):
            assert same_bits(module(ids[:size]).last_hidden_state, whole[:size])
        for padding in (1, 70):
            batch = padded(ids[:3], padding, "right")
            hidden = module(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
            assert same_bits(hidden[:, :LENGTH], whole[:3]), f"{padding=}"


@each_dtype
def test_t5_keeps_its_bits_with_padding_at_the_encoder_and_decode_steps(dtype: torch.dtype):
    module, asked, said = t5(dtype), tokens(3, LENGTH), tokens(3, 24, seed=2)
    with torch.no_grad(), bicompile.eager():
        plain = module(input_ids=asked, decoder_input_ids=said).logits
        assert same_bits(module(input_ids=asked[1:2], decoder_input_ids=said[1:2]).logits, plain[1:2])
        for side in ("left", "right"):  # its positions are relative: both are invisible
            batch = padded(asked, 5, side)
            del batch["position_ids"]
            encoded = module.encoder(**batch)
            again = {"encoder_outputs": encoded, "attention_mask": batch["attention_mask"]}
            assert same_bits(module(**again, decoder_input_ids=said).logits, plain), side
            assert same_bits(_decoded(module, said, again, first=16), plain), side


@each_dtype
def test_whisper_decoder_prefills_as_it_decodes(dtype: torch.dtype):
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=64,
        decoder_layers=1,
        encoder_layers=1,
        decoder_attention_heads=4,
        encoder_attention_heads=4,
        decoder_ffn_dim=200,
        encoder_ffn_dim=200,
        max_source_positions=LENGTH,
        decoder_start_token_id=1,
        attn_implementation="batch_invariant",
        **{**SPECIAL, "eos_token_id": 2},
    )
    module = transformers.WhisperForConditionalGeneration(config).to(dtype).eval()
    heard = torch.randn(3, LENGTH, 64, generator=torch.Generator().manual_seed(3)).to(dtype)
    said = tokens(3, 40)
    with torch.no_grad(), bicompile.eager():
        plain = module(encoder_outputs=(heard,), decoder_input_ids=said).logits
        alone = module(encoder_outputs=(heard[1:2],), decoder_input_ids=said[1:2]).logits
        decoded = _decoded(module, said, {"encoder_outputs": (heard,)}, first=32)
    assert same_bits(alone, plain[1:2])
    assert same_bits(decoded, plain)


def _decoded(module: Any, said: Tensor, encoded: dict[str, Any], first: int) -> Tensor:
    """The decoder's logits: ``first`` tokens at once, then one by one."""
    cache = transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache())
    cuts = [0, *range(first, said.shape[1] + 1)]
    steps = [
        module(**encoded, decoder_input_ids=said[:, start:stop], past_key_values=cache, use_cache=True).logits
        for start, stop in itertools.pairwise(cuts)
    ]
    return torch.cat(steps, dim=1)


# A real model.


def test_smollm2_has_the_same_logits_prefilled_decoded_padded_and_in_company():
    from bicompile.demo.models import DemoError, subject

    try:
        smollm2 = subject("smollm2", print)
    except DemoError as error:
        pytest.skip(str(error))
    module = smollm2.load(torch.bfloat16)
    module.set_attn_implementation("batch_invariant")
    texts = ["The history of the Roman Empire began when a small town on the Tiber", "Dear Sir or Madam, I am writing"]
    rows = [torch.tensor([smollm2.encode(text)[:8]]) for text in texts]
    with torch.no_grad(), bicompile.eager():
        alone = module(rows[0]).logits
        company = module(torch.cat(rows)).logits[:1]
        left = module(**padded(rows[0], 3)).logits[:, 3:]
        steps = itertools.chain([5], itertools.repeat(1))
        decoded = in_chunks(module, padded(rows[0], 0), transformers.DynamicCache(config=module.config), steps)
    assert same_bits(company, alone) and same_bits(left, alone) and same_bits(decoded, alone)
