"""Gradients of weights: of each sample by ``vmap``, and summed over micro-batches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import bicompile
from bicompile.testing import same_bits


class Classifier(nn.Module):
    """A convolution, a norm, a product, and an attention that is written out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv1d(6, 8, 3, padding=1), nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x).mT)
        return self.head(F.gelu((y @ y.mT).softmax(-1) @ y)).mean(1)


@pytest.fixture
def model() -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Classifier()


def samples(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 6, 9, generator=generator), torch.randint(0, 5, (count,), generator=generator)


def of_each_sample(model: nn.Module) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, weights, (x[None],)), target[None])

    gradients = vmap(grad(loss), in_dims=(None, 0, 0))
    return lambda x, target: gradients(weights, x, target)


def test_gradients_of_a_sample_do_not_depend_on_the_others(model: Classifier):
    x, target = samples(5)
    fn = of_each_sample(model)
    with bicompile.eager():
        whole = fn(x, target)
        for rows in ([2], [0, 1, 2], [4, 3, 3, 0, 1, 2, 4]):
            assert same_bits(fn(x[rows], target[rows]), {name: g[rows] for name, g in whole.items()})
        poisoned = torch.full_like(x, torch.nan)
        poisoned[3] = x[3]
        assert same_bits([g[3] for g in fn(poisoned, target).values()], [g[3] for g in whole.values()])
        alone = torch.autograd.grad(F.cross_entropy(model(x[3:4]), target[3:4]), list(model.parameters()))
        assert same_bits([g[3] for g in whole.values()], list(alone))


def test_compiled_gradients_of_samples_are_eagers():
    x, target = samples(5)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fn = of_each_sample(nn.Sequential(nn.LayerNorm(9), nn.Flatten(), nn.Linear(54, 5)))
    with bicompile.eager():
        whole = fn(x, target)
    compiled = torch.compile(fn, backend="batch_invariant", fullgraph=True, dynamic=False)
    assert same_bits(compiled(x, target), whole)


def test_attention_inside_a_transform_is_refused_with_a_way_out():
    q = torch.ones(2, 1, 2, 3, 4)

    def loss(q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q).sum()

    for transformed in (vmap(grad(loss)), grad(loss)):
        with bicompile.eager(), pytest.raises(bicompile.UnsupportedOpError, match="a product, a softmax and a product"):
            transformed(q)


# Accumulation.


BATCH = samples(30)


def accumulated(model: nn.Module, split: tuple[int, ...]) -> tuple[list[Tensor], Tensor]:
    """The gradients of the weights over micro-batches of ``BATCH``, of these sizes, and that of the input."""
    model.zero_grad()
    x, target = (t.clone() for t in BATCH)
    x.requires_grad_()
    for part, wanted in zip(x.split(split), target.split(split), strict=True):
        F.cross_entropy(model(part), wanted, reduction="sum").backward()
    assert x.grad is not None
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None], x.grad


def test_a_split_into_micro_batches_gives_its_own_gradients_and_always_the_same(
    model: Classifier, set_threads: Callable[[int], None]
):
    set_threads(1)
    with bicompile.eager():
        whole, of_input = accumulated(model, (30,))
        weights = {split: accumulated(model, split) for split in ((10, 10, 10), (6, 24))}
        assert all(same_bits(given, of_input) for _, given in weights.values())
        for split, (summed, _) in weights.items():
            torch.testing.assert_close(summed, whole)
            assert not same_bits(summed, whole), "then this test would not notice a sum in another order"
            set_threads(4)
            assert same_bits(accumulated(model, split)[0], summed)
