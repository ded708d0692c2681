"""Recurrent layers and cells: rows, packed sequences, gradients, dropout between layers, and compiled code."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import bicompile
from bicompile.testing import same_bits

LAYERS: dict[str, Callable[..., nn.RNNBase]] = {
    "lstm": nn.LSTM,
    "projected": lambda *sizes, **how: nn.LSTM(*sizes, proj_size=5, **how),
    "gru": nn.GRU,
    "tanh": nn.RNN,
    "relu": lambda *sizes, **how: nn.RNN(*sizes, nonlinearity="relu", **how),
}
CELLS: dict[str, type[nn.Module]] = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn": nn.RNNCell}
LENGTHS = [6, 3, 1, 5]


def layer_of(name: str, **how: object) -> nn.RNNBase:
    torch.manual_seed(0)
    return LAYERS[name](12, 8, num_layers=2, bidirectional=True, batch_first=True, **how)


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, 6, 12, generator=torch.Generator().manual_seed(1)).to(dtype)


def outputs_of(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """The outputs, the last states, and the gradient of the input."""
    x = x.clone().requires_grad_()
    out, states = layer(x)
    states = states if isinstance(states, tuple) else (states,)
    (grad,) = torch.autograd.grad(sum((y * y.detach()).sum() for y in (out, *states)), x)
    return [out.detach(), grad, *(s.detach().transpose(0, 1) for s in states)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", LAYERS)
def test_rows_keep_their_bits(name: str, dtype: torch.dtype):
    layer, x = layer_of(name).to(dtype), inputs(dtype)
    with bicompile.eager():
        whole = outputs_of(layer, x)
        for rows in ([2], [3, 0, 1]):
            assert same_bits(outputs_of(layer, x[rows]), [t[rows] for t in whole])
        with torch.no_grad():
            assert same_bits(layer(x)[0], whole[0])
        with torch.inference_mode():
            assert same_bits(layer(x)[0], whole[0])


@pytest.mark.parametrize("name", LAYERS)
def test_values_and_gradients_are_those_of_pytorch(name: str):
    layer, x = layer_of(name).double(), inputs(torch.float64)
    with bicompile.eager():
        ours = outputs_of(layer, x)
    torch.testing.assert_close(ours, outputs_of(layer, x))


@pytest.mark.parametrize("name", LAYERS)
def test_packed_sequences_have_the_bits_of_each_alone(name: str):
    layer, x = layer_of(name), inputs()
    with bicompile.eager():
        packed = pack_padded_sequence(x, torch.tensor(LENGTHS), batch_first=True, enforce_sorted=False)
        out, states = layer(packed)
        padded, _ = pad_packed_sequence(out, batch_first=True)
        last = states[0] if isinstance(states, tuple) else states
        for row, length in enumerate(LENGTHS):
            alone, states = layer(x[row : row + 1, :length])
            assert same_bits(padded[row, :length], alone[0])
            assert same_bits(last[:, row], (states[0] if isinstance(states, tuple) else states)[:, 0])


@pytest.mark.parametrize("name", CELLS)
def test_cells_keep_rows_and_agree_with_layers(name: str):
    cell, x = CELLS[name](12, 8), inputs()
    layer = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}[name](12, 8, batch_first=True)
    for parameter in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        getattr(layer, f"{parameter}_l0").data.copy_(getattr(cell, parameter).data)
    with torch.no_grad(), bicompile.eager():
        whole, state = layer(x)[0], None
        for step in range(x.shape[1]):
            state = cell(x[:, step], state)
            assert same_bits(state[0] if name == "lstm" else state, whole[:, step])
        assert same_bits(cell(x[2:3, 0])[0], cell(x[:, 0])[0][2:3] if name == "lstm" else cell(x[:, 0])[2])


def test_dropout_between_layers_drops():
    """PyTorch's own decomposition forgets it."""
    layer, x = layer_of("lstm", dropout=0.5).train(), inputs()

    def run(x: Tensor, seed: int = 0) -> Tensor:
        torch.manual_seed(seed)
        return layer(x)[0]

    with torch.no_grad(), bicompile.eager():
        whole = run(x)
        assert same_bits(run(x[[3, 1]]), whole[[3, 1]])
        assert not same_bits(run(x, seed=1), whole)
        layer.eval()
        assert not same_bits(run(x), whole)


@pytest.mark.parametrize("name", ["lstm", "gru"])
@torch._dynamo.config.patch(allow_rnn=True)
def test_compiled_layers_have_the_bits_of_eager(name: str):
    layer, x = layer_of(name), inputs()[:, :2]
    compiled = torch.compile(copy.deepcopy(layer), backend="batch_invariant", fullgraph=True)
    with bicompile.eager():
        expected = outputs_of(layer, x)
    assert same_bits(outputs_of(compiled, x), expected)
    with torch.no_grad():
        assert same_bits(compiled(x[1:2])[0], expected[0][1:2])


def test_explain_says_that_dynamo_leaves_layers_out():
    certificate = bicompile.explain(layer_of("gru"), inputs())
    assert not certificate.ok
    assert any("allow_rnn" in reason for reason in certificate.graph_breaks)
