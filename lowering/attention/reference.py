"""The order of attention, said in plain torch: one fused multiply-add at a time, over all rows at once.

Slow, for small shapes.  The kernels have these bits, all but ``lse``, whose logarithm is torch's here.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from bicompile.dropout import is_kept

from .order import AttentionOrder, order_for


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    seeds: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attention of q ``[B, H, L, D]`` to k ``[B, Hkv, S, D]``, v ``[B, Hkv, S, Dv]``: output and lse."""
    order = order_for(q.dtype)
    weights, top, total = _softmax(q, k, mask, is_causal, scale, order)
    weights = _dropped(weights, weights, seeds, dropout_p)
    values = _weighted_sum(weights, _for_each_head(v, q), order)
    seen = top != -math.inf
    out = torch.where(seen[..., None], values / total[..., None], 0.0)
    return _canonical(out.to(q.dtype)), _canonical(torch.where(seen, top + total.log(), -math.inf))


def sdpa_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    is_causal: bool,
    scale: float,
    seeds: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, and of the masked scores ``[B, H, L, S]``, the last not rounded to q's dtype."""
    order = order_for(q.dtype)
    weights, _, total = _softmax(q, k, mask, is_causal, scale, order)
    p = torch.where(weights == 0, 0.0, weights / total[..., None])
    wide = grad.to(order.accumulator)
    dp = _dot(wide[..., :, None, :], _for_each_head(v, q)[..., None, :, :], order)
    dp = _dropped(dp, weights, seeds, dropout_p)
    delta = _dot(wide, out.to(order.accumulator), order)
    ds = torch.where(p == 0, 0.0, p * (dp - delta[..., None]))

    first = _first(p)
    dq = _weighted_sum(ds, _for_each_head(k, q), order, first) * scale
    first = _first(p.mT)
    dk = _over_group(_weighted_sum(ds.mT, q.to(order.accumulator), order, first), k) * scale
    p = _dropped(p, weights, seeds, dropout_p)
    dv = _over_group(_weighted_sum(p.mT, wide, order), v)
    dq, dk, dv = (_canonical(t.to(q.dtype)) for t in (dq, dk, dv))
    return dq, dk, dv, ds


def _dropped(numbers: Tensor, weights: Tensor, seeds: Tensor | None, dropout_p: float) -> Tensor:
    """``numbers`` [B, H, L, S], one for each weight, as dropout leaves them."""
    if seeds is None:
        return numbers
    places = torch.arange(weights.shape[-1]) - _first(weights)[..., None]
    kept = is_kept(seeds[..., None], places, dropout_p)
    return torch.where(kept, numbers * (1 / (1 - dropout_p) if dropout_p < 1 else 0.0), 0.0)


