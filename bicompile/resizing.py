"""Pictures made smaller or larger with antialiasing, as sums of products: normal forms.

A resized row is a weighted mean of neighbours, first along the width, then along the height, as in PyTorch.  Places and
weights follow from the sizes alone; the neighbours are added in the order of ``lowering.reduction``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from .bags import wide

aten = torch.ops.aten


def _triangle(distance: Tensor) -> Tensor:
    return (1 - distance).clamp(min=0)


def _cubic(distance: Tensor, a: float = -0.5) -> Tensor:
    """Keys' cubic convolution, with the ``a`` that PyTorch takes where it antialiases."""
    near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
    far = (((distance - 5) * distance + 8) * distance - 4) * a
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))


def _scale(before: int, after: int, align_corners: bool, scale: float | None) -> float:
    """How many elements there are for each one of the result."""
    if align_corners:
        return (before - 1) / (after - 1) if after > 1 else 0.0
    return 1 / scale if scale is not None and scale > 0 else before / after


def _neighbours(
    weight: Callable[[Tensor], Tensor], reach: int, before: int, after: int, scale: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Of each element of the result, which ones it is made of, and their weights, in float64: [after, taps]."""
    width = max(scale, 1.0)
    taps = 2 * math.ceil(reach * width) + 1
    centre = ((torch.arange(after, device=device, dtype=torch.float64) + 0.5) * scale).unsqueeze(1)
    places = (centre - reach * width + 0.5).long().clamp(min=0) + torch.arange(taps, device=device)
    last = (centre + reach * width + 0.5).long().clamp(max=before) - 1
    weights = torch.where(places <= last, weight(((places + 0.5 - centre) / width).abs()), 0.0)
    # A place past the last one is that one again, without weight: what lies outside does not show, not even as NaN.
    return torch.minimum(places, last), weights / weights.sum(1, keepdim=True)


def _resize(weight: Callable[[Tensor], Tensor], reach: int) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Resampling of the last two dims by ``weight``, which is 0 from ``reach`` on; and its gradient."""

    def neighbours(x: Tensor, before: int, after: int, align_corners: bool, given: float | None) -> tuple[Tensor, ...]:
        scale = _scale(before, after, align_corners, given)
        places, weights = _neighbours(weight, reach, before, after, scale, x.device)
        return places, weights.to(x.dtype)

    def forward(
        x: Tensor, size: Sequence[int], align_corners: bool, height: float | None = None, width: float | None = None
    ) -> Tensor:
        result = wide(x)
        for dim, scale in ((-1, width), (-2, height)):
            if x.shape[dim] != size[dim]:  # else PyTorch leaves it, whatever the scale
                places, weights = neighbours(result, x.shape[dim], size[dim], align_corners, scale)
                taken = result.movedim(dim, -1).index_select(-1, places.flatten()).unflatten(-1, places.shape)
                result = (taken * weights).sum(-1).movedim(-1, dim)
        return result.to(x.dtype).contiguous()

    def backward(
        grad: Tensor,
        size: Sequence[int],
        shape: Sequence[int],
        align_corners: bool,
        height: float | None = None,
        width: float | None = None,
    ) -> Tensor:
        result = wide(grad)
        for dim, scale in ((-2, height), (-1, width)):
            if shape[dim] != size[dim]:
                places, weights = neighbours(result, shape[dim], size[dim], align_corners, scale)
                shares = (result.movedim(dim, -1).unsqueeze(-1) * weights).flatten(-2)
                total = shares.new_zeros(*shares.shape[:-1], shape[dim]).index_add(-1, places.flatten(), shares)
                result = total.movedim(-1, dim)
        return result.to(grad.dtype).contiguous()

    return forward, backward


_bilinear, _bilinear_backward = _resize(_triangle, 1)
_bicubic, _bicubic_backward = _resize(_cubic, 2)

NORMAL_FORMS: dict[OpOverload, Callable[..., Any]] = {
    aten._upsample_bilinear2d_aa.default: _bilinear,
    aten._upsample_bilinear2d_aa_backward.default: _bilinear_backward,
    aten._upsample_bicubic2d_aa.default: _bicubic,
    aten._upsample_bicubic2d_aa_backward.default: _bicubic_backward,
}
