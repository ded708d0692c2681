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
