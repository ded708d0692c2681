"""Forms of dropout, and functions run from one state of the generator with their gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import bicompile

ROWS = [[3, 0, 5], [4], [5, 4, 3, 2, 1, 0]]
"""Of a batch of six."""

FORMS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "dropout": (lambda x: F.dropout(x, 0.3), (6, 5, 40)),
    "in place": (lambda x: F.dropout(x * 1.0, 0.3, inplace=True), (6, 40)),
    "half": (lambda x: F.dropout(x.bfloat16(), 0.3).float(), (6, 5, 40)),
    "alpha": (lambda x: F.alpha_dropout(x, 0.3, training=True), (6, 5, 40)),
    "dropout1d": (lambda x: F.dropout1d(x, 0.3), (6, 20, 7)),
    "dropout2d": (lambda x: F.dropout2d(x, 0.3), (6, 20, 3, 4)),
    "dropout3d": (lambda x: F.dropout3d(x, 0.3), (6, 20, 2, 3, 4)),
    "feature alpha": (lambda x: F.feature_alpha_dropout(x, 0.3, training=True), (6, 20, 3, 4)),
}


def run(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    """The output from one state of the generator, and the gradients of the inputs."""
    torch.manual_seed(7)
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad((out * out.detach()).sum(), leaves)


def in_eager(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    with bicompile.eager():
        return run(function, *inputs)
