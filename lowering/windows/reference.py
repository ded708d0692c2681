"""``bicompile::windows`` as views and one copy."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def windows(x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], across: bool) -> Tensor:
    """See ``op.py``."""
    dims = len(kernel)
    for dim, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True), 2):
        x = x.unfold(dim, d * (k - 1) + 1, s)[..., ::d]
    # [N, C, *positions, *kernel] -> [N, C, *kernel, *positions]
    x = x.permute(0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims)).flatten(1, 1 + dims).flatten(2)
    return x.transpose(0, 1).flatten(1) if across else x.contiguous()
