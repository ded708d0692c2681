"""Around a backward pass: optimizers, checkpointing, mixed precision; training is the same on any number of threads."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model_zoo import VOCABULARY, llama
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from training_tasks import TRAININGS, is_falling

import bicompile
from bicompile.testing import same_bits


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def compiled(fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return torch.compile(fn, backend="batch_invariant", **options)


# Twenty steps.


@pytest.mark.parametrize("name", TRAININGS)
def test_training_gives_the_same_weights_compiled_or_not_on_any_number_of_threads(
    name: str, set_threads: Callable[[int], None]
):
    pytest.importorskip("transformers")
    training = TRAININGS[name]()
    start = [parameter.detach().clone() for parameter in training.module.parameters()]
    set_threads(1)
    weights, losses = once = training.run(training.module, bicompile.eager)
    assert is_falling(losses) and not any(map(same_bits, weights, start))
    set_threads(4)
    assert same_bits(training.run(training.module, bicompile.eager), once)
    set_threads(2)
    assert same_bits(training.run(compiled(training.module))[0], weights)  # the ViT's loss itself is stock's there


def test_training_and_evaluation_autograd_and_decoding_give_the_same_logits():
    transformers = pytest.importorskip("transformers")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = llama(num_layers=2)
    tokens = torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    with bicompile.eager():
        trained = model.train()(tokens).logits
        assert trained.requires_grad
        with torch.no_grad():
            assert same_bits(model(tokens).logits, trained.detach())
            assert same_bits(model.eval()(tokens).logits, trained.detach())
            cache = transformers.DynamicCache()
            steps = [model(tokens[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(9)]
    assert same_bits(torch.cat(steps, dim=1), trained.detach())


# Around one block.


class Block(nn.Module):
    """Attention between a norm and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(attended.transpose(1, 2).flatten(-2))


@pytest.fixture
def block() -> Iterator[Block]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield Block()


