"""The order of a matrix product: which operations make one output element, and in which sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class MatmulOrder:
    """A chain of fused multiply-adds in each block of k, from +0, and the blocks' sums added up in ascending order.

    The total is rounded once to the output type; what ``addmm`` adds is added after that, in the output type.

    The blocks make long products several times as accurate as one chain, and are short enough for the operands of
    one block to stay in the cache.  bfloat16 follows ``vdpbf16ps``: elements in pairs, the odd one first, denormal
    numbers taken as zero.  Processors without that instruction do the same with fused multiply-adds.
    """

    length: int
    """How many products are added: K."""
    block: int
    """How many k each chain takes."""
    accumulator: torch.dtype
    """The type of the chain and of the sums of blocks."""
    odd_first: bool
    """Whether k = 2j + 1 comes before k = 2j; an odd one that is missing counts as +0."""
    flush_denormals: bool
    """Whether each step takes denormal numbers, going in or coming out, as zero of their sign."""


def order_for(length: int, dtype: torch.dtype) -> MatmulOrder:
    """The one order of a product over ``length`` elements.  Rows and columns are not parameters: they cannot matter."""
    pairs = dtype == torch.bfloat16
    return MatmulOrder(
        length=length,
        block=192,
        accumulator=torch.float64 if dtype == torch.float64 else torch.float32,
        odd_first=pairs,
        flush_denormals=pairs,
    )
