"""Losses in forms that PyTorch has no op for."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .covered import covered
from .lowering.softmax import linear_cross_entropy as op  # noqa: F401, registers bicompile::linear_cross_entropy

_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Literal["none", "mean", "sum"] = "mean",
    ignore_index: int = -100,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``cross_entropy(linear(input, linear_weight, linear_bias), target)``, without the scores of all rows in memory.

    Value and gradients have the bits of those two functions under bicompile; the scores are computed again for the
    gradients.  May be called in compiled code, in ``bicompile.eager()`` and outside of both; only the gradient of a
    gradient, for which all scores are kept, needs ``eager()`` around it.

    Args:
        input: rows [..., K], in float32, float64, bfloat16 or float16.
        linear_weight: [V, K], in the dtype of ``input`` unless autocast is on.
        target: the class of each row, int64 [...].
        linear_bias: [V], in the dtype of ``linear_weight``.
        weight: what a row of each class counts, [V].
        reduction: ``none`` gives a loss for each row, ``mean`` and ``sum`` one number.
        ignore_index: a target whose rows do not count.
        dtype: of the loss.  Scores in bfloat16 whose loss is float32 are what ``cross_entropy(scores.float(), ...)``
            makes; by default the loss is rounded to the scores' dtype, and under autocast it is float32, as in torch.

    Returns:
        The loss, [...] or 0-d.  With ``reduction="none"`` it is minus the log-probability of each row's class.

    Raises:
        ValueError: shapes or dtypes do not fit, or ``reduction`` is none of the three.

    Source:
        The names of ``torch.nn.functional.linear_cross_entropy``, https://github.com/pytorch/pytorch/issues/124480.
    """
    if reduction not in _REDUCTIONS:
        raise ValueError(f"linear_cross_entropy: expected reduction to be none, mean or sum, got {reduction!r}")
    if target.shape != input.shape[:-1] or not input.dim():
        raise ValueError(
            f"linear_cross_entropy: expected rows [..., K] and a class for each, got shapes {tuple(input.shape)} and "
            f"{tuple(target.shape)}; for probabilities as the target, call F.cross_entropy(F.linear(...))"
        )
    rows = input.reshape(-1, input.shape[-1])
    device = input.device.type
    if torch.is_autocast_enabled(device) and input.dtype != torch.float64:
        low = torch.get_autocast_dtype(device)
        rows, linear_weight = rows.to(low), linear_weight.to(low)
        linear_bias = None if linear_bias is None else linear_bias.to(low)
        dtype = dtype or torch.float32
    with covered():
        loss = torch.ops.bicompile.linear_cross_entropy.default(
            rows,
            linear_weight,
            target.reshape(-1),
            linear_bias,
            weight,
            _REDUCTIONS[reduction],
            ignore_index,
            dtype,
        )
    return loss.view(target.shape) if reduction == "none" else loss
