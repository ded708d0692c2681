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
from transformers_zoo import CAUSAL, in_chunks, padded, tokens

import bicompile
from bicompile.sampling import SeededSampler, philox
from bicompile.testing import same_bits
from bicompile.transformers.attention import attend

LENGTH = 600  # more than one split of keys


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


@pytest.mark.parametrize("name", ["llama", "gpt-oss"])
def test_logits_are_the_same_over_batches_padding_chunks_and_caches(name: str):
    module, ids = CAUSAL[name].build(torch.bfloat16).cuda(), tokens(3, LENGTH).cuda()
    with torch.no_grad(), bicompile.eager():
        plain = module(ids).logits
        assert same_bits(module(ids[1:2]).logits, plain[1:2])
        assert same_bits(module(ids.flip(0)).logits, plain.flip(0))
        for padding, side in [(1, "left"), (70, "left"), (5, "right")]:
            batch = _on_gpu(padded(ids.cpu(), padding, side))
            logits = module(**batch).logits
            seen = logits[:, padding:] if side == "left" else logits[:, :LENGTH]
            assert same_bits(seen, plain), f"{padding=} {side=}"
        batch = _on_gpu(padded(ids.cpu(), 3))
        caches: list[Any] = [
            transformers.DynamicCache(config=module.config),
            transformers.StaticCache(config=module.config, max_cache_len=LENGTH + 60),
        ]
        for cache in caches:
            sizes = itertools.chain([300, 290], itertools.repeat(1))
            assert same_bits(in_chunks(module, batch, cache, sizes)[:, 3:], plain), type(cache).__name__


def test_sampler_draws_the_bits_it_draws_on_a_cpu_and_rows_draw_alone():
    seeds, positions = torch.tensor([1, -2, 2**40]), torch.tensor([0, 3, 2**33])
    assert same_bits(philox(seeds.cuda(), positions.cuda(), 50).cpu(), philox(seeds, positions, 50))
    scores, ids = torch.randn(3, 3001, device="cuda"), torch.zeros(3, 4, device="cuda")
    whole = SeededSampler([1, 2, 3], temperature=0.8, top_p=0.9)(ids, scores)
    alone = SeededSampler([2], temperature=0.8, top_p=0.9)(ids[1:2], scores[1:2])
    assert same_bits(alone, whole[1:2])
