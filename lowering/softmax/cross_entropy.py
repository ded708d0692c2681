"""``cross_entropy_loss`` with ATen's signature, which keeps two numbers of each row for its gradient.

``bicompile::log_probability`` is the logarithm of the probability that a softmax gives to one class of each row.  Its
gradient, ``one_hot - softmax``, is elementwise in the scores and in the row's two statistics: neither the log-softmax
of all classes nor a copy of it in float32 lives from the forward pass to the backward pass.  For a vocabulary that is
most of a training step's memory.

Numerics: the log-probability has the bits that ``log_softmax`` in float32 gives at its place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .op import statistics_dtype

_LIB = torch.library.Library("bicompile", "FRAGMENT")
_LIB.define(
    "log_probability(Tensor x, Tensor index, int dim) -> (Tensor result, Tensor shift, Tensor log_total)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def log_probability(x: Tensor, index: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """``log_softmax(x, dim)`` at ``index``, which is ``x`` without ``dim``, and the two statistics of each row."""
    shift, log_total = torch.ops.bicompile.softmax_statistics(x, dim)
    chosen = x.gather(dim, index.unsqueeze(dim)).squeeze(dim).to(shift.dtype)
    return (chosen - shift) - log_total, shift, log_total


@torch.library.register_fake("bicompile::log_probability", lib=_LIB)
def _(x: Tensor, index: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    dtype = statistics_dtype(x.dtype)
    return tuple(index.new_empty(index.shape, dtype=dtype) for _ in range(3))  # type: ignore[return-value]


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, index, ctx.dim = inputs
    _, shift, log_total = output
    ctx.mark_non_differentiable(shift, log_total)
    ctx.save_for_backward(x, index, shift, log_total)


def _backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor, None, None]:
    x, index, shift, log_total = ctx.saved_tensors
    dim, wide = ctx.dim, x.to(shift.dtype)
    if torch.is_grad_enabled():  # to be differentiated again, and then the statistics depend on x: the same bits
        logs = torch.log_softmax(wide, dim)
    else:
        logs = (wide - shift.unsqueeze(dim)) - log_total.unsqueeze(dim)
    return gradient_of_scores(grad, logs, index, dim).to(x.dtype), None, None


def gradient_of_scores(grad: Tensor, logs: Tensor, index: Tensor, dim: int) -> Tensor:
    """What the scores get of ``grad``, the gradient of the log-probabilities, in its dtype; elementwise.

    Args:
        grad: of the shape of ``index``.
        logs: the scores' log-softmax over ``dim``.
        index: the class of each row; one that is not in ``logs`` is none of its classes.
        dim: that of the classes.
    """
    shape = [1] * logs.dim()
    shape[dim] = logs.shape[dim]
    classes = torch.arange(logs.shape[dim], device=logs.device).view(shape)
    probabilities = logs.exp()
    difference = torch.where(classes == index.unsqueeze(dim), 1.0 - probabilities, -probabilities)
    return difference * grad.unsqueeze(dim)


torch.library.register_autograd("bicompile::log_probability", _backward, setup_context=_setup_context, lib=_LIB)
_LIB.impl("log_probability", log_probability, "CompositeExplicitAutograd")


def cross_entropy_loss(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: int = 1,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """``aten.cross_entropy_loss`` of scores ``x`` [C], [N, C] or [N, C, ...] and classes ``target``; or None.

    ``reduction`` is ATen's number: 0 for none, 1 for the mean, 2 for the sum.  None stands for a form that PyTorch's
    own composition serves: probabilities as the target, smoothed labels, and whatever it has an error for.
    """
    dim = min(x.dim() - 1, 1)
    plain = x.is_floating_point() and 0 <= dim and not target.is_floating_point() and label_smoothing == 0.0
    if not plain or target.shape != x.shape[:dim] + x.shape[dim + 1 :] or target.dtype != torch.int64:
        return None
    if weight is not None and weight.shape != (x.shape[dim],):
        return None
    loss = loss_of(
        lambda classes: torch.ops.bicompile.log_probability(x, classes, dim)[0], target, weight, reduction, ignore_index
    )
    return loss.to(x.dtype)


def loss_of(
    log_probability_of: Callable[[Tensor], Tensor],
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
) -> Tensor:
    """The loss of the classes ``target``, in the dtype of their log-probabilities; arguments as ATen's.

    ``log_probability_of`` is asked for classes in the place of ``target``, class 0 where that is ``ignore_index``.
    """
    counted = target != ignore_index
    classes = torch.where(counted, target, 0)
    loss = -log_probability_of(classes)
    share = counted.to(loss.dtype) if weight is None else torch.where(counted, weight.to(loss.dtype)[classes], 0.0)
    loss = torch.where(counted, loss * share, 0.0)
    if reduction == 1:
        return loss.sum() / share.sum()
    return loss.sum() if reduction == 2 else loss
