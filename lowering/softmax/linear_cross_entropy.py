"""Cross entropy of a linear layer, without the scores of all rows: those of a chunk exist at a time.

``bicompile::linear_log_probability`` is ``log_probability`` of ``hidden @ weight.T + bias``.  For its gradients the
scores are computed again.

Numerics: no order is cut by a chunk, so every result has the bits that it has where all scores are kept.  The chunks'
sizes are a schedule: they may follow the shapes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bicompile.lowering.matmul.op import FLOATS
from bicompile.lowering.matmul.order import order_for

from .cross_entropy import gradient_of_scores, log_probability, loss_of
from .op import statistics_dtype

CHUNK_BYTES = 128 << 20
"""Of scores, and of their gradients, at a time: enough for fast products, and little beside a model's weights."""
_STEP = order_for(0, torch.float32).block
"""Rows or classes of a chunk, or a multiple: sums that continue from chunk to chunk do so between blocks."""

CONTINUES = ("cpu",)
"""Device types with ``mm_continued``."""

_ops = torch.ops.bicompile
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
_LAYER = "Tensor hidden, Tensor weight, Tensor? bias, Tensor index"

_LIB = torch.library.Library("bicompile", "FRAGMENT")
_LIB.define(f"linear_log_probability({_LAYER}) -> (Tensor result, Tensor shift, Tensor log_total)", tags=_TAGS)
_LIB.define(
    f"linear_log_probability_backward(Tensor grad, {_LAYER}, Tensor shift, Tensor log_total, bool[3] wanted) -> "
    "(Tensor hidden, Tensor weight, Tensor bias)",
    tags=_TAGS,
)
_LIB.define(
    "linear_cross_entropy(Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias=None, "
    "Tensor? weight=None, int reduction=1, int ignore_index=-100, ScalarType? dtype=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def chunks(size: int, across: int, itemsize: int) -> Iterator[slice]:
    """Cut ``size`` rows of ``across`` scores each (or classes of as many rows) into chunks of about CHUNK_BYTES."""
    most = CHUNK_BYTES // max(1, across * itemsize)
    step = max(_STEP, most // _STEP * _STEP)
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def _scores(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return _ops.mm(hidden, weight.T)
    return _ops.addmm(bias, hidden, weight.T, 1.0, 1.0)


def linear_log_probability(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The log-probability of class ``index`` of each row, and the two statistics of the row's scores."""
    out = _new_rows(hidden, weight, bias, index)
    for rows in chunks(len(hidden), len(weight), hidden.itemsize):
        part = log_probability(_scores(hidden[rows], weight, bias), index[rows], 1)
        for whole, some in zip(out, part, strict=True):
            whole[rows] = some
    return out


def linear_log_probability_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    shift: Tensor,
    log_total: Tensor,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``hidden``, ``weight`` and ``bias`` that are ``wanted``; empty tensors for the others.

    A chunk of classes has all rows, and so whole sums for its part of ``weight`` and ``bias``.  The sums for ``hidden``
    run over the classes: on the CPU they continue from chunk to chunk; on a GPU, whose fastest products cannot, chunks
    of rows have them whole, and the scores are computed once more.
    """
    for_hidden, for_weight, for_bias = wanted
    continues = for_hidden and hidden.device.type in CONTINUES
    new_weight = torch.empty_like(weight if for_weight else weight[:0], memory_format=torch.contiguous_format)
    new_bias = weight.new_empty(len(weight) if for_bias else 0)
    sums = None
    for classes in chunks(len(weight), len(hidden), hidden.itemsize) if continues or for_weight or for_bias else ():
        some, its_bias = weight[classes], None if bias is None else bias[classes]
        scores = _gradient(grad, hidden, some, its_bias, index - classes.start, shift, log_total)
        if for_weight:
            new_weight[classes] = _ops.mm(scores.T, hidden)
        if for_bias:
            new_bias[classes] = _ops.sum(scores, [0], False, scores.dtype)
        if continues:
            sums = _ops.mm_continued(sums, scores, some)
    if sums is not None:
        rounded = sums.to(hidden.dtype)
        return torch.where(rounded.isnan(), math.nan, rounded), new_weight, new_bias  # one NaN, as in any product
    new_hidden = torch.empty_like(hidden if for_hidden else hidden[:0], memory_format=torch.contiguous_format)
    for rows in chunks(len(new_hidden), len(weight), hidden.itemsize):
        scores = _gradient(grad[rows], hidden[rows], weight, bias, index[rows], shift[rows], log_total[rows])
        new_hidden[rows] = _ops.mm(scores, weight)
    return new_hidden, new_weight, new_bias


def _gradient(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    shift: Tensor,
    log_total: Tensor,
) -> Tensor:
    """The gradient of the scores of these rows and classes."""
    return _ops.log_probability_backward(grad, _scores(hidden, weight, bias), index, shift, log_total)


def _new_rows(hidden: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three empty numbers for each row, after the checks."""
    shapes = f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
    torch._check_value(
        hidden.dim() == 2 and weight.dim() == 2,
        lambda: f"bicompile::linear_log_probability: expected [N, K] and [V, K], got shapes {shapes}; flatten the rows",
    )
    torch._check_value(
        hidden.shape[1] == weight.shape[1],
        lambda: f"bicompile::linear_log_probability: the shapes {shapes} do not fit; expected [N, K] and [V, K]",
    )
    torch._check_value(
        hidden.dtype in FLOATS and hidden.dtype == weight.dtype and (bias is None or bias.dtype == weight.dtype),
        lambda: (
            "bicompile::linear_log_probability: expected one dtype, float32, float64, bfloat16 or float16, got "
            f"{', '.join(str(t.dtype) for t in (hidden, weight, bias) if t is not None)}; convert them first"
        ),
    )
    if bias is not None:
        torch._check_value(
            bias.dim() == 1 and bias.shape[0] == weight.shape[0],
            lambda: f"bicompile::linear_log_probability: expected a bias [V] for {shapes}, got {tuple(bias.shape)}",
        )
    torch._check_value(
        index.dim() == 1 and index.shape[0] == hidden.shape[0] and index.dtype == torch.int64,
        lambda: (
            "bicompile::linear_log_probability: expected a class of int64 for each row, got "
            f"{index.dtype} of shape {tuple(index.shape)} for {tuple(hidden.shape)}"
        ),
    )
    dtype = statistics_dtype(hidden.dtype)
    first, second, third = (hidden.new_empty(index.shape, dtype=dtype) for _ in range(3))
    return first, second, third


torch.library.register_fake("bicompile::linear_log_probability", _new_rows, lib=_LIB)


@torch.library.register_fake("bicompile::linear_log_probability_backward", lib=_LIB)
def _(grad: Tensor, hidden: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    for_hidden, for_weight, for_bias = others[-1]
    return (
        hidden.new_empty(hidden.shape if for_hidden else (0, hidden.shape[1])),
        weight.new_empty(weight.shape if for_weight else (0, weight.shape[1])),
        weight.new_empty(weight.shape[0] if for_bias else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, shift, log_total = output
    ctx.mark_non_differentiable(shift, log_total)
    ctx.save_for_backward(*inputs, shift, log_total)


def _backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    if torch.is_grad_enabled():
        return (*_differentiable_gradients(grad, *saved[:4]), None)
    wanted = ctx.needs_input_grad[:3]
    gradients = _ops.linear_log_probability_backward(grad, *saved, wanted)
    return (*(g if asked else None for g, asked in zip(gradients, wanted, strict=True)), None)


def _differentiable_gradients(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same bits by ops that can be differentiated again; all scores exist."""
    scores = F.linear(hidden, weight, bias)
    logs = torch.log_softmax(scores.to(grad.dtype), 1)
    scores = gradient_of_scores(grad, logs, index, 1).to(scores.dtype)
    return scores @ weight, scores.T @ hidden, None if bias is None else scores.sum(0)


torch.library.register_autograd("bicompile::linear_log_probability", _backward, setup_context=_setup_context, lib=_LIB)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: int = 1,
    ignore_index: int = -100,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``cross_entropy_loss`` of the scores of ``input`` [N, K], in ``dtype`` or theirs; ``reduction`` is ATen's."""
    torch._check_value(
        weight is None or weight.shape == linear_weight.shape[:1],
        lambda: f"bicompile::linear_cross_entropy: expected a weight for each class, got shape {tuple(weight.shape)}",  # type: ignore[union-attr]
    )
    loss = loss_of(
        lambda classes: _ops.linear_log_probability(input, linear_weight, linear_bias, classes)[0],
        target,
        weight,
        reduction,
        ignore_index,
    )
    return loss.to(input.dtype if dtype is None else dtype)


_LIB.impl("linear_log_probability", linear_log_probability, "CompositeExplicitAutograd")
_LIB.impl("linear_log_probability_backward", linear_log_probability_backward, "CompositeExplicitAutograd")
_LIB.impl("linear_cross_entropy", linear_cross_entropy, "CompositeImplicitAutograd")
