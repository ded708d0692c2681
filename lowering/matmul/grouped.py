"""Grouped and scaled products on the CPU, said with the products that are there: one for each group."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

_ops = torch.ops.bicompile


def grouped_mm(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """One ``mm`` for each group; group g ends before ``ends[g]``, and what no group has is zero.

    ``[M, K] @ [G, K, N]`` cuts the rows of ``a``, ``[M, K] @ [K, N]`` cuts k, ``[G, M, K] @ [K, N]`` the columns of
    ``b``.  No row or column belongs to two groups: one that ends before another has ended is empty.
    """
    bounds = [0, *ends.tolist()]
    if a.dim() + b.dim() > 4:
        bounds = list(itertools.accumulate(bounds, max))
    groups = [slice(start, max(start, end)) for start, end in zip(bounds, bounds[1:], strict=False)]
    if b.dim() == 3:
        out = a.new_zeros(a.shape[0], b.shape[2])
        for g, rows in enumerate(groups):
            out[rows] = _ops.mm(a[rows], b[g])
    elif a.dim() == 2:
        products = [_ops.mm(a[:, ks], b[ks]) for ks in groups]
        out = torch.stack(products) if products else a.new_zeros(0, a.shape[0], b.shape[1])
    else:
        out = a.new_zeros(a.shape[1], b.shape[1])
        for g, columns in enumerate(groups):
            out[:, columns] = _ops.mm(a[g], b[:, columns])
    return out


def scaled_mm(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """``(a @ b) * a_scale * b_scale`` in float32, rounded to ``out_dtype``; then ``bias`` is added."""
    product = _ops.mm(a.float(), b.float()) * a_scale.reshape(-1, 1) * b_scale.reshape(1, -1)
    out = product.to(out_dtype)
    return out if bias is None else out + bias
