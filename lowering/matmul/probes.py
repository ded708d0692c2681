"""Inputs that expose the order of additions, laid out in memory like the problem that a schedule is wanted for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .problem import ALIGNED, Factor, Problem

KINDS = ("binades", "cancelling", "swamping")
_SWAMPING = {
    torch.float64: (2.0**40, 2.0**-30),
    torch.float8_e4m3fn: (2.0**8, 2.0**-9),
    torch.float8_e5m2: (2.0**8, 2.0**-9),
}
"""The huge and the small element, where the type or its accumulator asks for others than float16 can hold."""
_FEW = 64
_PERIOD = 512
"""No block of k is longer: sizes that agree modulo this are ragged, or not, for every schedule alike."""


def small_probes(problem: Problem, block_m: int, block_n: int) -> list[Problem]:
    """Problems compiled like ``problem``, with a few tiles, for schedules of our own.

    K is long enough to show a cut of up to 4096 k.
    """
    n = 2 * block_n + problem.n % ALIGNED if problem.n % ALIGNED else 2 * block_n + ALIGNED
    k = 10 * _PERIOD + problem.k % _PERIOD
    return [_resized(problem, m, n, k) for m in (block_m + 3, 1)]


def full_probes(problem: Problem, limit: int) -> list[Problem]:
    """Problems with ``problem``'s own N and K, for a library whose choices may follow them.

    Args:
        problem: what the schedule is wanted for.
        limit: elements that a factor may have; where ``b`` has more, it gets fewer columns.
    """
    n = problem.n
    while n * problem.k > limit and n > 2 * _FEW:
        n = n // 2 // _FEW * _FEW + problem.n % _FEW
    most = max(1, limit // max(problem.k, n))
    rows = {min(m, most) for m in (problem.m, 1, 200, 1111)}
    return [_resized(problem, m, n, problem.k) for m in sorted(rows)]


def factors(problem: Problem, device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """``a``, ``b`` and the addend (or None) of each kind of probe."""
    generator = torch.Generator(device).manual_seed(problem.m + problem.n + problem.k)
    for kind in KINDS:
        a, b = _values(kind, problem, generator)
        addend = a.new_empty(problem.n).normal_(generator=generator) if problem.add else None
        shape = (problem.batch, problem.m, problem.n) if problem.batch > 1 else (problem.m, problem.n)
        c = None if addend is None else addend.to(problem.out).expand(shape)
        yield _placed(a, problem.a, problem.dtype), _placed(b, problem.b, problem.dtype), c


def _values(kind: str, problem: Problem, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``[B, M, K]`` and ``[B, K, N]`` in float32 or float64.

    ``binades``: random, over many powers of two.  ``cancelling``: neighbours that nearly cancel, so that what is left
    of a sum are its rounding errors.  ``swamping``: in each row a huge element, and later its negative, among equal
    small ones; what is added between the two is lost, and the sum counts the rest.
    """
    p, wide = problem, torch.float64 if problem.dtype == torch.float64 else torch.float32
    options: dict[str, Any] = {"device": generator.device, "dtype": wide}

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, **options)

    if kind == "swamping":
        huge, small = _SWAMPING.get(p.dtype, (2.0**15, 2.0**-14))
        a = torch.full((p.batch, p.m, p.k), small, **options)
        first = torch.randint(max(p.k // 2, 1), (p.batch, p.m, 1), generator=generator, device=generator.device)
        length = torch.randint(max(p.k // 2, 1), (p.batch, p.m, 1), generator=generator, device=generator.device)
        a.scatter_(2, first, huge)
        a.scatter_(2, (first + length).clamp(max=p.k - 1), -huge)
        b = torch.ones(p.batch, p.k, p.n, **options)
        return a, b * torch.exp2(torch.arange(p.n, device=b.device) % 4 - 4.0).to(wide)
    a, b = normal(p.batch, p.m, p.k), normal(p.batch, p.k, p.n)
    if kind == "binades":
        a *= torch.exp2(torch.randint(-9, 4, a.shape, generator=generator, device=a.device, dtype=torch.int16).to(wide))
        return a, b * torch.exp2(
            torch.randint(-5, 3, b.shape, generator=generator, device=b.device, dtype=torch.int16).to(wide)
        )
    even, odd = a[..., 0 : p.k // 2 * 2 : 2], a[..., 1::2]
    odd.copy_(even * -(1 + 2.0**-7))
    b[:, 1::2] = b[:, 0 : p.k // 2 * 2 : 2]
    return a, b


def _resized(problem: Problem, m: int, n: int, k: int) -> Problem:
    """The same layout, alignment and raggedness with other sizes."""
    p = problem
    return replace(p, m=m, n=n, k=k, a=_strides(p.a, m, k), b=_strides(p.b, k, n), batch=min(p.batch, 2))


def _strides(factor: Factor, rows: int, columns: int) -> Factor:
    """Strides for other sizes, with the same remainders by 16 as the old ones."""
    f = factor
    if f.column == 1:
        row, column = _at_least(columns, f.row), 1
        step = _at_least(rows * row, f.step)
    elif f.row == 1:
        row, column = 1, _at_least(rows, f.column)
        step = _at_least(columns * column, f.step)
    else:
        column = _at_least(2, f.column)
        row = _at_least(columns * column, f.row)
        step = _at_least(rows * row, f.step)
    return replace(f, row=row, column=column, step=step if f.step else 0)


def _at_least(least: int, like: int) -> int:
    """The least number from ``least`` on that has ``like``'s remainder by 16."""
    return least + (like - least) % ALIGNED


def _placed(values: Tensor, factor: Factor, dtype: torch.dtype) -> Tensor:
    """``values`` as ``dtype``, in memory as ``factor`` says; 2-D where there is one matrix."""
    batch, rows, columns = values.shape
    steps = (factor.step if batch > 1 else 0, factor.row, factor.column)
    offset = 0 if factor.aligned else 1
    extent = sum((size - 1) * step for size, step in zip(values.shape, steps, strict=True)) + 1
    memory = torch.zeros(extent + offset, dtype=dtype, device=values.device)
    placed = memory.as_strided((batch, rows, columns), steps, offset)
    if dtype.itemsize == 1:  # a larger number would become NaN
        most = torch.finfo(dtype).max
        values = values.clamp(-most, most)
    if factor.step or batch == 1:
        placed.copy_(values)
    else:  # one matrix for all of the batch
        placed[0].copy_(values[0])
    return placed if batch > 1 else placed[0]