def _softmax(
    q: Tensor, k: Tensor, mask: Tensor | None, is_causal: bool, scale: float, order: AttentionOrder
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [B, H, L, S] before the division, and their maximum score and sum [B, H, L]."""
    rows = q.to(order.accumulator)
    scores = _dot(rows[..., :, None, :], _for_each_head(k, q)[..., None, :, :], order) * scale
    if mask is not None and mask.dtype != torch.bool:
        wide = mask.to(order.accumulator)
        scores = torch.where(wide == -math.inf, -math.inf, scores + wide)
    elif mask is not None:
        scores = torch.where(mask, scores, -math.inf)
    if is_causal:
        scores = torch.where(torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), scores, -math.inf)
    if scores.shape[-1] == 0:
        return scores, scores.new_full(scores.shape[:-1], -math.inf), scores.new_zeros(scores.shape[:-1])
    top = scores.amax(-1)  # NaN if one of them is
    weights = torch.where(scores == -math.inf, 0.0, _exp(scores - top[..., None]))
    return weights, top, _sum_of_weights(weights, order)


def _dot(a: Tensor, b: Tensor, order: AttentionOrder) -> Tensor:
    """Products summed over the last dim: FMA chains from +0 in blocks, blocks in ascending order."""
    shape = torch.broadcast_shapes(a.shape, b.shape)[:-1]
    total = torch.zeros(shape, dtype=order.accumulator)
    for start in range(0, a.shape[-1], order.block):
        part = torch.zeros(shape, dtype=order.accumulator)
        for d in range(start, min(start + order.block, a.shape[-1])):
            part = _fma(a[..., d], b[..., d], part)
        total = part if start == 0 else total + part
    return total


def _weighted_sum(weights: Tensor, rows: Tensor, order: AttentionOrder, first: Tensor | None = None) -> Tensor:
    """Sum over j of weights[..., j] * rows[..., j, :], blocks counted from ``first``; weights of zero add nothing."""
    first = _first(weights) if first is None else first
    part = torch.zeros(*weights.shape[:-1], rows.shape[-1], dtype=order.accumulator)
    total = part
    for j in range(weights.shape[-1]):
        w = weights[..., j, None]
        part = torch.where(w == 0, part, _fma(w, rows[..., None, j, :], part))
        block_ends = ((j - first) % order.block == order.block - 1)[..., None] & (first <= j)[..., None]
        total = torch.where(block_ends, total + part, total)
        part = torch.where(block_ends, 0.0, part)
    return total + part


def _sum_of_weights(weights: Tensor, order: AttentionOrder) -> Tensor:
    """Lanes inside blocks, blocks in ascending order, halves of the lanes."""
    length = -(-weights.shape[-1] // order.block) * order.block
    at = _first(weights)[..., None] + torch.arange(length)
    moved = torch.where(at < weights.shape[-1], weights.gather(-1, at.clamp(max=weights.shape[-1] - 1)), 0.0)
    lanes = moved.unflatten(-1, (-1, order.block // order.lanes, order.lanes))
    blocks = functools.reduce(torch.add, lanes.unbind(-2))
    total = functools.reduce(torch.add, blocks.unbind(-2))
    while total.shape[-1] > 1:
        total = total[..., : total.shape[-1] // 2] + total[..., total.shape[-1] // 2 :]
    return total[..., 0]


def _first(weights: Tensor) -> Tensor:
    """Index of each row's first weight that is not zero; its length if there is none."""
    length = weights.shape[-1]
    if length == 0:
        return torch.zeros(weights.shape[:-1], dtype=torch.int64)
    return torch.where(weights != 0, torch.arange(length), length).amin(-1)


def _for_each_head(t: Tensor, q: Tensor) -> Tensor:
    """Keys or values in the accumulator's dtype, repeated for each query head of their group."""
    wide = t.to(order_for(q.dtype).accumulator)
    return wide.repeat_interleave(q.shape[1] // t.shape[1], dim=1)


def _over_group(per_head: Tensor, like: Tensor) -> Tensor:
    """Gradients of the query heads of each group, added to +0 in ascending order of heads."""
    heads = per_head.unflatten(1, (like.shape[1], -1)).unbind(2)
    return functools.reduce(torch.add, heads, torch.zeros_like(heads[0]))


_EXP = {
    # Largest and smallest argument that matter, 1/ln 2, minus ln 2 in two parts, polynomial from the highest power.
    torch.float32: (
        (89.0, -104.0, "0x1.715476p+0", "-0x1.62e43p-1", "0x1.05c61p-29"),
        "0x1.6db47ap-10 0x1.123b92p-7 0x1.55545ep-5 0x1.55548ep-3 0x1p-1 0x1p0 0x1p0",
    ),
    torch.float64: (
        (710.0, -746.0, "0x1.71547652b82fep+0", "-0x1.62e42fefa39efp-1", "-0x1.abc9e3b39803fp-56"),
        "0x1.200b5cd9dae1dp-29 0x1.af6f6eea44adap-26 0x1.27e475839e5e3p-22 0x1.71ddedf7e602ep-19 "
        "0x1.a01a01d898c5fp-16 0x1.a01a01b46b1b8p-13 0x1.6c16c16c0b76dp-10 0x1.111111110e9cdp-7 "
        "0x1.5555555555574p-5 0x1.555555555555cp-3 0x1p-1 0x1p0 0x1p0",
    ),
}


def _exp(x: Tensor) -> Tensor:
    """``e**x`` as in lowering/elementwise/math.h."""
    (highest, lowest, *factors), powers = _EXP[x.dtype]
    inverse, minus_high, minus_low = (float.fromhex(f) for f in factors)
    x = x.clamp(lowest, highest)  # NaN stays
    n = torch.round(x * inverse)
    r = _fma(n, torch.tensor(minus_high, dtype=x.dtype), x)
    r = _fma(n, torch.tensor(minus_low, dtype=x.dtype), r)
    coefficients = [torch.tensor(float.fromhex(c), dtype=x.dtype) for c in powers.split()]
    p = functools.reduce(lambda total, c: _fma(total, r, c), coefficients)
    half = torch.round(n / 2)
    return (p.double() * torch.exp2(half.double()) * torch.exp2((n - half).double())).to(x.dtype)


def _fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """``a * b + c``, rounded once; in float64 as long as nothing leaves the range of normal numbers."""
    if c.dtype == torch.float32:
        return _sum_to_odd(a.double() * b.double(), c.double()).float()  # the product is exact
    product = a * b
    (a1, a2), (b1, b2) = _halves(a), _halves(b)
    error = a2 * b2 - (((product - a1 * b1) - a2 * b1) - a1 * b2)
    # Boldo and Melquiond, "Emulation of FMA and correctly rounded sums" (2008): exact sums, the small part to odd.
    low, lower = _two_sum(c, error)
    high, middle = _two_sum(product, low)
    plain = product + c
    fused = high + _sum_to_odd(middle, lower)
    return torch.where(plain.isfinite() & (plain.abs() + product.abs() > 0), fused, plain)


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Veltkamp's split of float64 numbers into two of 26 bits."""
    scaled = x * 134217729.0
    high = scaled - (scaled - x)
    return high, x - high


def _two_sum(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """``x + y`` and, exactly, what rounding took from it."""
    total = x + y
    part = total - x
    return total, (x - (total - part)) + (y - part)


def _sum_to_odd(x: Tensor, y: Tensor) -> Tensor:
    """``x + y`` in float64; where inexact, the neighbour with an odd significand: rounding again rounds once."""
    total, error = _two_sum(x, y)
    even = (total.view(torch.int64) & 1) == 0
    toward = torch.where(error > 0, math.inf, -math.inf).double()
    return torch.where((error != 0) & even & total.isfinite(), torch.nextafter(total, toward), total)


def _canonical(x: Tensor) -> Tensor:
    """``x`` with one NaN for all."""
    return torch.where(x.isnan(), math.nan, x)
