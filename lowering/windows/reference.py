"""``bicompile::windows`` as views and copies."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def windows(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    before: Sequence[int],
    after: Sequence[int],
    between: Sequence[int],
    across: bool,
) -> Tensor:
    """See ``op.py``."""
    for dim, apart in enumerate(between, 2):
        spread = x.new_zeros([*x.shape[:dim], (x.shape[dim] - 1) * apart + 1, *x.shape[dim + 1 :]])
        spread.movedim(dim, 0)[::apart] = x.movedim(dim, 0)
        x = spread
    x = F.pad(x, [n for pair in reversed(list(zip(before, after, strict=True))) for n in pair])
    for dim, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True), 2):
        x = x.unfold(dim, d * (k - 1) + 1, s)[..., ::d]
    # [N, C, *positions, *kernel] -> [N, C, *kernel, *positions]
    dims = len(kernel)
    x = x.permute(0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims)).flatten(1, 1 + dims).flatten(2)
    return x.transpose(0, 1).flatten(1) if across else x.contiguous()
