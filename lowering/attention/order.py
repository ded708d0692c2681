"""The order of attention: which operations make an output row, and in which sequence.

A query row sees keys.  *Score*: the matmul order over the head's depth (FMA chains from +0, ascending, in blocks of
``block``, blocks added in ascending order), times the scale, plus the additive mask.  *Weight*: ``exp(score - max)``
with the exact maximum over the keys that the row sees.  A key that the row does not see (causal, boolean mask,
additive mask of -inf) has weight zero, and **a key of weight zero adds nothing, even if its key or value holds NaN or
Inf**: what lies in padding is invisible.  *Sum over keys*: FMA chains, ascending, in blocks of ``block`` keys counted
from the row's first key with a weight above zero; block sums are added to +0 in ascending order.  The weights' own sum
takes ``lanes`` running sums inside each block (key mod ``lanes`` from the same first key), adds the blocks lane by
lane, then halves the lanes.  The output is the quotient of the two sums, rounded once.

So trailing keys, leading keys, the number of queries and the number of heads that share a key cannot show: prefill,
chunked prefill and decode are one order, whatever the padding.

Backward: ``P = weight / sum``, ``dP`` the score order over the value's depth, ``delta`` one such chain over
``grad * out``, ``dS = P * (dP - delta)`` and 0 where ``P`` is 0.  ``dq``: the sum over keys above with ``dS`` for
weights, times the scale.  ``dk`` and ``dv``: for each query head the sum over queries in the same way, blocks counted
from the first query that gives the key a ``P`` above zero; then the heads of the group in ascending order.  The mask's
gradient: ``dS`` summed over the dims in which the mask was broadcast, one by one in ascending order.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AttentionOrder:
    """Accumulator dtype, numbers in one FMA chain (of depth or of keys), and running sums of the weights."""

    accumulator: torch.dtype
    block: int
    lanes: int


def order_for(dtype: torch.dtype) -> AttentionOrder:
    """The one order for ``dtype``.  Batch, heads, queries and keys are no parameters: they cannot matter."""
    return AttentionOrder(torch.float64 if dtype == torch.float64 else torch.float32, block=192, lanes=32)


_NO_END = 2**30


@dataclass(frozen=True)
class GpuAttentionOrder:
    """The order on a GPU, on a grid of keys counted from the row's first key (its *anchor*).

    *Seen*: a query row sees a key that neither causality nor the boolean mask hides, and whose additive mask is above
    ``hidden_below``.  The anchor is the first key that the row sees, so leading and trailing keys, other documents of a
    packed row and what padded queries see cannot show.

    *Score*: the tensor core's chain over the depth in ascending groups, from +0; fp32 and fp64 by IEEE FMA chains.
    *Inside a split*, from a fresh state, blocks of ``block`` keys in ascending order: running maximum ``m`` in the
    log2 domain, weights ``exp2(fma(score, scale * log2(e), bias - m))``, what was summed so far times
    ``exp2(m_before - m)``, then the tensor core's chain over the block's keys.  The weights' own sum folds the block's
    halves until ``lanes`` are left, adds those to the running lanes, and folds the lanes at the split's end.
    *Splits* are merged in ascending order: ``fma(total, exp2(M - max), part * exp2(m - max))``.  A split's size is a
    function of its first key's distance from the anchor: ``splits`` are pairs (from this distance on, this size).

    A hidden key adds nothing, whatever it and its value hold.  A value of NaN or Inf in a key that the row sees makes
    that column of the row NaN.

    Dropout: the weights' own sum has all weights; in the weighted sum those that are dropped are 0, and the others are
    multiplied by ``1 / (1 - p)`` before they are rounded to the values' dtype.  What is dropped follows from the row's
    seed and the key's distance from the row's first key under the mask.  Backward: ``dP`` likewise, and the weights
    that ``dv`` takes.

    Backward: ``P = exp2(fma(score, scale * log2(e), bias - lse))``; ``dq``: one chain over keys from the anchor;
    ``dk``, ``dv``: one chain over the group's heads in ascending order, inside a head over queries counted from the
    first query of the batch row that sees any key.
    """

    block: int
    lanes: int
    splits: tuple[tuple[int, int], ...]

    @functools.cached_property
    def levels(self) -> tuple[tuple[int, int, int], ...]:
        """``splits`` as (from this distance on, up to this one, this size), for the kernels."""
        ends = (*(start for start, _ in self.splits[1:]), _NO_END)
        return tuple((start, end, size) for (start, size), end in zip(self.splits, ends, strict=True))

    def split_starts(self, keys: int) -> list[int]:
        """Where the splits of ``keys`` keys start."""
        return [n for start, end, size in self.levels for n in range(start, min(end, keys), size)]

    def num_splits(self, keys: int, span: int = 1) -> int:
        """How many splits ``keys`` keys have, where those shorter than ``span`` keys together count as one."""
        found = 0
        for start, end, size in self.levels:
            step = max(size, span)
            found += max(-(-min(end, keys) // step) - -(-start // step), 0)
        return found

    def even_until(self, span: int) -> int:
        """The keys up to which no split is longer than ``span`` keys."""
        return next((start for start, _, size in self.levels if size > span), _NO_END)


@functools.cache
def gpu_order_for(depth: int, dtype: torch.dtype) -> GpuAttentionOrder:
    """The one order on a GPU for heads of ``depth`` (the larger of the keys' and the values') and ``dtype``."""
    if dtype == torch.float64:
        block = 16
    elif dtype == torch.float32:
        block = 32
    else:
        block = 128 if depth <= 128 else 64
    # The maximum is exact. Rounded up to a power of two it would leave the block free, but each weight then needs the
    # exponent of its score split off, and that took longer than another block saves (prefill on an H200).
    # Small enough for one sequence with 8 heads of keys to fill the device, large enough for few to be merged.
    return GpuAttentionOrder(block=block, lanes=8, splits=((0, 512), (8192, 1024), (16384, 2048)))


HIDDEN_BELOW = {
    torch.float64: -1e300,
    torch.float32: -1e38,
    torch.bfloat16: -1e38,
    torch.float16: -6e4,
}
"""An additive mask at or below this hides its key: -inf, and the lowest finite number, which models use for it."""
