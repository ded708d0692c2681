"""Attention problems that the tests share: values that show the order, shapes, and the ops with one scale."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
ops = torch.ops.bicompile


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Values over many binades, so that the order of additions shows."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    return (x * torch.exp(torch.randn(shape, generator=g, dtype=torch.float64))).to(dtype)


def inputs(
    dtype: torch.dtype, seed: int = 0, *, batch: int = 2, heads: int = 6, kv_heads: int = 2, queries: int = 40,
    keys: int = 400, depth: int = 24, value_depth: int = 24,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    q = values((batch, heads, queries, depth), dtype, seed)
    k = values((batch, kv_heads, keys, depth), dtype, seed + 1)
    return q, k, values((batch, kv_heads, keys, value_depth), dtype, seed + 2)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, causal: bool = False) -> tuple[Tensor, Tensor]:
    out, lse = ops.sdpa(q, k, v, mask, causal, 0.2)
    return out, lse


def gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, causal: bool = False
) -> tuple[Tensor, ...]:
    """dq, dk, dv and, for a floating-point mask, dmask."""
    out, lse = sdpa(q, k, v, mask, causal=causal)
    wanted = mask is not None and mask.dtype != torch.bool
    found = ops.sdpa_backward(grad, q, k, v, mask, out, lse, causal, 0.2, wanted)
    return found if wanted else found[:3]


def causal_mask(queries: int, keys: int) -> Tensor:
    """Queries are the last ones of ``keys``."""
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


def pad_left(t: Tensor, count: int, value: float) -> Tensor:
    return F.pad(t, (0, 0, count, 0), value=value)
