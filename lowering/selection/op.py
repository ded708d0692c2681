"""``bicompile::topk``: the ``k`` largest or smallest elements along a dim, of equal ones the first.

PyTorch's GPU kernels take whichever of equal elements a thread meets first, and choose the kernel by the number of
rows.  Here value and place make one integer key.  No two keys are equal, so every algorithm picks the same.

Numerics: exact.  NaN counts as the largest, -0.0 equals 0.0, as in ``torch.topk``; results are sorted.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
_LIB = torch.library.Library("bicompile", "FRAGMENT")
_LIB.define("topk(Tensor x, int k, int dim, bool largest) -> (Tensor, Tensor)", tags=_TAGS)

_NARROW = (torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int16, torch.int8, torch.uint8)
_PLACES = 1 << 32


@torch.library.register_fake("bicompile::topk", lib=_LIB)
def _(x: Tensor, k: int, dim: int, largest: bool) -> tuple[Tensor, Tensor]:
    shape = list(x.shape)
    if shape:
        torch._check(
            k <= shape[dim], lambda: f"bicompile::topk: expected k of at most {shape[dim]}, got {k}; take fewer"
        )
        shape[dim] = k
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int64)


def _topk(x: Tensor, k: int, dim: int, largest: bool) -> tuple[Tensor, Tensor]:
    if x.dim() == 0:
        return x.clone(), torch.zeros_like(x, dtype=torch.int64)
    if x.dtype in _NARROW:
        _, indices = torch.topk(_keys(x, dim, largest), k, dim, largest, True)
    else:
        indices = torch.sort(x, dim=dim, descending=largest, stable=True).indices.narrow(dim, 0, k)
    indices = indices.contiguous()
    return x.gather(dim, indices).contiguous(), indices


def _keys(x: Tensor, dim: int, largest: bool) -> Tensor:
    """int64 in the order of ``x``'s elements; of equal ones the first has the largest key, or the smallest."""
    if x.is_floating_point():
        wide = x.float() + 0.0  # makes 0.0 of -0.0
        bits = wide.view(torch.int32)
        ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
        ordered = torch.where(wide.isnan(), 0x7FFFFFFF, ordered)
    else:
        ordered = x.long()
    places = torch.arange(x.shape[dim], device=x.device)
    places = places.view(-1, *[1] * (x.dim() - 1 - dim % x.dim()))
    return ordered * _PLACES + (_PLACES - 1 - places if largest else places)


_LIB.impl("topk", _topk, "CompositeExplicitAutograd")
