"""A graph break raises: what Dynamo leaves to eager PyTorch would follow the batch without a word."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import bicompile
from bicompile.testing import same_bits


def _in_the_middle(x: Tensor) -> Tensor:
    y = x @ x.mT
    torch._dynamo.graph_break()
    return y.softmax(-1)


def _in_a_loop(x: Tensor) -> Tensor:
    """Dynamo gives the whole function up."""
    for _ in range(2):
        x = x.softmax(-1)
        torch._dynamo.graph_break()
    return x


def _on_a_value(x: Tensor) -> Tensor:
    return x * x.mean().item()


@torch.compiler.disable
def _disabled(x: Tensor) -> Tensor:
    return x.softmax(-1)


class Recurrent(nn.Module):
    """A layer that Dynamo does not trace; there is no graph at all."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.GRU(5, 7, batch_first=True), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0])


CASES: dict[str, Callable[[Tensor], Tensor]] = {
    "in the middle": _in_the_middle,
    "in a loop": _in_a_loop,
    "on a value": _on_a_value,
    "disabled": lambda x: _disabled(x) + 1,
    "recurrent": Recurrent(),
}


@pytest.mark.parametrize("options", [None, {"on_refused": "warn"}], ids=["", "warn"])
@pytest.mark.parametrize("name", CASES)
def test_break_raises_and_says_what_to_do(name: str, options: dict[str, str] | None):
    x = torch.randn(4, 6, 5)
    compiled = torch.compile(CASES[name], backend="batch_invariant", options=options)
    for _ in range(2):
        with torch.no_grad(), pytest.raises(bicompile.GraphBreakError) as raised:
            compiled(x)
        assert str(raised.value).count("call it inside bicompile.eager()") == 1


@pytest.mark.parametrize("name", CASES)
def test_eager_around_the_call_covers_what_a_break_leaves(name: str):
    x, compiled = torch.randn(4, 6, 5), torch.compile(CASES[name], backend="batch_invariant")
    with torch.no_grad(), bicompile.eager():
        whole = CASES[name](x)
        assert same_bits(compiled(x), whole)
        if name != "on a value":  # which is the batch's
            assert same_bits(compiled(x[1:2]), whole[1:2])


def test_break_is_let_through_by_name():
    x = torch.randn(4, 6, 5)
    compiled = torch.compile(_in_the_middle, backend="batch_invariant", options={"allow": ["graph_break"]})
    torch.testing.assert_close(compiled(x), _in_the_middle(x))


def test_other_backends_break_as_ever():
    """Also after, and inside, a call that raised."""
    x, stock = torch.randn(4, 6, 5), torch.compile(_in_the_middle, backend="eager")

    @torch.compile(backend="batch_invariant")
    def ours(x: Tensor) -> Tensor:
        return _on_a_value(x)

    with pytest.raises(bicompile.GraphBreakError):
        ours(x)
    assert same_bits(stock(x), _in_the_middle(x))


def test_nothing_runs_in_eager_beneath_a_dispatch_mode():
    x = torch.randn(4, 6, 5)
    compiled = torch.compile(lambda x: x.softmax(-1), backend="batch_invariant")
    for _ in range(2):  # Dynamo does not look for what is compiled already either
        with FlopCounterMode(display=False), pytest.raises(bicompile.GraphBreakError, match="dispatch mode"):
            compiled(x)
        compiled(x)


def test_function_that_runs_outside_of_its_call_is_refused():
    """Dynamo would compile nothing of it."""

    def generator(x: Tensor):
        yield x.softmax(-1)

    with pytest.raises(TypeError, match="generator"):
        bicompile.batch_invariant(generator)
