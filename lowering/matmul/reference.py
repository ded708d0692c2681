"""The order of a matrix product, said in plain torch: one fused multiply-add at a time, over all outputs at once.

Slow, for small shapes.  torch has no fused multiply-add on the CPU, so it is made of exact steps here.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor

from .order import MatmulOrder, gpu_order_for, order_for

_SMALLEST_NORMAL = 2.0**-126


def mm(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of ``[M, K]`` and ``[K, N]``."""
    order = order_for(a.shape[1], a.dtype)
    ks = _sequence(order)
    missing = max(ks, default=-1) + 1 - order.length  # an odd partner beyond the end: zeros
    left = F.pad(a.to(order.accumulator), (0, missing))
    right = F.pad(b.to(order.accumulator), (0, 0, 0, missing))
    total = torch.zeros(a.shape[0], b.shape[1], dtype=order.accumulator)
    for start in range(0, len(ks), order.block):
        part = torch.zeros_like(total)
        for k in ks[start : start + order.block]:
            part = _step(left[:, k, None], right[None, k, :], part, order)
        total = part if start == 0 else _sum(total, part, order)
    return _canonical(total.to(a.dtype))


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of ``[B, M, K]`` and ``[B, K, N]``: one :func:`mm` for each of the batch."""
    products = [mm(left, right) for left, right in zip(a, b, strict=True)]
    return torch.stack(products) if products else a.new_empty(0, a.shape[1], b.shape[2])


def addmm(c: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> Tensor:
    """``beta * c + alpha * (a @ b)``, every operation rounded to the dtype; with ``beta`` 0, ``c`` is not looked at."""
    return _combine(c, mm(a, b), beta, alpha)


def baddbmm(c: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> Tensor:
    """:func:`addmm` for each of a batch."""
    return _combine(c, bmm(a, b), beta, alpha)


def gpu_mm(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in the order of a GPU, of float32 or float64: inside a tensor core, IEEE says nothing."""
    order = gpu_order_for(a.shape[1], a.dtype)
    assert order.group == 1, f"gpu_mm: expected float32 or float64, got {a.dtype}"
    total = torch.zeros(a.shape[0], b.shape[1], dtype=order.accumulator)
    for k in range(order.length):
        left, right = a[:, k, None], b[None, k, :]
        if a.dtype == torch.float64:
            total = _fma64(*torch.broadcast_tensors(left, right, total))
        else:
            total = _sum_to_odd(left.double() * right.double(), total.double()).float()
    return total


def _combine(c: Tensor, product: Tensor, beta: float, alpha: float) -> Tensor:
    y = product if alpha == 1 else product * alpha
    if beta != 0:
        y = y + (c if beta == 1 else c * beta)
    return _canonical(y)


def _sequence(order: MatmulOrder) -> list[int]:
    """The k's in the order in which they are added.  In pairs, the last odd one may lie past the end."""
    if not order.odd_first:
        return list(range(order.length))
    return [k for even in range(0, order.length, 2) for k in (even + 1, even)]


def _sum(x: Tensor, y: Tensor, order: MatmulOrder) -> Tensor:
    return _flushed(x + y) if order.flush_denormals else x + y


def _step(a: Tensor, b: Tensor, c: Tensor, order: MatmulOrder) -> Tensor:
    """``a * b + c``, rounded once."""
    if order.accumulator == torch.float64:
        return _fma64(*torch.broadcast_tensors(a, b, c))
    if not order.flush_denormals:
        return _sum_to_odd(a.double() * b.double(), c.double()).float()
    exact = _sum_to_odd(_flushed(a).double() * _flushed(b).double(), c.double())
    # Too small is what, rounded to 24 bits as if exponents had no end, is below the smallest normal number: scaled
    # by 2**100, so that float32 rounds to 24 bits there.
    tiny = (exact * 2.0**100).float().abs() < _SMALLEST_NORMAL * 2.0**100
    return torch.where(tiny, torch.copysign(torch.zeros_like(c), exact), exact.float())


def _sum_to_odd(x: Tensor, y: Tensor) -> Tensor:
    """``x + y`` in float64, where inexact the neighbour with an odd significand.

    Rounding that to float32 rounds once: the odd last bit remembers on which side of a tie the exact sum was.  The
    product of two float32 numbers is exact in float64, so this is all that a fused multiply-add needs.
    """
    total = x + y
    part = total - x
    error = (x - (total - part)) + (y - part)  # exact: Knuth's two-sum
    even = (total.view(torch.int64) & 1) == 0
    toward = torch.where(error > 0, math.inf, -math.inf).double()
    return torch.where((error != 0) & even & total.isfinite(), torch.nextafter(total, toward), total)


def _fma64(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Fused multiply-add of float64 tensors of one shape, with rational numbers: exact, and slow."""
    triples = zip(a.flatten().tolist(), b.flatten().tolist(), c.flatten().tolist(), strict=True)
    return torch.tensor([_fma(x, y, z) for x, y, z in triples], dtype=torch.float64).view(c.shape)


def _fma(x: float, y: float, z: float) -> float:
    if not (math.isfinite(x) and math.isfinite(y) and math.isfinite(z)):
        return x * y + z
    exact = Fraction(x) * Fraction(y) + Fraction(z)
    if exact == 0:
        return x * y + z  # exact too, with the right sign of zero
    try:
        return math.copysign(float(exact), exact)
    except OverflowError:
        return math.copysign(math.inf, exact)


def _canonical(x: Tensor) -> Tensor:
    """``x`` with one NaN for all: torch's conversions give several."""
    return torch.where(x.isnan(), math.nan, x)


def _flushed(x: Tensor) -> Tensor:
    """Denormal numbers as zero of their sign."""
    return torch.where(x.abs() < _SMALLEST_NORMAL, torch.copysign(torch.zeros_like(x), x), x)
