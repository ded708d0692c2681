"""The order of a scatter, said in plain torch: one Python step per contribution."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .order import order_for

_STEPS: dict[str, tuple[float, Callable[[Tensor, Tensor], Tensor]]] = {
    "sum": (0.0, torch.add),
    "mean": (0.0, torch.add),
    "prod": (1.0, torch.mul),
    "amax": (-math.inf, torch.maximum),
    "amin": (math.inf, torch.minimum),
}


def index_add(self: Tensor, dim: int, index: Tensor, source: Tensor, alpha: float = 1.0) -> Tensor:
    """``self`` plus the slices of ``source`` times ``alpha`` (rounded), each at the place that ``index`` names."""
    if self.dim() == 0:
        return index_add(self.reshape(1), 0, index, source.reshape(1), alpha).reshape(())
    running = _widen(self).clone()
    source = _widen(source if alpha == 1 else source * alpha)
    for position, destination in enumerate(index.reshape(-1).tolist()):
        running.select(dim, destination).add_(source.select(dim, position))
    return _round(running, self.dtype)


def scatter_add(self: Tensor, dim: int, index: Tensor, src: Tensor) -> Tensor:
    """``out[i][index[i][j]] += src[i][j]`` for ``dim=1``, and likewise for the others."""
    return scatter_reduce(self, dim, index, src, "sum", True)


def scatter_reduce(self: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, include_self: bool) -> Tensor:
    """What ``scatter_add`` does, with another step, and with or without the initial values."""
    if self.dim() == 0:
        vectors = (self.reshape(1), 0, index.reshape(-1), src.reshape(-1))
        return scatter_reduce(*vectors, reduce, include_self).reshape(())
    start, step = _STEPS[reduce]
    running, source = _widen(self).clone(), _widen(src)
    count = torch.full_like(running, 1.0 if include_self else 0.0)
    for position in itertools.product(*map(range, index.shape)):
        at = list(position)
        at[dim] = int(index[position])
        place = tuple(at)
        if count[place] == 0:
            running[place] = start
        running[place] = step(running[place], source[position])
        count[place] += 1
    if reduce == "mean":
        running = running / count.clamp(min=1)
    return _round(running, self.dtype)


def index_put_accumulate(self: Tensor, indices: Sequence[Tensor | None], values: Tensor) -> Tensor:
    """``self`` plus ``values`` at the places that ``self[indices]`` reads."""
    places = torch.arange(self.numel()).reshape(self.shape)[tuple(slice(None) if i is None else i for i in indices)]
    running = _widen(self).clone().reshape(-1)
    for place, value in zip(places.reshape(-1).tolist(), _widen(values).expand(places.shape).reshape(-1), strict=True):
        running[place] += value
    return _round(running.reshape(self.shape), self.dtype)


def embedding_dense_backward(
    grad: Tensor, indices: Tensor, num_weights: int, padding_idx: int, scale_grad_by_freq: bool
) -> Tensor:
    """The gradient of an embedding's weight; a sum that is scaled is divided by its count before it is rounded."""
    rows, wide = indices.reshape(-1), _widen(grad).reshape(indices.numel(), grad.shape[-1])
    running = wide.new_zeros(num_weights, wide.shape[1])
    for position, row in enumerate(rows.tolist()):
        if row != padding_idx:
            running[row] += wide[position]
    if scale_grad_by_freq:
        running = running / torch.bincount(rows, minlength=num_weights).clamp(min=1)[:, None]
    return _round(running, grad.dtype)


def _widen(x: Tensor) -> Tensor:
    return x.to(order_for(x.dtype).accumulate)


def _round(running: Tensor, dtype: torch.dtype) -> Tensor:
    result = running.to(dtype)
    return torch.where(result.isnan(), torch.nan, result).contiguous()
