"""``nn.MultiheadAttention`` and ``nn.Transformer*``, compiled and in eager mode, where PyTorch has fused paths."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import bicompile
from bicompile.testing import same_bits

WIDTH, HEADS, LENGTH = 64, 4, 9
LENGTHS = torch.tensor([9, 3, 7, 7, 1])  # tokens in each row


@pytest.fixture
def ordinary_path() -> Iterator[None]:
    """PyTorch's own switch, for the whole process."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


def _rows() -> tuple[Tensor, Tensor]:
    """``[5, LENGTH, WIDTH]``, and True where a row has no token."""
    x = torch.randn(5, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0))
    return x, torch.arange(LENGTH) >= LENGTHS[:, None]


def _attention() -> nn.MultiheadAttention:
    torch.manual_seed(0)
    return nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).eval()


WEIGHTS = [
    {"need_weights": False},
    {"need_weights": True},
    {"need_weights": True, "average_attn_weights": False},
]


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("weights", WEIGHTS, ids=["none", "mean", "each"])
def test_attention_and_its_weights_keep_a_rows_bits(weights: dict[str, bool], padded: bool):
    module, (x, empty) = _attention(), _rows()
    with torch.no_grad(), bicompile.eager():
        whole = module(x, x, x, key_padding_mask=empty if padded else None, **weights)
        row = x[1:2]
        alone = module(row, row, row, key_padding_mask=empty[1:2] if padded else None, **weights)
    assert same_bits(alone[0][0], whole[0][1])
    assert not weights["need_weights"] or same_bits(alone[1][0], whole[1][1])


@pytest.mark.parametrize("weights", WEIGHTS[1:], ids=["mean", "each"])
def test_fused_path_has_the_bits_of_the_ordinary_one(weights: dict[str, bool], request: pytest.FixtureRequest):
    module, (x, empty) = _attention(), _rows()
    with torch.no_grad(), bicompile.eager():
        fused = module(x, x, x, key_padding_mask=empty, **weights)
        request.getfixturevalue("ordinary_path")
        assert same_bits(module(x, x, x, key_padding_mask=empty, **weights), fused)


def test_encoder_keeps_a_padded_batch_and_does_not_see_the_padding():
    """Left aligned padding makes a nested tensor of the batch in stock PyTorch."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 200, batch_first=True)
    module, (x, empty) = nn.TransformerEncoder(layer, num_layers=2).eval(), _rows()
    with torch.no_grad(), bicompile.eager():
        whole = module(x, src_key_padding_mask=empty)
        alone = module(x[1:2], src_key_padding_mask=empty[1:2])
        shorter = module(x[1:2, :4], src_key_padding_mask=empty[1:2, :4])
    assert same_bits(alone[0, :3], whole[1, :3]) and same_bits(shorter[0, :3], whole[1, :3])


def test_causal_decoder_keeps_a_rows_bits():
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 200, batch_first=True)
    module, (x, _) = nn.TransformerDecoder(layer, num_layers=1).eval(), _rows()
    causal = nn.Transformer.generate_square_subsequent_mask(LENGTH)
    with torch.no_grad(), bicompile.eager():
        whole = module(x, x, tgt_mask=causal, tgt_is_causal=True)
        assert same_bits(module(x[1:2], x[1:2], tgt_mask=causal, tgt_is_causal=True)[0], whole[1])


def test_compiled_transformer_has_the_bits_of_eager_and_keeps_a_rows():
    """Encoder, decoder and their attention, with and without the fused paths that inference takes."""
    module, causal = _transformer()
    x, empty = _rows()

    def run(rows: Tensor, empty: Tensor) -> Tensor:
        masks = {"src_key_padding_mask": empty, "memory_key_padding_mask": empty}
        return module(rows, rows, tgt_mask=causal, tgt_is_causal=True, **masks)

    compiled = torch.compile(run, backend="batch_invariant", dynamic=True, fullgraph=True)
    with torch.no_grad():
        whole = compiled(x, empty)
        assert same_bits(compiled(x[1:4], empty[1:4]), whole[1:4])
        with bicompile.eager():
            assert same_bits(run(x, empty), whole)
    with bicompile.eager():
        assert same_bits(run(x, empty).detach(), whole)


def test_mask_that_pytorch_looks_into_breaks_the_graph_and_eager_around_it_covers_the_rest():
    """Without ``tgt_is_causal`` the decoder asks its mask's values, and Dynamo compiles nothing more of torch.nn."""
    module, causal = _transformer()
    x, _ = _rows()
    compiled = torch.compile(lambda rows: module(rows, rows, tgt_mask=causal), backend="batch_invariant")
    with torch.no_grad(), bicompile.eager():
        whole = module(x, x, tgt_mask=causal, tgt_is_causal=True)
        assert same_bits(compiled(x), whole) and same_bits(compiled(x[1:2]), whole[1:2])
    assert not bicompile.explain(compiled, x).ok


def _transformer() -> tuple[nn.Transformer, Tensor]:
    """A layer of each kind, and a causal mask."""
    torch.manual_seed(0)
    module = nn.Transformer(WIDTH, HEADS, 1, 1, 200, batch_first=True).eval()
    return module, nn.Transformer.generate_square_subsequent_mask(LENGTH)


@pytest.mark.parametrize("weights", WEIGHTS, ids=["none", "mean", "each"])
def test_compiled_attention_has_the_bits_of_eager(weights: dict[str, bool]):
    module, (x, empty) = _attention(), _rows()
    compiled = torch.compile(module, backend="batch_invariant", dynamic=True)
    with torch.no_grad():
        found = compiled(x, x, x, key_padding_mask=empty, **weights)
        with bicompile.eager():
            assert same_bits(found, module(x, x, x, key_padding_mask=empty, **weights))
    assert weights["need_weights"] or found[1] is None
