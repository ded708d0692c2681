"""Dropout: the generator, and that a mask follows what it falls on, forward and backward, and not the batch."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from dropping import FORMS, ROWS, in_eager, run
from torch import Tensor, nn

import bicompile
from bicompile.dropout import RESOLUTION, is_kept, keys_of, threshold_of
from bicompile.lowering.attention import reference
from bicompile.testing import same_bits

WORD = (1 << 64) - 1


# --- the generator -------------------------------------------------------------------------------------------------


def mixed(z: int) -> int:
    """SplitMix64's output function, on Python's integers."""
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & WORD
    z = (z ^ z >> 27) * 0x94D049BB133111EB & WORD
    return z ^ z >> 31


def test_generator_is_splitmix64():
    assert mixed(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF  # the first output of SplitMix64 seeded with 0
    keys = torch.tensor([0, 1, -1, 2**62, -(2**63)])
    for place in (0, 1, 77, 2**31):
        numbers = [mixed(int(k) + 0x9E3779B97F4A7C15 * (place + 1) & WORD) >> 64 - RESOLUTION for k in keys]
        for p in (0.1, 0.5, 1.0):
            wanted = [number >= threshold_of(p) for number in numbers]
            assert is_kept(keys, torch.tensor(place), p).tolist() == wanted


@pytest.mark.optimised
def test_integers_wrap_around_in_compiled_code():
    """What the generator rests on: g++ takes it that scalar code never overflows, unless it is told otherwise."""

    def hashed(x: Tensor) -> Tensor:
        number = (torch.arange(4).view(4, 1) + 1) * 5
        return (number ^ number >> 3) * -4658895280553007687 + torch.arange(4)

    x = torch.empty(0)
    assert torch.equal(torch.compile(hashed, backend="batch_invariant")(x), hashed(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_share_of_what_is_kept(dtype: torch.dtype):
    """Within five standard deviations, in all, in each column, and of neighbours that are both kept."""
    x, n, p = torch.randn(1500, 400, generator=torch.Generator().manual_seed(0)).to(dtype), 600_000, 0.3
    kept = is_kept(keys_of(x), torch.arange(400), p).double()
    assert abs(kept.mean() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / n)
    assert (kept.mean(0) - (1 - p)).abs().max() < 5 * math.sqrt(p * (1 - p) / 1500)
    both = (1 - p) ** 2
    for a, b in ((kept[1:], kept[:-1]), (kept[:, 1:], kept[:, :-1])):
        assert abs((a * b).mean() - both) < 5 * math.sqrt(2 * both * (1 - both) / n)


# --- F.dropout and its kin -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_rows_keep_their_bits(form: str):
    function, shape = FORMS[form]
    dtype = torch.bfloat16 if form in ("in place", "dropout3d", "feature alpha") else torch.float32
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    compiled = torch.compile(function, backend="batch_invariant", dynamic=True)
    whole = run(compiled, x)
    assert same_bits(whole, in_eager(function, x))
    for rows in ROWS:
        assert same_bits(tuple(t[rows] for t in whole), run(compiled, x[rows]))
        assert same_bits(tuple(t[rows] for t in whole), in_eager(function, x[rows]))


@pytest.mark.parametrize("form", FORMS)
def test_another_call_drops_something_else(form: str):
    function, shape = FORMS[form]
    x = torch.randn(shape)
    with bicompile.eager():
        assert not torch.equal(function(x), function(x))


def test_values_are_those_of_dropout():
    x, normal, positive = torch.randn(50, 64), torch.randn(500, 400), torch.rand(8, 30, 3, 3) + 1
    with bicompile.eager():
        out = F.dropout(x, 0.25)
        assert torch.equal(out, torch.where(out == 0, 0.0, x * (1 / 0.75)))
        assert torch.equal(F.dropout(x, 0.25, training=False), x) and torch.equal(
            F.dropout2d(x[None, None], 0.0)[0, 0], x
        )
        assert not F.dropout(x, 1.0).any() and not F.alpha_dropout(x, 1.0, training=True).any()
        alpha = F.alpha_dropout(normal, 0.4, training=True)
        channels = F.dropout2d(positive, 0.5).flatten(2)
    assert abs(alpha.mean()) < 0.02 and abs(alpha.std() - 1) < 0.02
    assert ((channels == 0).all(-1) | (channels > 0).all(-1)).all() and (channels == 0).any()
    with pytest.raises(RuntimeError, match="at least 2 dim"), bicompile.eager():
        torch.feature_dropout(x[0], 0.5, True)


def test_a_row_keeps_its_mask_beside_any_padding():
    x = torch.randn(2, 5, 32)
    padded = F.pad(x, (0, 0, 3, 2))
    with bicompile.eager():
        torch.manual_seed(0)
        alone = F.dropout(x, 0.4)
        torch.manual_seed(0)
        assert same_bits(F.dropout(padded, 0.4)[:, 3:8], alone)


def test_dropout_is_lowered_and_named_in_no_refusal():
    compiled = torch.compile(lambda x: F.dropout(x, 0.5), backend="batch_invariant")
    certificate = bicompile.explain(compiled, torch.randn(4, 8))
    assert not certificate.refused


# --- attention -----------------------------------------------------------------------------------------------------


def attention(**options: object) -> Callable[..., Tensor]:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.3, **options)


def operands(dtype: torch.dtype = torch.float32, batch: int = 6, queries: int = 9, keys: int = 21) -> list[Tensor]:
    g = torch.Generator().manual_seed(2)
    shapes = ((batch, 4, queries, 16), (batch, 2, keys, 16), (batch, 2, keys, 10))
    return [torch.randn(shape, generator=g).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_rows_keep_their_bits(dtype: torch.dtype):
    function, inputs = attention(is_causal=True, enable_gqa=True), operands(dtype)
    compiled = torch.compile(function, backend="batch_invariant", dynamic=True)
    whole = run(compiled, *inputs)
    assert same_bits(whole, in_eager(function, *inputs))
    for rows in ROWS:
        assert same_bits(tuple(t[rows] for t in whole), run(compiled, *(x[rows] for x in inputs)))


@pytest.mark.parametrize("p", [0.3, 1.0])
@pytest.mark.parametrize("kind", ["causal", "boolean", "additive"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_attention_has_the_bits_of_the_reference(dtype: torch.dtype, kind: str, p: float):
    q, k, v = operands(dtype, batch=2, keys=70)
    shown = torch.rand(2, 1, 9, 70, generator=torch.Generator().manual_seed(3)) < 0.7
    shown[1, :, :, :33] = False
    shown[0, :, 4] = False
    biased = torch.randn(2, 4, 9, 70).to(dtype).masked_fill(~shown, -math.inf)
    mask = {"causal": None, "boolean": shown, "additive": biased}[kind]
    seeds = keys_of(q).squeeze(-1)
    ops, causal = torch.ops.bicompile, kind == "causal"
    out, lse = ops.sdpa(q, k, v, mask, causal, 0.2, None, seeds, p)
    assert same_bits(out, reference.sdpa(q, k, v, mask, causal, 0.2, seeds, p)[0])
    grad = torch.randn(out.shape).to(dtype)
    found = ops.sdpa_backward(grad, q, k, v, mask, out, lse, causal, 0.2, kind == "additive", seeds, p)
    *wanted, d_scores = reference.sdpa_backward(grad, q, k, v, mask, out, causal, 0.2, seeds, p)
    assert same_bits(found[:3], tuple(wanted))
    if kind == "additive":
        assert same_bits(found[3], d_scores.to(dtype))


def test_attention_drops_weights_and_not_their_sum():
    """Against the definition, and its gradients against those of PyTorch's own products and softmax."""
    q, k, v = operands(torch.float64, batch=2)
    torch.manual_seed(7)
    kept = is_kept(keys_of(q), torch.arange(21), 0.3)

    def definition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        return (q @ k.mT * 0.25).softmax(-1).where(kept, 0.0) / 0.7 @ v

    for found, wanted in zip(in_eager(attention(enable_gqa=True), q, k, v), run(definition, q, k, v), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    "options", [{"softcap": 3.0}, {"sinks": torch.randn(4)}, {}], ids=["softcap", "sinks", "plain"]
)
def test_attention_of_transformers_is_blind_to_left_padding(options: dict[str, object]):
    from bicompile.transformers.attention import attend

    q, k, v = operands()
    torch.manual_seed(0)
    alone = attend(q, k, v, torch.ones(1, 1, 9, 21, dtype=torch.bool), False, None, dropout=0.3, **options)
    torch.manual_seed(0)
    mask = F.pad(torch.ones(1, 1, 9, 21, dtype=torch.bool), (5, 0))
    k, v = (F.pad(t, (0, 0, 5, 0), value=3.0) for t in (k, v))
    assert same_bits(attend(q, k, v, mask, False, None, dropout=0.3, **options), alone)
    torch.manual_seed(1)
    assert not same_bits(attend(q, k, v, mask, False, None, dropout=0.3, **options), alone)


