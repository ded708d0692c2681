"""``embedding_bag`` as gathers and sums by index: each bag adds its rows in ascending order (``lowering.scatter``).

Sums and means of half precisions are added in float32 and rounded once.  A bag's sum depends on its own indices alone;
the gradient of the table sums over all bags, in ascending order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from .errors import UnsupportedOpError

aten = torch.ops.aten
_SUM, _MEAN, _MAX = 0, 1, 2


def wide(x: Tensor) -> Tensor:
    """Half precisions in float32."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = _SUM,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The bags' rows [bags, depth]; of each index its bag; the bags' sizes; and of mode max where the largest are."""
    indices, offsets = indices.long(), offsets.long()
    starts = offsets[:-1] if include_last_offset else offsets
    place = torch.arange(indices.shape[0], device=indices.device)
    bag = torch.searchsorted(starts, place, right=True) - 1
    counted = indices != padding_idx
    sizes = starts.new_zeros(starts.shape).index_add(0, bag, counted.long())
    rows = wide(weight[indices])
    shape = (starts.shape[0], weight.shape[1])
    if mode == _MAX:
        result, largest = _largest(rows, indices, bag, counted, sizes, shape)
        return result.to(weight.dtype), bag, sizes, largest
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(1)
    result = rows.new_zeros(shape).index_add(0, bag, torch.where(counted.unsqueeze(1), rows, 0.0))
    if mode == _MEAN:
        result = result / sizes.clamp(min=1).unsqueeze(1)
    return result.to(weight.dtype), bag, sizes, sizes


def _largest(
    rows: Tensor, indices: Tensor, bag: Tensor, counted: Tensor, sizes: Tensor, shape: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """The largest number of each bag and column, 0 for an empty bag; and the index of the first row that has it."""
    to = bag.unsqueeze(1).expand_as(rows)
    rows = torch.where(counted.unsqueeze(1), rows, -torch.inf)
    result = torch.full(shape, -torch.inf, dtype=rows.dtype, device=rows.device).scatter_reduce(0, to, rows, "amax")
    place = torch.arange(indices.shape[0], device=indices.device).unsqueeze(1)
    there = counted.unsqueeze(1) & ((rows == result[bag]) | rows.isnan())
    nowhere = indices.shape[0]
    first = torch.full(shape, nowhere, dtype=torch.int64, device=rows.device)
    first = first.scatter_reduce(0, to, torch.where(there, place, nowhere), "amin")
    largest = torch.cat([indices, indices.new_zeros(1)])[first]
    return torch.where(sizes.unsqueeze(1) == 0, 0.0, result), largest


def _backward(
    grad: Tensor,
    indices: Tensor,
    offsets: Tensor,
    offset2bag: Tensor,
    bag_size: Tensor,
    maximum_indices: Tensor,
    num_weights: int,
    scale_grad_by_freq: bool,
    mode: int,
    sparse: bool,
    per_sample_weights: Tensor | None,
    padding_idx: int = -1,
) -> Tensor:
    if sparse:
        raise UnsupportedOpError(
            "aten.embedding_bag: expected sparse=False where the table wants a gradient, got True, which asks for a "
            "sparse tensor. Leave sparse out."
        )
    indices = indices.long()
    rows = wide(grad)
    if mode == _MAX:
        rows = torch.where(bag_size.unsqueeze(1) == 0, 0.0, rows)
        table = rows.new_zeros(num_weights, grad.shape[1]).scatter_add(0, maximum_indices, rows)
        return table.to(grad.dtype)
    rows = rows[offset2bag]
    if mode == _MEAN:
        rows = rows / bag_size.clamp(min=1)[offset2bag].unsqueeze(1)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(1)
    if scale_grad_by_freq:
        counts = indices.new_zeros(num_weights).index_add(0, indices, torch.ones_like(indices))
        rows = rows / counts[indices].unsqueeze(1)
    rows = torch.where((indices != padding_idx).unsqueeze(1), rows, 0.0)
    return rows.new_zeros(num_weights, grad.shape[1]).index_add(0, indices, rows).to(grad.dtype)


def _weights_backward(
    grad: Tensor,
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    offset2bag: Tensor,
    mode: int,
    padding_idx: int = -1,
) -> Tensor:
    products = (wide(grad)[offset2bag] * wide(weight[indices.long()])).sum(1)
    return torch.where(indices != padding_idx, products, 0.0).to(grad.dtype)


NORMAL_FORMS: dict[OpOverload, Callable[..., Any]] = {
    aten._embedding_bag.default: _embedding_bag,
    aten._embedding_bag_forward_only.default: _embedding_bag,
    aten._embedding_bag_backward.default: _backward,
    aten._embedding_bag_per_sample_weights_backward.default: _weights_backward,
}
