"""The attention function: what it computes, its gradients, and how transformers comes to know it."""

from __future__ import annotations

import importlib
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

import transformers
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from transformers_zoo import CAUSAL, padded, tokens

import bicompile
from bicompile.testing import same_bits
from bicompile.transformers.attention import attend, attention_forward
from bicompile.transformers.registration import register_on_import

HEADS, KV_HEADS, DEPTH = 4, 2, 16


def _heads(queries: int, keys: int, dtype: torch.dtype = torch.float32, batch: int = 2, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, HEADS, queries, DEPTH)] + 2 * [(batch, KV_HEADS, keys, DEPTH)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def _plainly(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """The textbook formula, as transformers' eager attention has it."""
    key, value = (t.repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (key, value))
    scores = query @ key.transpose(2, 3) * DEPTH**-0.5
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    weights = scores.softmax(-1)[..., : key.shape[2]]
    return weights @ value


@pytest.mark.parametrize("softcap", [None, 2.0], ids=["plain", "capped"])
@pytest.mark.parametrize("with_sinks", [False, True], ids=["", "sinks"])
def test_values_and_gradients_are_those_of_the_formula(softcap: float | None, with_sinks: bool):
    inputs = [t.double() for t in _heads(5, 9)]
    mask = torch.ones(5, 9, dtype=torch.bool).tril(4)
    inputs += [torch.randn(HEADS, dtype=torch.float64)] if with_sinks else []

    def run(formula) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in inputs]
        q, k, v, *sinks = leaves
        with bicompile.eager():
            out = formula(q, k, v, sinks[0] if sinks else None)
            out.backward(torch.arange(out.numel(), dtype=out.dtype).view(out.shape).cos())
        return [out.detach(), *(leaf.grad for leaf in leaves)]

    ours = run(lambda q, k, v, sinks: attend(q, k, v, mask, False, None, softcap, sinks))
    theirs = run(lambda q, k, v, sinks: _plainly(q, k, v, mask, softcap, sinks))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("softcap", [None, 3.0], ids=["plain", "capped"])
@pytest.mark.parametrize("with_sinks", [False, True], ids=["", "sinks"])
def test_rows_queries_and_padding_do_not_matter(dtype: torch.dtype, softcap: float | None, with_sinks: bool):
    """Traps 7 and 8: one query, and any number of queries beside it, have the same bits."""
    keys = 250
    query, key, value = _heads(keys, keys, dtype)
    sinks = torch.randn(HEADS, generator=torch.Generator().manual_seed(1)).to(dtype) if with_sinks else None
    causal = torch.ones(keys, keys, dtype=torch.bool).tril()
    with bicompile.eager():
        whole = attend(query, key, value, causal, False, None, softcap, sinks)
        assert same_bits(attend(query, key, value, None, True, None, softcap, sinks), whole)
        for first, last in [(249, 250), (200, 250), (191, 193), (0, 7), (33, 98)]:  # the last q tiles are ragged
            part = query[:, :, first:last]
            assert same_bits(
                attend(part, key, value, causal[first:last], False, None, softcap, sinks), whole[:, :, first:last]
            )
        # Trailing slots and leading padding, both with garbage in them.
        junk = torch.full_like(key[:, :, :40], float("nan"))
        long_key, long_value = (torch.cat([junk, t, junk], dim=2) for t in (key, value))
        seen = F.pad(causal, (40, 40))
        assert same_bits(attend(query, long_key, long_value, seen, False, None, softcap, sinks), whole)
        assert same_bits(attend(query[1:], key[1:], value[1:], causal, False, None, softcap, sinks), whole[1:])


@pytest.mark.parametrize("softcap", [None, 3.0], ids=["plain", "capped"])
@pytest.mark.parametrize("with_sinks", [False, True], ids=["", "sinks"])
def test_row_that_sees_no_key_gives_zeros(softcap: float | None, with_sinks: bool):
    """Trap 19."""
    query, key, value = _heads(4, 6)
    sinks = torch.randn(HEADS) if with_sinks else None
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[2] = False
    with bicompile.eager():
        out = attend(query, key, value, mask, False, None, softcap, sinks)
    assert out.isfinite().all()
    assert not out[:, :, 2].any() and out[:, :, [0, 1, 3]].all()


def test_padded_queries_of_a_model_are_finite():
    """Trap 19, in a model: left padding makes query rows that see nothing."""
    for name in ("llama", "gpt-oss", "gemma2"):
        module, batch = CAUSAL[name].build(), padded(tokens(2, 5), 7)
        with torch.no_grad(), bicompile.eager():
            assert module(**batch).logits.isfinite().all(), name


def test_position_biases_are_added_and_causal_where_there_is_no_mask():
    query, key, value = _heads(6, 6)
    bias = torch.randn(1, HEADS, 6, 6)
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    layer = torch.nn.Module()
    layer.is_causal = True  # type: ignore[assignment]
    with bicompile.eager():
        unmasked, _ = attention_forward(layer, query, key, value, None, position_bias=bias)
        masked, _ = attention_forward(layer, query, key, value, causal[None, None], position_bias=bias)
        additive = torch.zeros(6, 6).masked_fill(~causal, float("-inf"))
        added, _ = attention_forward(layer, query, key, value, additive[None, None], position_bias=bias)
        plain, _ = attention_forward(layer, query, key, value, None)
        # The slots of a static cache behind a prefill are cut off, those of the bias too.
        longer = [F.pad(t, (0, 0, 0, 3)) for t in (key, value)]
        cut, _ = attention_forward(layer, query, *longer, None, position_bias=F.pad(bias, (0, 3)))
    assert same_bits(unmasked, masked) and same_bits(added, masked) and same_bits(cut, masked)
    assert not same_bits(plain, masked)
    assert masked.shape == (2, 6, HEADS, DEPTH) and masked.is_contiguous()


def test_autocast_casts_what_the_projections_and_rotary_embeddings_left_wide():
    q, k, v = _heads(3, 3)
    half = [t.bfloat16() for t in (q, k, v)]
    for settings in ({}, {"softcap": 2.0}, {"s_aux": torch.zeros(HEADS)}):
        expected = attention_forward(torch.nn.Module(), *half, None, **settings)[0]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = attention_forward(torch.nn.Module(), q, k, half[2], None, **settings)[0]
        assert same_bits(got, expected)


@pytest.mark.parametrize("name", ["llama", "gpt-oss", "gemma2"])
def test_dropout_of_a_row_is_the_same_alone_and_beside_padding(name: str):
    """Plain attention, sinks, and soft caps, in a model that trains."""
    module, batch = CAUSAL[name].build().train(), tokens(3, 5)
    for layer in module.modules():
        if hasattr(layer, "attention_dropout"):
            layer.attention_dropout = 0.3

    def run(**inputs: Tensor) -> Tensor:
        torch.manual_seed(7)
        with torch.no_grad(), bicompile.eager():
            return module(**inputs).logits

    whole = run(input_ids=batch)
    assert same_bits(run(input_ids=batch[1:2]), whole[1:2])
    assert same_bits(run(**padded(batch, 7))[:, 7:], whole)
    module.eval()
    assert not same_bits(run(input_ids=batch), whole)


def test_attention_alone_is_covered_outside_of_eager():
    """The name by itself makes attention invariant; the rest of the model takes eager() or the backend."""
    query, key, value = _heads(200, 200)
    layer = torch.nn.Module()
    whole, _ = attention_forward(layer, query, key, value, None, s_aux=torch.ones(HEADS))
    last = torch.ones(1, 200, dtype=torch.bool)
    alone, _ = attention_forward(layer, query[1:, :, -1:], key[1:], value[1:], last, s_aux=torch.ones(HEADS))
    assert same_bits(alone, whole[1:, -1:])


def test_capped_and_sunk_attention_compiles_to_the_bits_of_eager():
    query, key, value = _heads(70, 70)
    sinks = torch.randn(HEADS)
    mask = torch.ones(70, 70, dtype=torch.bool).tril()

    def run(q: Tensor, k: Tensor, v: Tensor, m: Tensor, s: Tensor) -> Tensor:
        return attention_forward(torch.nn.Module(), q, k, v, m, softcap=3.0, s_aux=s)[0]

    with bicompile.eager():
        eager = run(query, key, value, mask, sinks)
    assert same_bits(
        torch.compile(run, backend="batch_invariant", fullgraph=True)(query, key, value, mask, sinks), eager
    )


def _flexible(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return flex_attention(query, key, value, score_mod=lambda score, b, h, q, k: score + (q - k))


def test_flex_attention_is_refused_by_name():
    """Its kernels' order is their own; compiled and eager code both say so."""
    query = torch.randn(1, 2, 64, 16)
    refused = pytest.raises(bicompile.UnsupportedOpError, match="flex_attention")
    with torch.no_grad(), refused:
        torch.compile(_flexible, backend="batch_invariant")(query, query, query)
    with bicompile.eager(), warnings.catch_warnings(), refused:
        warnings.simplefilter("ignore")  # it would rather be compiled
        _flexible(query, query, query)


# Registration.

CHECK = """
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import AttentionInterface
config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
model = LlamaForCausalLM._from_config(config, attn_implementation="batch_invariant")
print(model.config._attn_implementation, "paged|batch_invariant" in AttentionInterface())
"""
WATCHED = """
import inspect, sys
before = list(sys.meta_path)
import bicompile
assert "transformers" not in sys.modules
import transformers.modeling_utils as module
assert sys.meta_path == before, sys.meta_path
loader = module.__spec__.loader
assert loader.exec_module.__func__ is type(loader).exec_module
assert "class AttentionInterface" in inspect.getsource(module)
"""


def _python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_name_is_known_when_transformers_comes_later_and_the_import_system_is_as_it_was():
    assert _python(WATCHED + CHECK) == "batch_invariant True"


def test_an_older_transformers_warns_and_stays_importable(monkeypatch: pytest.MonkeyPatch):
    importlib.import_module("transformers.modeling_utils")
    monkeypatch.setitem(sys.modules, "transformers.masking_utils", None)
    with pytest.warns(UserWarning, match="older than 5"):
        register_on_import()


def test_name_is_known_when_transformers_was_first():
    code = "import transformers.modeling_utils, bicompile; bicompile.transformers.register()"
    assert _python(code + CHECK) == "batch_invariant True"


SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 20}
OF_THEIR_OWN = {  # the first would add a boolean mask to its scores, the second has no class by our name
    "MPNetModel": lambda: transformers.MPNetConfig(**SIZES, intermediate_size=40),
    "FalconModel": lambda: transformers.FalconConfig(**SIZES),
}


@pytest.mark.parametrize("kind", OF_THEIR_OWN)
def test_models_with_attention_of_their_own_do_not_take_the_name(kind: str):
    config, model = OF_THEIR_OWN[kind](), getattr(transformers, kind)
    assert model(config) is not None
    config._attn_implementation = "batch_invariant"
    with pytest.raises(ValueError, match=f"{kind} computes attention, if any, in code of its own"):
        model(config)