def test_sinks_with_dropout_have_the_gradients_of_their_definition():
    from bicompile.transformers.attention import attend

    q, k, v = operands(torch.float64, batch=2)
    sinks = torch.randn(4, dtype=torch.float64)
    torch.manual_seed(7)
    kept = is_kept(keys_of(q), torch.arange(21), 0.3)

    def definition(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        scores = torch.cat([q @ k.mT * 0.25, sinks.view(1, 4, 1, 1).expand(2, 4, 9, 1)], -1)
        return scores.softmax(-1)[..., :-1].where(kept, 0.0) / 0.7 @ v

    found = run(lambda q, k, v, s: attend(q, k, v, None, False, None, None, s, 0.3), q, k, v, sinks)
    for one, wanted in zip(found, run(definition, q, k, v, sinks), strict=True):
        torch.testing.assert_close(one, wanted)


# --- models --------------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """Embeds, attends with dropout, and pools."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, dropout=0.2, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        attended, _ = self.attention(x, x, x, need_weights=False)
        return self.head(F.dropout(attended, 0.1, self.training).mean(1))


def test_a_model_trains_with_dropout_row_by_row():
    torch.manual_seed(0)
    model, x = Classifier().train(), torch.randn(6, 7, 16)
    compiled = torch.compile(model, backend="batch_invariant", dynamic=True)
    whole, rows = run(compiled, x), [3, 0, 5]
    assert same_bits(tuple(t[rows] for t in whole), run(compiled, x[rows]))
    assert same_bits(whole, in_eager(model, x))
    assert not same_bits(whole[0], in_eager(model.eval(), x)[0])


def test_checkpointing_draws_the_same_masks_again():
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    model, x = Classifier().train(), torch.randn(3, 7, 16)
    plain = in_eager(model, x)
    assert same_bits(in_eager(lambda x: checkpoint(model, x, use_reentrant=False), x), plain)


def test_dropout_under_vmap_is_refused_by_name():
    """PyTorch has a rule of its own there, which draws a mask for each element."""
    x = torch.randn(5, 16)
    with bicompile.eager(), pytest.raises(bicompile.UnsupportedOpError, match="bernoulli"):
        torch.func.vmap(lambda row: F.dropout(row, 0.5), randomness="different")(x)


@pytest.mark.parametrize("attention", ["sdpa", "batch_invariant"])
def test_models_of_transformers_train_with_dropout_beside_any_padding(attention: str):
    from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

    import bicompile.transformers  # noqa: F401  # registers the attention

    gpt = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=99, bos_token_id=1, eos_token_id=1)
    bert = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=99)
    tokens = torch.randint(3, 99, (5, 12), generator=torch.Generator().manual_seed(0))
    seen = torch.ones_like(tokens)
    seen[2, 8:] = 0
    for model in (GPT2LMHeadModel(gpt).train(), BertModel(bert).train()):
        model.set_attn_implementation(attention)

        def run(rows: list[int], length: int = 12, model: nn.Module = model) -> Tensor:
            torch.manual_seed(4)
            with bicompile.eager():
                return model(input_ids=tokens[rows, :length], attention_mask=seen[rows, :length])[0].detach()

        whole = run([0, 1, 2, 3, 4])
        assert same_bits(run([2, 0]), whole[[2, 0]])
        assert same_bits(run([2], 8)[0], whole[2, :8])
        model.eval()
        assert not same_bits(run([0, 1, 2, 3, 4]), whole)
