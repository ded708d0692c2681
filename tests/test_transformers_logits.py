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
from transformers_zoo import (
    CAUSAL,
    Causal,
    bert,
    decoded,
    encoder_caches,
    in_chunks,
    padded,
    ragged,
    t5,
    tokens,
    unpadded,
    whisper,
)

import bicompile
from bicompile.testing import differing_bits, same_bits

LENGTH = 200  # more than a block of 192 keys
PADDINGS = (0, 1, 3, 7, 31, 40, 64, 69, 70)
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
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_invisible(model: Causal, dtype: torch.dtype, side: str):
    """Trap 18, for left padding: rows with paddings from 0 to 70, all in one batch."""
    module, ids, paddings = model.build(dtype), tokens(1, LENGTH + 30), range(71)
    with torch.no_grad(), bicompile.eager():
        plain = module(ids).logits[0]
        logits = module(**ragged(ids, paddings, side)).logits
    for padding, row in zip(paddings, unpadded(logits, paddings, side), strict=True):
        assert same_bits(row, plain[: len(row)]), f"{padding=}"


@each_dtype
@each_model
@pytest.mark.parametrize("kind", ["dynamic", "full", "static"])
def test_prefill_equals_chunks_equals_decode(model: Causal, dtype: torch.dtype, kind: str):
    """Nine rows, padded unequally.  Also trap 6: a static cache has more keys than a dynamic one.

    The dynamic and the static one slide where the model's layers do, the full one keeps all keys.
    """
    module, ids = model.build(dtype), tokens(1, LENGTH + 30)
    batch = ragged(ids, PADDINGS)
    with torch.no_grad(), bicompile.eager():
        plain = module(ids).logits[0]
        for chunk in (64, 7, 1):
            if kind == "static":
                cache: Any = transformers.StaticCache(config=module.config, max_cache_len=LENGTH + 50)
            else:
                cache = transformers.DynamicCache(config=module.config if kind == "dynamic" else None)
            # Decode steps one by one at the end, where they are the longest.
            first = LENGTH + 20 if chunk == 1 else chunk
            logits = in_chunks(module, batch, cache, itertools.chain([first], itertools.repeat(chunk)))
            for padding, row in zip(PADDINGS, unpadded(logits, PADDINGS), strict=True):
                assert same_bits(row, plain[: len(row)]), f"{chunk=} {padding=}"


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
    module, ids = bert(dtype), tokens(9, LENGTH)
    with torch.no_grad(), bicompile.eager():
        whole = module(ids).last_hidden_state
        for size in range(1, 9):
            assert same_bits(module(ids[9 - size :]).last_hidden_state, whole[9 - size :]), f"{size=}"
        for padding in (1, 40, 70):
            left = module(**padded(ids[:3], padding)).last_hidden_state[:, padding:]
            right = module(**padded(ids[:3], padding, "right")).last_hidden_state[:, :LENGTH]
            assert same_bits(left, whole[:3]) and same_bits(right, whole[:3]), f"{padding=}"


@each_dtype
def test_t5_keeps_its_bits_with_padding_at_the_encoder_and_in_chunks(dtype: torch.dtype):
    module, asked, said = t5(dtype), tokens(9, LENGTH), tokens(9, 24, seed=2)
    with torch.no_grad(), bicompile.eager():
        plain = module(input_ids=asked, decoder_input_ids=said).logits
        for size in range(1, 9):
            part = module(input_ids=asked[9 - size :], decoder_input_ids=said[9 - size :]).logits
            assert same_bits(part, plain[9 - size :]), f"{size=}"
        for side, padding in itertools.product(("left", "right"), (5, 70)):  # positions are relative: both invisible
            batch = padded(asked, padding, side)
            del batch["position_ids"]
            again = {"encoder_outputs": module.encoder(**batch), "attention_mask": batch["attention_mask"]}
            assert same_bits(module(**again, decoder_input_ids=said).logits, plain), f"{side=} {padding=}"
            for chunk in (7, 1):
                for kind, cache in encoder_caches(module.config, 30, LENGTH + padding).items():
                    steps = itertools.repeat(chunk)
                    logits = decoded(module, {"decoder_input_ids": said}, again, cache, steps)
                    assert same_bits(logits, plain), f"{side=} {padding=} {chunk=} {kind=}"


@each_dtype
def test_whisper_decoder_keeps_its_bits_over_batches_padding_chunks_and_caches(dtype: torch.dtype):
    module = whisper(LENGTH, dtype)
    heard = torch.randn(9, LENGTH, 64, generator=torch.Generator().manual_seed(3)).to(dtype)
    said = tokens(9, 40)
    with torch.no_grad(), bicompile.eager():
        plain = module(encoder_outputs=(heard,), decoder_input_ids=said).logits
        for size in range(1, 9):
            part = module(encoder_outputs=(heard[9 - size :],), decoder_input_ids=said[9 - size :]).logits
            assert same_bits(part, plain[9 - size :]), f"{size=}"
        for padding, chunk in ((0, 7), (70, 64), (3, 1)):
            batch = {f"decoder_{name}": t for name, t in padded(said, padding).items()}
            for kind, cache in encoder_caches(module.config, 120, LENGTH).items():
                logits = decoded(module, batch, {"encoder_outputs": (heard,)}, cache, itertools.repeat(chunk))
                assert same_bits(logits[:, padding:], plain), f"{padding=} {chunk=} {kind=}"


# A real model.


@each_dtype
def test_smollm2_has_the_same_logits_prefilled_decoded_padded_packed_and_in_company(dtype: torch.dtype):
    from bicompile.demo.models import DemoError, subject

    try:
        smollm2 = subject("smollm2", print)
    except DemoError as error:
        pytest.skip(str(error))
    module = smollm2.load(dtype)
    module.set_attn_implementation("batch_invariant")
    text = "The history of the Roman Empire began when a small town on the Tiber"
    ids, other = (torch.tensor([smollm2.encode(t)]) for t in (text, "Dear Sir or Madam, I am writing"))
    length, paddings = ids.shape[1], (0, 1, 5)
    batch = ragged(ids, paddings)
    static = transformers.StaticCache(config=module.config, max_cache_len=length + 30)
    dynamic = transformers.DynamicCache(config=module.config)
    packed = torch.cat([other, ids], dim=1)
    positions = torch.cat([torch.arange(other.shape[1]), torch.arange(length)])[None]
    with torch.no_grad(), bicompile.eager():
        alone = module(ids).logits[0]
        found = {
            "company": module(**batch).logits,
            "chunks of 7": in_chunks(module, batch, static, itertools.repeat(7)),
            "decode": in_chunks(module, batch, dynamic, itertools.chain([length - 3], itertools.repeat(1))),
        }
        beside = module(packed, position_ids=positions, use_cache=False).logits[0, other.shape[1] :]
    assert same_bits(beside, alone)
    for way, logits in found.items():
        for padding, row in zip(paddings, unpadded(logits, paddings), strict=True):
            assert same_bits(row, alone[: len(row)]), f"{way}, {padding=}"
