"""Training that the tests of a CPU and of a GPU share: twenty steps of a tiny Llama, and of a tiny ViT."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from model_zoo import MODELS, VOCABULARY, llama
from torch import Tensor, nn

import bicompile

STEPS = 20


@dataclass(frozen=True)
class Training:
    """A module, the loss of a batch, which takes the module or what was made of it, and a batch for each step."""

    module: nn.Module
    loss: Callable[[Any, Tensor], Tensor]
    batches: list[Tensor]

    def run(
        self, model: Any, mode: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    ) -> tuple[list[Tensor], Tensor]:
        """Train ``model``, the module or what was made of it, from the module's weights, which come back in the end.

        Forward and backward run under ``mode``, the optimizer under ``eager()``.  The weights, and the loss of each
        step.
        """
        start = {name: value.clone() for name, value in self.module.state_dict().items()}
        optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-2)
        losses = []
        for batch in self.batches:
            optimizer.zero_grad()
            with mode():
                loss = self.loss(model, batch)
                loss.backward()
            losses.append(loss.detach())
            with bicompile.eager():
                nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
                optimizer.step()
        weights = [parameter.detach().clone() for parameter in self.module.parameters()]
        self.module.load_state_dict(start)
        return weights, torch.stack(losses)


def llama_training(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Training:
    """Two batches in turn, of 240 tokens each, so that a weight's gradient sums over two blocks of rows."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = llama()
    batches = torch.randint(0, VOCABULARY, (2, 6, 40), generator=torch.Generator().manual_seed(0)).to(device)
    return Training(
        model.to(device, dtype).train(),
        lambda model, tokens: model(tokens, labels=tokens).loss,
        [*batches] * (STEPS // 2),
    )


def vit_training(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Training:
    """Pixels that are new in each step, and outputs that should be 0."""
    vit = MODELS["vit"]
    return Training(
        vit.module(dtype).requires_grad_(True).train().to(device),
        lambda model, pixels: model(pixels).square().mean(),
        [vit.rows(24, dtype, seed=step).to(device) for step in range(STEPS)],
    )


def is_falling(losses: Tensor) -> bool:
    """Whether the last quarter of the losses lies below the first."""
    quarter = len(losses) // 4
    return bool(losses[-quarter:].float().mean() < losses[:quarter].float().mean())


TRAININGS: dict[str, Callable[..., Training]] = {"llama": llama_training, "vit": vit_training}
