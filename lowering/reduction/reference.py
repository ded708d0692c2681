"""The orders of a reduction, on the CPU and on a GPU, said in plain torch: slow, one step for every chunk of a row.

Each op takes the ``fold`` of the order that is meant: ``fold`` is that of the CPU, ``gpu_fold`` that of a GPU.
"""

from __future__ import annotations

import builtins
import ctypes
import ctypes.util
import functools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .order import gpu_order_for, order_for

Combine = Callable[[Tensor, Tensor], Tensor]
Fold = Callable[..., Tensor]
Moments = Callable[[Tensor], tuple[Tensor, Tensor]]
INFINITY = math.inf


def rows_of(x: Tensor, dim: Sequence[int], dtype: torch.dtype) -> Tensor:
    """``x`` in the type that ``dtype`` computes in, the reduced dims flattened into one and last."""
    dims = sorted({d % max(x.dim(), 1) for d in dim} or range(x.dim()))
    wide = x.to(order_for(0, dtype).compute)
    if x.dim() == 0:
        return wide.reshape(1)
    kept = [d for d in range(x.dim()) if d not in dims]
    return wide.permute(*kept, *dims).flatten(len(kept)) if dims else wide.unsqueeze(-1)


def fold(rows: Tensor, combine: Combine = torch.add, neutral: float = 0.0) -> Tensor:
    """Each row of ``rows``, reduced over the last dim in order; that dim stays, with size 1."""
    order = order_for(rows.shape[-1], rows.dtype)
    start = torch.full((*rows.shape[:-1], order.lanes), neutral, dtype=rows.dtype)
    lanes = start
    for section in rows.split(order.section, -1) if rows.shape[-1] else ():
        padded = F.pad(section, (0, -section.shape[-1] % order.lanes), value=neutral)
        lanes = combine(lanes, functools.reduce(combine, padded.split(order.lanes, -1), start))
    while lanes.shape[-1] > 1:
        lanes = combine(*lanes.chunk(2, -1))
    return lanes


def gpu_fold(rows: Tensor, combine: Combine = torch.add, neutral: float = 0.0) -> Tensor:
    """``fold`` in the order of a GPU."""
    order = gpu_order_for(rows.shape[-1], rows.dtype)
    start = torch.full((*rows.shape[:-1], order.lanes), neutral, dtype=rows.dtype)
    sections = []
    for section in rows.split(order.section, -1):
        padded = F.pad(section, (0, -section.shape[-1] % order.lanes), value=neutral)
        lanes = functools.reduce(combine, padded.split(order.lanes, -1), start)
        while lanes.shape[-1] > 1:
            lanes = combine(lanes[..., 0::2], lanes[..., 1::2])
        sections.append(lanes)
    return sections[0] if len(sections) == 1 else gpu_fold(torch.cat(sections, -1), combine, neutral)


def moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of each row and the sum of squared distances from it, in the order of the CPU: two passes."""
    mean = fold(rows) / count(rows)
    distance = rows - mean
    return mean, fold(distance * distance)


def gpu_moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """``moments`` on a GPU: those of each section, then merged, again and again until one is left."""
    section = gpu_order_for(rows.shape[-1], rows.dtype).section
    sums, means, m2s, counts = [], [], [], []
    for part in rows.split(section, -1):
        sums.append(gpu_fold(part))
        means.append(sums[-1] / count(part))
        m2s.append(gpu_fold((part - means[-1]).square()))
        counts.append(part.shape[-1])
    while len(sums) > 1:
        groups = [slice(i, i + section) for i in range(0, len(sums), section)]
        sizes = [builtins.sum(counts[group]) for group in groups]
        totals = [gpu_fold(torch.cat(sums[group], -1)) for group in groups]
        centers = [total / size for total, size in zip(totals, sizes, strict=True)]
        merged = []
        for group, center in zip(groups, centers, strict=True):
            distance = torch.cat(means[group], -1) - center
            weight = torch.tensor(counts[group], dtype=rows.dtype)
            merged.append(gpu_fold(torch.cat(m2s[group], -1) + weight * (distance * distance)))
        sums, means, m2s, counts = totals, centers, merged, sizes
    return means[0], m2s[0]


def finished(rows: Tensor, x: Tensor, dim: Sequence[int], keepdim: bool, dtype: torch.dtype) -> Tensor:
    """Results of ``fold`` in the shape that the op returns, rounded to ``dtype``, every NaN the canonical one."""
    dims = {d % max(x.dim(), 1) for d in dim} or set(range(x.dim()))
    shape = [1 if d in dims else s for d, s in enumerate(x.shape) if keepdim or d not in dims]
    return canonical(rows.reshape(shape).to(dtype))


def canonical(x: Tensor) -> Tensor:
    """``x`` with every NaN replaced by the one positive quiet NaN without payload."""
    return torch.where(x.isnan(), math.nan, x)


def count(rows: Tensor) -> Tensor:
    """The number of elements of one row, in the dtype of ``rows``."""
    return torch.full((1,), rows.shape[-1], dtype=rows.dtype)


def exp(x: Tensor) -> Tensor:
    """The kernels' exponential, from ``elementwise/math.h``."""
    return torch.ops.bicompile.unary(x, "exp")


