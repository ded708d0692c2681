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


@dataclass(frozen=True)
class GpuMatmulOrder:
    """One chain over ascending k, from +0: each step adds the products of ``group`` neighbouring k to the accumulator.

    What happens inside a group is up to the tensor core, which adds the group's products and the accumulator as one
    sum; without a tensor core, ``group`` is 1 and each step is one fused multiply-add.  The end of the chain is
    rounded once to the output type; what ``addmm`` adds is added after that, in the output type.

    K is never cut: a split over programs, or a second accumulator, would be another order.
    """

    length: int
    """How many products are added: K."""
    group: int
    """How many k one step takes; those past the end count as 0."""
    accumulator: torch.dtype
    """The type of the chain."""
    factor_bits: int
    """Significant bits of a factor: 11 for TF32, to which float32 factors are then rounded; else all of the type."""


_GPU_GROUPS = {
    torch.bfloat16: 16,
    torch.float16: 16,
    torch.float32: 1,
    torch.float64: 1,
    torch.float8_e4m3fn: 32,
    torch.float8_e5m2: 32,
}
_FACTOR_BITS = {
    torch.bfloat16: 8,
    torch.float16: 11,
    torch.float32: 24,
    torch.float64: 53,
    torch.float8_e4m3fn: 4,
    torch.float8_e5m2: 3,
}


def gpu_order_for(length: int, dtype: torch.dtype, tf32: bool = False) -> GpuMatmulOrder:
    """The one order on a GPU.  ``tf32``: the user lets torch round float32 factors to TF32."""
    rounded = tf32 and dtype == torch.float32
    return GpuMatmulOrder(
        length=length,
        group=8 if rounded else _GPU_GROUPS[dtype],
        accumulator=torch.float64 if dtype == torch.float64 else torch.float32,
        factor_bits=11 if rounded else _FACTOR_BITS[dtype],
    )
