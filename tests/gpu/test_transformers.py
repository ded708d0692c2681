"""Transformers' models on a GPU: logits over batches, padding, chunks and caches; the attention function; sampling."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

import transformers
from torch import Tensor
from transformers import CompileConfig
from transformers_zoo import (
    CAUSAL,
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
from bicompile.sampling import SeededSampler, philox
from bicompile.testing import same_bits
from bicompile.transformers import cover
from bicompile.transformers.attention import attend

LENGTH = 600  # more than one split of keys
PADDINGS = (0, 1, 3, 7, 31, 40, 64, 69, 70)
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def _on_gpu(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.cuda() for name, t in batch.items()}


@pytest.mark.parametrize(
    ("kind", "dtype"), [("plain", torch.bfloat16), ("capped", torch.float16), ("sinks", torch.float16)], ids=str
)
def test_attention_keeps_its_bits_over_queries_padding_and_rows(kind: str, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, h, LENGTH, 64, generator=generator).to("cuda", dtype) for h in (4, 2, 2))
    softcap = 3.0 if kind == "capped" else None
    sinks = torch.randn(4, generator=generator).to("cuda", dtype) if kind == "sinks" else None
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device="cuda").tril()
    with bicompile.eager():
        whole = attend(query, key, value, causal, False, None, softcap, sinks)
        assert same_bits(attend(query, key, value, None, True, None, softcap, sinks), whole)
        for first, last in [(LENGTH - 1, LENGTH), (511, 514), (0, 7), (100, 230)]:
            part = attend(query[:, :, first:last], key, value, causal[first:last], False, None, softcap, sinks)
            assert same_bits(part, whole[:, :, first:last]), f"{first=} {last=}"
        junk = torch.full_like(key[:, :, :40], float("nan"))
        long_key, long_value = (torch.cat([junk, t, junk], dim=2) for t in (key, value))
        assert same_bits(
            attend(query, long_key, long_value, F.pad(causal, (40, 40)), False, None, softcap, sinks), whole
        )
        assert same_bits(attend(query[1:], key[1:], value[1:], causal, False, None, softcap, sinks), whole[1:])


@each_dtype
@pytest.mark.parametrize("name", CAUSAL)
def test_logits_are_the_same_over_batches_padding_packing_chunks_and_caches(name: str, dtype: torch.dtype):
    """Traps 6, 7, 8 and 18.  Nine rows, padded unequally."""
    module, ids = CAUSAL[name].build(dtype).cuda(), tokens(1, LENGTH).cuda()
    with torch.no_grad(), bicompile.eager():
        plain = module(ids).logits[0]
        for side in ("left", "right"):
            batch = ragged(ids, PADDINGS, side)
            _assert_each_row(module(**batch).logits, plain, side)
            part = {key: t[2:3] for key, t in batch.items()}
            alone = unpadded(module(**part).logits, PADDINGS[2:3], side)[0]
            assert same_bits(alone, plain[: len(alone)]), side
        batch = ragged(ids, PADDINGS)
        for kind in ("dynamic", "full", "static"):
            if kind == "static":
                cache: Any = transformers.StaticCache(config=module.config, max_cache_len=LENGTH + 60)
            else:
                cache = transformers.DynamicCache(config=module.config if kind == "dynamic" else None)
            sizes = itertools.chain([300, 64, 220, 7], itertools.repeat(1))
            _assert_each_row(in_chunks(module, batch, cache, sizes), plain)
        packed, positions = torch.cat([ids[:, :250], ids], dim=1), [torch.arange(n) for n in (250, LENGTH)]
        logits = module(packed, position_ids=torch.cat(positions)[None].cuda(), use_cache=False).logits[0]
        assert same_bits(logits[:250], plain[:250]) and same_bits(logits[250:], plain)


def _assert_each_row(logits: Tensor, plain: Tensor, side: str = "left") -> None:
    """Of a ``ragged`` batch."""
    for padding, row in zip(PADDINGS, unpadded(logits, PADDINGS, side), strict=True):
        assert same_bits(row, plain[: len(row)]), f"{padding=} {side=}"


@each_dtype
def test_bert_keeps_its_bits_over_batches_and_padding(dtype: torch.dtype):
    module, ids = bert(dtype).cuda(), tokens(9, LENGTH)
    with torch.no_grad(), bicompile.eager():
        whole = module(ids.cuda()).last_hidden_state
        assert same_bits(module(ids[3:5].cuda()).last_hidden_state, whole[3:5])
        for padding in (1, 70):
            left = module(**_on_gpu(padded(ids, padding))).last_hidden_state[:, padding:]
            right = module(**_on_gpu(padded(ids, padding, "right"))).last_hidden_state[:, :LENGTH]
            assert same_bits(left, whole) and same_bits(right, whole), f"{padding=}"


@each_dtype
def test_t5_keeps_its_bits_with_padding_at_the_encoder_and_in_chunks(dtype: torch.dtype):
    module, asked, said = t5(dtype).cuda(), tokens(9, LENGTH), tokens(9, 24, seed=2).cuda()
    with torch.no_grad(), bicompile.eager():
        plain = module(input_ids=asked.cuda(), decoder_input_ids=said).logits
        assert same_bits(module(input_ids=asked[3:5].cuda(), decoder_input_ids=said[3:5]).logits, plain[3:5])
        for side, padding in (("left", 70), ("right", 5)):
            batch = _on_gpu(padded(asked, padding, side))
            del batch["position_ids"]
            again = {"encoder_outputs": module.encoder(**batch), "attention_mask": batch["attention_mask"]}
            for kind, cache in encoder_caches(module.config, 30, LENGTH + padding).items():
                steps = itertools.chain([16], itertools.repeat(1))
                logits = decoded(module, {"decoder_input_ids": said}, again, cache, steps)
                assert same_bits(logits, plain), f"{side=} {padding=} {kind=}"


@each_dtype
def test_whisper_decoder_keeps_its_bits_over_batches_padding_chunks_and_caches(dtype: torch.dtype):
    module, said = whisper(LENGTH, dtype).cuda(), tokens(9, 40)
    heard = torch.randn(9, LENGTH, 64, generator=torch.Generator().manual_seed(3)).to("cuda", dtype)
    with torch.no_grad(), bicompile.eager():
        plain = module(encoder_outputs=(heard,), decoder_input_ids=said.cuda()).logits
        alone = module(encoder_outputs=(heard[3:5],), decoder_input_ids=said[3:5].cuda()).logits
        assert same_bits(alone, plain[3:5])
        for padding, chunk in ((0, 7), (70, 64), (3, 5)):
            batch = {f"decoder_{name}": t for name, t in _on_gpu(padded(said, padding)).items()}
            for kind, cache in encoder_caches(module.config, 120, LENGTH).items():
                logits = decoded(module, batch, {"encoder_outputs": (heard,)}, cache, itertools.repeat(chunk))
                assert same_bits(logits[:, padding:], plain), f"{padding=} {chunk=} {kind=}"


def test_smollm2_has_the_same_logits_prefilled_decoded_padded_and_in_company():
    from bicompile.demo.models import DemoError, subject

    try:
        smollm2 = subject("smollm2", print)
    except DemoError as error:
        pytest.skip(str(error))
    module = smollm2.load(torch.bfloat16).cuda()
    module.set_attn_implementation("batch_invariant")
    ids = torch.tensor([smollm2.encode("The history of the Roman Empire began when a small town on the Tiber " * 12)])
    ids, paddings = ids[:, :150].cuda(), (0, 1, 70)
    batch = ragged(ids, paddings)
    with torch.no_grad(), bicompile.eager():
        plain = module(ids).logits[0]
        steps = itertools.chain([140], itertools.repeat(1))
        cache = transformers.DynamicCache(config=module.config)
        for logits in (module(**batch).logits, in_chunks(module, batch, cache, steps)):
            for row in unpadded(logits, paddings):
                assert same_bits(row, plain[: len(row)])


def test_generate_says_the_same_in_company_with_an_assistant_and_with_compiled_decode_steps():
    """``compile_config``'s own mode captures CUDA graphs."""
    module, assistant = (cover(CAUSAL["llama"].build(torch.bfloat16, seed=seed).cuda()) for seed in (0, 5))
    batch = {name: t for name, t in ragged(tokens(1, 40).cuda(), (0, 3, 17)).items() if name != "position_ids"}

    def said(rows: slice, **settings: Any) -> Tensor:
        part = {name: t[rows] for name, t in batch.items()}
        return module.generate(**part, max_new_tokens=12, do_sample=False, **settings)[:, 40:]

    together = said(slice(0, 3))
    assert len(set(together[0].tolist())) > 3  # a model that repeats one token shows nothing
    assert same_bits(said(slice(1, 2)), together[1:2])
    assert same_bits(said(slice(2, 3), assistant_model=assistant), together[2:3])
    assert same_bits(said(slice(0, 3), cache_implementation="static", disable_compile=True), together)
    compiled = {"cache_implementation": "static", "compile_config": CompileConfig(backend="batch_invariant")}
    assert same_bits(said(slice(0, 3), **compiled), together)


def test_sampler_draws_the_bits_it_draws_on_a_cpu_and_rows_draw_alone():
    seeds, positions = torch.tensor([1, -2, 2**40]), torch.tensor([0, 3, 2**33])
    assert same_bits(philox(seeds.cuda(), positions.cuda(), 50).cpu(), philox(seeds, positions, 50))
    scores, ids = torch.randn(3, 3001, device="cuda"), torch.zeros(3, 4, device="cuda")
    whole = SeededSampler([1, 2, 3], temperature=0.8, top_p=0.9)(ids, scores)
    alone = SeededSampler([2], temperature=0.8, top_p=0.9)(ids[1:2], scores[1:2])
    assert same_bits(alone, whole[1:2])
