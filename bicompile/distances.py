"""Distances and bilinear forms as differences, products and sums: normal forms of ops that pair rows with rows.

A distance is the norm of a difference, in the order of ``lowering.reduction``; PyTorch takes some Euclidean distances
from a matrix product instead, which is faster and cancels.  All differences exist at once: [..., P, R, M] for P rows
and R rows of M numbers.  A bilinear form is a sum of products of three factors.  Half precisions are computed in
float32, forward and backward, and rounded once.
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


def _norms(differences: Tensor, p: float) -> Tensor:
    """The ``p``-norm over the last dim; 0 where that is empty."""
    if differences.shape[-1] == 0:
        return differences.new_zeros(differences.shape[:-1])
    return torch.linalg.vector_norm(differences, p, dim=-1)


def _gradients(grad: Tensor, differences: Tensor, p: float, norms: Tensor) -> Tensor:
    """The gradient of ``_norms`` in each difference; 0 where the norm is 0, as in PyTorch."""
    grad, norms = grad.unsqueeze(-1), norms.unsqueeze(-1)
    if p == 0:
        return torch.zeros_like(differences)
    if p == 1:
        return grad * differences.sign()
    if p == math.inf:
        return grad * differences.sign() * (differences.abs() == norms)
    if p == 2:
        return torch.where(norms == 0, 0.0, grad * (differences / norms))
    scaled = differences.sign() * (differences.abs() / norms).pow(p - 1)
    return torch.where((norms == 0) | (differences == 0), 0.0, grad * scaled)


def _cdist(x1: Tensor, x2: Tensor, p: float, compute_mode: int | None) -> Tensor:
    return _norms(wide(x1).unsqueeze(-2) - wide(x2).unsqueeze(-3), p).to(x1.dtype)


def _cdist_backward(grad: Tensor, x1: Tensor, x2: Tensor, p: float, cdist: Tensor) -> Tensor:
    differences = wide(x1).unsqueeze(-2) - wide(x2).unsqueeze(-3)
    return _gradients(wide(grad), differences, p, _norms(differences, p)).sum(-2).to(grad.dtype)


def _pairs(x: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the second row of each pair, by number."""
    first, second = torch.triu_indices(len(x), len(x), 1, device=x.device)
    return first, second


def _pdist(x: Tensor, p: float = 2.0) -> Tensor:
    first, second = _pairs(x)
    return _norms(wide(x[first]) - wide(x[second]), p).to(x.dtype)


def _pdist_backward(grad: Tensor, x: Tensor, p: float, pdist: Tensor) -> Tensor:
    first, second = _pairs(x)
    differences = wide(x[first]) - wide(x[second])
    of_pairs = _gradients(wide(grad), differences, p, _norms(differences, p))
    return torch.zeros_like(wide(x)).index_add(0, first, of_pairs).index_add(0, second, -of_pairs).to(x.dtype)


def _trilinear(
    i1: Tensor,
    i2: Tensor,
    i3: Tensor,
    expand1: Sequence[int],
    expand2: Sequence[int],
    expand3: Sequence[int],
    sumdim: Sequence[int],
    unroll_dim: int = 1,
) -> Tensor:
    dtype = i1.dtype
    factors = []
    for factor, dims in ((i1, expand1), (i2, expand2), (i3, expand3)):
        for dim in sorted(dims):
            factor = factor.unsqueeze(dim)
        factors.append(wide(factor))
    products = factors[0] * factors[1] * factors[2]
    return (products.sum(tuple(sumdim)) if sumdim else products).to(dtype)


NORMAL_FORMS: dict[OpOverload, Callable[..., Any]] = {
    aten._cdist_forward.default: _cdist,
    aten._cdist_backward.default: _cdist_backward,
    aten._pdist_forward.default: _pdist,
    aten._pdist_backward.default: _pdist_backward,
    aten._trilinear.default: _trilinear,
}