def log(x: Tensor) -> Tensor:
    """The kernels' natural logarithm, from ``elementwise/math.h``."""
    return torch.ops.bicompile.unary(x, "log")


def largest(rows: Tensor) -> Tensor:
    """The largest element of each row, +0 for -0, NaN skipped."""
    return rows.nan_to_num(-INFINITY, INFINITY, -INFINITY).amax(-1, keepdim=True) + 0.0


def sum(x: Tensor, dim: Sequence[int], keepdim: bool, dtype: torch.dtype, fold: Fold = fold) -> Tensor:
    return finished(fold(rows_of(x, dim, dtype)), x, dim, keepdim, dtype)


def mean(x: Tensor, dim: Sequence[int], keepdim: bool, dtype: torch.dtype, fold: Fold = fold) -> Tensor:
    rows = rows_of(x, dim, dtype)
    return finished(fold(rows) / count(rows), x, dim, keepdim, dtype)


def sum_square(x: Tensor, dim: Sequence[int], keepdim: bool, dtype: torch.dtype, fold: Fold = fold) -> Tensor:
    rows = rows_of(x, dim, dtype)
    return finished(fold(rows * rows), x, dim, keepdim, dtype)


def mean_square(x: Tensor, dim: Sequence[int], keepdim: bool, dtype: torch.dtype, fold: Fold = fold) -> Tensor:
    rows = rows_of(x, dim, dtype)
    return finished(fold(rows * rows) / count(rows), x, dim, keepdim, dtype)


def prod(x: Tensor, dim: Sequence[int], keepdim: bool, dtype: torch.dtype, fold: Fold = fold) -> Tensor:
    return finished(fold(rows_of(x, dim, dtype), torch.mul, 1.0), x, dim, keepdim, dtype)


def larger(a: Tensor, b: Tensor) -> Tensor:
    """The larger of two: NaN if either is, +0 above -0."""
    return torch.where(a == b, torch.where(a.signbit(), b, a), torch.maximum(a, b))


def amax(x: Tensor, dim: Sequence[int], keepdim: bool, dtype: torch.dtype, fold: Fold = fold) -> Tensor:
    return finished(fold(rows_of(x, dim, dtype), larger, -INFINITY), x, dim, keepdim, dtype)


def amin(x: Tensor, dim: Sequence[int], keepdim: bool, dtype: torch.dtype, fold: Fold = fold) -> Tensor:
    return canonical(-amax(-x, dim, keepdim, dtype, fold))


def var(
    x: Tensor,
    dim: Sequence[int],
    correction: float,
    keepdim: bool,
    root: bool,
    moments: Moments = moments,
) -> tuple[Tensor, Tensor]:
    rows = rows_of(x, dim, x.dtype)
    center, m2 = moments(rows)
    degrees = torch.full((1,), max(rows.shape[-1] - correction, 0.0), dtype=rows.dtype)
    result = m2 / degrees
    result = sqrt(result) if root else result
    return finished(result, x, dim, keepdim, x.dtype), finished(center, x, dim, keepdim, x.dtype)


def sqrt(x: Tensor) -> Tensor:
    """The correctly rounded square root of numbers that are not negative; ``torch.sqrt`` on CPU is not."""
    values = [math.sqrt(value) for value in x.flatten().tolist()]
    return torch.tensor(values, dtype=torch.float64).to(x.dtype).reshape(x.shape)


def power(x: Tensor, exponent: float) -> Tensor:
    """libm's own ``pow``, one number at a time, in the precision of ``x``."""
    libm = ctypes.CDLL(ctypes.util.find_library("m"))
    double = x.dtype == torch.float64
    function, number = (libm.pow, ctypes.c_double) if double else (libm.powf, ctypes.c_float)
    function.restype, function.argtypes = number, (number, number)
    values = [function(value, exponent) for value in x.flatten().tolist()]
    return torch.tensor(values, dtype=x.dtype).reshape(x.shape)


def vector_norm(
    x: Tensor, ord: float, dim: Sequence[int], keepdim: bool, dtype: torch.dtype, fold: Fold = fold
) -> Tensor:
    rows = rows_of(x, dim, dtype)
    if ord == 0:
        result = fold((rows != 0).to(rows.dtype))
    elif ord == 1:
        result = fold(rows.abs())
    elif ord == 2:
        result = sqrt(fold(rows * rows))
    elif ord == INFINITY:
        result = fold(rows.abs(), larger, -INFINITY)
    elif ord == -INFINITY:
        result = -fold(-rows.abs(), larger, -INFINITY)
    else:
        result = power(fold(power(rows.abs(), ord)), float(1 / torch.tensor(ord, dtype=rows.dtype)))
    return finished(result, x, dim, keepdim, dtype)


def logsumexp(x: Tensor, dim: Sequence[int], keepdim: bool) -> Tensor:
    rows = rows_of(x, dim, x.dtype)
    top = largest(rows) if rows.shape[-1] else torch.full((*rows.shape[:-1], 1), -INFINITY, dtype=rows.dtype)
    shift = torch.where(top.isinf(), 0.0, top)
    return finished(log(fold(exp(rows - shift))) + shift, x, dim, keepdim, x.dtype)
