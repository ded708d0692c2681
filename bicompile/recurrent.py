"""Recurrent layers and cells, step by step, from products and elementwise functions.

PyTorch has the same in ``torch._decomp``, and its layers are ours.  What stacks them there is not: it takes a fused op
of oneDNN where there is no gradient, and leaves out the dropout between layers.  Packed sequences have the bits of
padded ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._decomp import decompositions as steps
from torch._ops import OpOverload

aten = torch.ops.aten

_Layer = Callable[..., tuple[Tensor, Any]]
"""Of inputs, a hidden state, the parameters, whether there are biases, and ``reverse``: the outputs, the last state."""


def _stacked(
    layer: _Layer,
    x: Tensor,
    hidden: Sequence[Any],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    *,
    has_projections: bool = False,
) -> tuple[Tensor, list[Any]]:
    """The outputs of the last layer, and the last state of each layer and direction."""
    groups = steps.gather_params(params, has_biases, has_projections)
    ways = (False, True) if bidirectional else (False,)
    last: list[Any] = []
    for i in range(num_layers):
        if i and train and dropout:
            x = torch.dropout(x, dropout, True)
        outputs = []
        for way in ways:
            output, state = layer(x, hidden[len(last)], groups[len(last)], has_biases, reverse=way)
            outputs.append(output)
            last.append(state)
        x = torch.cat(outputs, -1)
    return x, last


def _lstm(layer: _Layer, x: Tensor, hx: Sequence[Tensor], params: Sequence[Tensor], *how: Any) -> Any:
    has_projections = hx[0].shape[2] != hx[1].shape[2]
    x, last = _stacked(layer, x, list(zip(*hx, strict=True)), params, *how, has_projections=has_projections)
    h, c = zip(*last, strict=True)
    return x, torch.stack(h), torch.stack(c)


def _rnn(layer: _Layer, x: Tensor, hx: Tensor, params: Sequence[Tensor], *how: Any) -> Any:
    x, last = _stacked(layer, x, hx.unbind(0), params, *how)
    return x, torch.stack(last)


def _padded(stack: Callable[..., Any], layer: _Layer) -> Callable[..., Any]:
    """As ``aten``'s ``.input`` overloads take it."""

    def run(x: Tensor, hx: Any, params: Sequence[Tensor], *how: Any) -> Any:
        *how_stacked, batch_first = how
        x, *last = stack(layer, x.transpose(0, 1) if batch_first else x, hx, params, *how_stacked)
        return x.transpose(0, 1) if batch_first else x, *last

    return run


def _packed(stack: Callable[..., Any], layer: _Layer) -> Callable[..., Any]:
    """As ``aten``'s ``.data`` overloads take it."""

    def run(x: Tensor, batch_sizes: Tensor, hx: Any, params: Sequence[Tensor], *how: Any) -> Any:
        return stack(functools.partial(layer, batch_sizes=batch_sizes.tolist()), x, hx, params, *how)

    return run


def _lstm_cell(
    x: Tensor,
    hx: Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    h, c = hx
    return steps.lstm_cell(F.linear(x, w_ih, b_ih), h, c, w_hh, b_hh, None, chunk_dim=1)


def _cell(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(
        x: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
    ) -> Tensor:
        return step(x, hx, w_ih, b_ih, w_hh, b_hh)

    return run


def _simple(function: Callable[[Tensor], Tensor]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    step = steps.rnn_cell(function), steps.rnn_cell_data(function)
    return (
        _padded(_rnn, functools.partial(steps.one_layer_rnn, hidden_fn=step[0])),
        _packed(_rnn, functools.partial(steps.one_layer_rnn_data, hidden_fn=step[1])),
    )


_TANH, _RELU = _simple(torch.tanh), _simple(torch.relu)

RECURRENT: dict[OpOverload, Callable[..., Any]] = {
    aten.lstm.input: _padded(_lstm, steps.one_layer_lstm),
    aten.lstm.data: _packed(_lstm, steps.one_layer_lstm_data),
    aten.gru.input: _padded(_rnn, functools.partial(steps.one_layer_rnn, hidden_fn=steps.gru_cell)),
    aten.gru.data: _packed(_rnn, functools.partial(steps.one_layer_rnn_data, hidden_fn=steps.gru_cell_data)),
    aten.rnn_tanh.input: _TANH[0],
    aten.rnn_tanh.data: _TANH[1],
    aten.rnn_relu.input: _RELU[0],
    aten.rnn_relu.data: _RELU[1],
    aten.lstm_cell.default: _lstm_cell,
    aten.gru_cell.default: _cell(steps.gru_cell_data),
    aten.rnn_tanh_cell.default: _cell(steps.rnn_cell_data(torch.tanh)),
    aten.rnn_relu_cell.default: _cell(steps.rnn_cell_data(torch.relu)),
}
"""Composite ops, and what each is made of."""
