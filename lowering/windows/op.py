"""``bicompile::windows``: every window of an image as the columns of a matrix, on a CPU; ``mm_windows``: its products.

The image is ``x``, [N, C, *S] of 1 to 3 spatial dims, with ``between - 1`` zeros between its elements along each of
these, and ``before`` and ``after`` zeros around them; a negative count takes elements away.  Window ``p`` (positions
ascending, the last dim fastest) becomes column ``p``, its elements by (channel, kernel position) ascending.  The result
is contiguous: [N, C * taps, positions], or [C * taps, N * positions] with ``across``, where the columns of all samples
stand side by side.

Inductor writes such a copy element by element, with divisions for each, and shares it out by samples only.

``mm_windows(factors, x, ...)`` is the product of ``factors``, [G, R, C / G * taps], with the windows of ``x``, which
are never written out: [N, R, positions] of one group, or [G, R, N * positions] with ``across``, where each group of
factors meets its part of the channels.  ``mm_windows_transposed(factors, x, ...)`` is [G, R, C / G * taps], of factors
[G, R, N * positions].

``interleaved(phases, strides)`` is [N, C, *S * strides] of [P, N, C, *S], whose phases are numbered with the last dim
fastest: an element of phase f lies at the places that are f by the strides.

Numerics: ``windows`` and ``interleaved`` are exact, the products have the order of ``bicompile::mm`` and its bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
_LIB = torch.library.Library("bicompile", "FRAGMENT")
_IMAGE = "Tensor x, int[] kernel, int[] stride, int[] dilation, int[] before, int[] after, int[] between"
_LIB.define(f"windows({_IMAGE}, bool across) -> Tensor", tags=_TAGS)
_LIB.define(f"mm_windows(Tensor factors, {_IMAGE}, bool across) -> Tensor", tags=_TAGS)
_LIB.define(f"mm_windows_transposed(Tensor factors, {_IMAGE}) -> Tensor", tags=_TAGS)
_LIB.define("interleaved(Tensor phases, int[] strides) -> Tensor", tags=_TAGS)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def positions_of(
    sizes: Sequence[Any], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> list[Any]:
    """How many windows lie along each spatial dim of an image of ``sizes``."""
    return [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(sizes, kernel, stride, dilation, strict=True)]


@torch.library.register_fake("bicompile::windows", lib=_LIB)
def _(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    before: Sequence[int],
    after: Sequence[int],
    between: Sequence[int],
    across: bool,
) -> Tensor:
    positions = _positions("windows", x, kernel, stride, dilation, before, after, between)
    columns = x.shape[1] * math.prod(kernel)
    shape = (columns, x.shape[0] * positions) if across else (x.shape[0], columns, positions)
    return x.new_empty(shape)


@torch.library.register_fake("bicompile::mm_windows", lib=_LIB)
def _(
    factors: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    before: Sequence[int],
    after: Sequence[int],
    between: Sequence[int],
    across: bool,
) -> Tensor:
    positions = _positions("mm_windows", x, kernel, stride, dilation, before, after, between)
    _check_factors(
        "mm_windows",
        factors,
        x,
        lambda groups, terms: groups * terms == x.shape[1] * math.prod(kernel) and (across or groups == 1),
        "[groups, rows, channels of a group * taps], and one group unless across",
    )
    groups, rows, _ = factors.shape
    return x.new_empty((groups, rows, x.shape[0] * positions) if across else (x.shape[0], rows, positions))


@torch.library.register_fake("bicompile::mm_windows_transposed", lib=_LIB)
def _(
    factors: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    before: Sequence[int],
    after: Sequence[int],
    between: Sequence[int],
) -> Tensor:
    positions = _positions("mm_windows_transposed", x, kernel, stride, dilation, before, after, between)
    _check_factors(
        "mm_windows_transposed",
        factors,
        x,
        lambda groups, terms: groups > 0 and x.shape[1] % groups == 0 and terms == x.shape[0] * positions,
        "[groups, rows, samples * positions]",
    )
    return x.new_empty(*factors.shape[:2], x.shape[1] // factors.shape[0] * math.prod(kernel))


@torch.library.register_fake("bicompile::interleaved", lib=_LIB)
def _(phases: Tensor, strides: Sequence[int]) -> Tensor:
    torch._check(
        phases.dim() == 3 + len(strides) and 1 <= len(strides) <= 3 and phases.shape[0] == math.prod(strides),
        lambda: (
            "bicompile::interleaved: expected contiguous phases of [strides' product, N, C, *S] and one stride for "
            f"each S, got shape {tuple(phases.shape)}, strides {list(strides)}"
        ),
    )
    sizes = [count * stride for count, stride in zip(phases.shape[3:], strides, strict=True)]
    return phases.new_empty(*phases.shape[1:3], *sizes)


def _check_factors(op: str, factors: Tensor, x: Tensor, fit: Callable[[Any, Any], Any], expected: str) -> None:
    torch._check(
        factors.dtype == x.dtype,
        lambda: f"bicompile::{op}: expected one dtype, got {factors.dtype} and {x.dtype}; convert one of them",
    )
    torch._check(
        factors.dim() == 3 and fit(factors.shape[0], factors.shape[2]),
        lambda: (
            f"bicompile::{op}: expected factors of {expected}, got shape {tuple(factors.shape)} for x of shape "
            f"{tuple(x.shape)}"
        ),
    )


def _positions(op: str, x: Tensor, kernel: Sequence[int], *others: Sequence[int]) -> Any:
    """How many windows a sample has, after the checks."""
    stride, dilation, before, after, between = others
    got = f"{x.dtype} of shape {tuple(x.shape)}, kernel {list(kernel)}"
    torch._check(
        x.dim() in (3, 4, 5) and all(len(each) == x.dim() - 2 for each in (kernel, *others)),
        lambda: f"bicompile::{op}: expected x of [N, C, *S] and one number for each S, got {got}",
    )
    torch._check(x.dtype in DTYPES, lambda: f"bicompile::{op}: expected a floating-point x, got {got}")
    sizes = [(n - 1) * s + 1 + b + a for n, s, b, a in zip(x.shape[2:], between, before, after, strict=True)]
    found = positions_of(sizes, kernel, stride, dilation)
    for count in found:
        torch._check(count > 0, lambda: f"bicompile::{op}: expected x to hold one window at least, got {got}")
    return math.prod(found)