def gradients_of(fn: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> list[Tensor]:
    """The result, the gradient of ``x``, and those of the weights."""
    leaves = [x.clone().requires_grad_(), *module.parameters()]
    y = fn(leaves[0])
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves)]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_bit(block: Block, reentrant: bool):
    x = drawn(3, 5, 8)

    def saved(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: checkpoint(fn, x, use_reentrant=reentrant)

    def backward_by_engine(fn: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """A reentrant checkpoint knows ``backward`` only."""
        block.zero_grad()
        leaf = x.clone().requires_grad_()
        y = fn(leaf)
        y.square().sum().backward()
        return [y.detach(), *(p.grad for p in (leaf, *block.parameters()) if p.grad is not None)]

    with bicompile.eager():
        plain = gradients_of(block, block, x)
        assert same_bits(backward_by_engine(saved(block)), plain)
    assert same_bits(backward_by_engine(compiled(saved(block), fullgraph=True)), plain)
    assert same_bits(backward_by_engine(saved(compiled(block))), plain)


def test_attention_is_caught_in_a_thread_of_the_backward_pass(block: Block):
    """Such a thread, which a checkpoint computes in on a GPU, has the modes of its caller and no context variables."""
    x = drawn(3, 5, 8)
    with bicompile.eager():
        assert same_bits(contextvars.Context().run(block, x), block(x))


@contextlib.contextmanager
def _autocast(dtype: torch.dtype = torch.bfloat16) -> Iterator[None]:
    with torch.autocast("cpu", dtype=dtype):
        yield


def test_gradients_under_autocast_are_eagers_and_keep_their_rows(block: Block):
    x = drawn(3, 5, 8)
    fn = compiled(block)
    with _autocast():
        ours = gradients_of(fn, block, x)
    with bicompile.eager(), _autocast():
        assert same_bits(gradients_of(block, block, x), ours)
        assert same_bits(gradients_of(lambda x: checkpoint(block, x, use_reentrant=False), block, x), ours)
        assert same_bits(gradients_of(block, block, x[1:2])[:2], [t[1:2] for t in ours[:2]])
    with _autocast():
        stock = gradients_of(block, block, x)
    exact = gradients_of(block, block, x)
    for mine, theirs, truth in zip(ours, stock, exact, strict=True):
        assert mine.dtype == theirs.dtype
        assert (mine - truth).norm() <= 1.5 * (theirs - truth).norm()


@pytest.mark.parametrize("overflow", [False, True])
def test_gradients_are_scaled_and_steps_that_overflow_are_left_out(block: Block, overflow: bool):
    start = [p.detach().clone() for p in block.parameters()]
    scale = 2.0**40 if overflow else 2.0**10
    x = drawn(3, 5, 8)

    def step(mode: contextlib.AbstractContextManager[None]) -> tuple[list[Tensor], float]:
        for parameter, value in zip(block.parameters(), start, strict=True):
            parameter.data.copy_(value)
        optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        with mode:
            optimizer.zero_grad()
            with _autocast(torch.float16):
                loss = block(x).square().mean()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(block.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
        return [p.detach().clone() for p in block.parameters()], scaler.get_scale()

    ours, stock = step(bicompile.eager()), step(contextlib.nullcontext())
    assert same_bits(ours[0], start) == overflow
    assert ours[1] == stock[1] == (scale / 2 if overflow else scale)
    torch.testing.assert_close(ours[0], stock[0], rtol=1e-3, atol=1e-4)  # float16 under autocast


def test_modes_without_gradients_give_the_bits_of_training(block: Block):
    x = drawn(3, 5, 8)
    fn = compiled(block)
    trained = fn(x).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert same_bits(fn(x), trained)
            with bicompile.eager():
                assert same_bits(block(x), trained)


# Optimizers.


def parameters() -> list[nn.Parameter]:
    made = [nn.Parameter(drawn(*shape, seed=i)) for i, shape in enumerate(((5, 7), (33,), ()))]
    for i, parameter in enumerate(made):
        parameter.grad = drawn(*parameter.shape, seed=10 + i)
    return made


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
    "AdamW": torch.optim.AdamW,
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, amsgrad=True, foreach=True),
    "RMSprop, foreach": lambda p: torch.optim.RMSprop(p, centered=True, foreach=True),
    "Adafactor": torch.optim.Adafactor,
    "RAdam": torch.optim.RAdam,
    "Muon": lambda p: torch.optim.Muon(p[:1]),
}


def stepped(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    mode: Callable[[], Any] = contextlib.nullcontext,
    wrap: Callable[..., Any] = lambda fn: fn,
) -> list[Tensor]:
    """The norm of the gradients and the parameters after a step, and a second one through ``wrap``."""
    made = parameters()
    optimizer = make(made)

    def step() -> Tensor:
        norm = nn.utils.clip_grad_norm_(made, 1.0)
        optimizer.step()
        return norm

    with mode():
        step()
        return [wrap(step)(), *(parameter.detach() for parameter in made)]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_take_stocks_steps_in_eager(name: str):
    ours, stock = stepped(OPTIMIZERS[name], bicompile.eager), stepped(OPTIMIZERS[name])
    half = name == "Muon"  # whose products are of bfloat16
    torch.testing.assert_close(ours, stock, rtol=2e-2 if half else 1e-5, atol=1e-3 if half else 1e-6)


def test_fused_optimizers_are_refused_by_name_in_eager():
    with pytest.raises(bicompile.UnsupportedOpError, match="_fused_adamw"):
        stepped(lambda p: torch.optim.AdamW(p, fused=True), bicompile.eager)


def test_a_compiled_optimizer_takes_stocks_steps():
    """Not those of ``eager()`` bit for bit: PyTorch's optimizers are other programs where they are compiled.

    PyTorch breaks the graph around a step, and leaves nothing to eager code but to set the gradient mode.
    """
    stock = stepped(torch.optim.AdamW)
    allowing = functools.partial(compiled, options={"allow": ["graph_break"]})
    for ours in (stepped(torch.optim.AdamW, wrap=allowing), stepped(torch.optim.AdamW, bicompile.eager, compiled)):
        torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-6)


def test_a_compiled_norm_of_gradients_is_eagers():
    def norm(gradients: list[Tensor]) -> Tensor:
        return nn.utils.get_total_norm(gradients)

    gradients = [drawn(*shape) for shape in ((50, 70), (33,), ())]
    with bicompile.eager():
        ours = norm(gradients)
    assert same_bits(compiled(norm, fullgraph=True)(gradients), ours)
