"""``bicompile::windows``: every window of an image as the columns of a matrix, on the CPU.

Of ``x``, [N, C, *S] of 1 to 3 spatial dims, window ``p`` (positions ascending, the last dim fastest) becomes column
``p``, its elements by (channel, kernel position) ascending.  The result is contiguous: [N, C * taps, positions], or
[C * taps, N * positions] with ``across``, where the columns of all samples stand side by side.

Inductor writes such a copy element by element, with divisions for each, and shares it out by samples only.

Numerics: exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
_LIB = torch.library.Library("bicompile", "FRAGMENT")
_LIB.define("windows(Tensor x, int[] kernel, int[] stride, int[] dilation, bool across) -> Tensor", tags=_TAGS)

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def positions_of(
    sizes: Sequence[Any], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> list[Any]:
    """How many windows lie along each spatial dim."""
    return [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(sizes, kernel, stride, dilation, strict=True)]


@torch.library.register_fake("bicompile::windows", lib=_LIB)
def _(x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], across: bool) -> Tensor:
    got = f"{x.dtype} of shape {tuple(x.shape)}, kernel {list(kernel)}"
    torch._check(
        x.dim() in (3, 4, 5) and len(kernel) == len(stride) == len(dilation) == x.dim() - 2,
        lambda: f"bicompile::windows: expected x of [N, C, *S] and a kernel, stride and dilation for each S, got {got}",
    )
    torch._check(x.dtype in _FLOATS, lambda: f"bicompile::windows: expected a floating-point x, got {got}")
    found = positions_of(x.shape[2:], kernel, stride, dilation)
    for count in found:
        torch._check(count > 0, lambda: f"bicompile::windows: expected x to hold one window at least, got {got}")
    columns, positions = x.shape[1] * math.prod(kernel), math.prod(found)
    shape = (columns, x.shape[0] * positions) if across else (x.shape[0], columns, positions)
    return x.new_empty(shape)
