"""The kernel that finds where each row's keys begin and end under a mask."""

from __future__ import annotations

import triton
import triton.language as tl

FOLLOWS_SIZES = (
    "first_ptr hole_ptr last_ptr info_b info_h begin_b begin_h queries keys batch batches heads kv_heads mask_heads "
    "num_rows splits shift even outer length inner threshold"
).split()
"""Arguments whose values compile no kernel anew, so that few binaries serve all sizes, and the probes run those."""


@triton.jit(do_not_specialize=FOLLOWS_SIZES)
def rows_kernel(
    mask_ptr, first_ptr, hole_ptr, last_ptr, queries, keys, mask_heads, mask_b, mask_h, mask_q, mask_k,
    ROWS: tl.constexpr, COLS: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, HIDDEN: tl.constexpr,
):  # fmt: skip
    """For each row of the mask: the first key it sees (``keys`` if none), the first it does not see after that, and one
    past the last it sees.  Grid: (tiles of rows, batches * heads of the mask)."""
    bh = tl.program_id(1).to(tl.int64)
    query = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    alive = query < queries
    row = mask_ptr + (bh // mask_heads) * mask_b + (bh % mask_heads) * mask_h + query.to(tl.int64) * mask_q
    first = tl.zeros([ROWS], tl.int32) + keys
    hole = tl.zeros([ROWS], tl.int32) + keys
    last = tl.zeros([ROWS], tl.int32)
    stop = keys
    if CAUSAL:
        stop = tl.minimum(keys, tl.program_id(0) * ROWS + ROWS)
    for start in range(0, stop, COLS):
        key = start + tl.arange(0, COLS)
        inside = (key < keys)[None, :] & alive[:, None]
        if CAUSAL:
            inside = inside & (key[None, :] <= query[:, None])
        at = row[:, None] + key[None, :].to(tl.int64) * mask_k
        if MASK == "bool":
            seen = inside & (tl.load(at, mask=inside, other=0) != 0)
        else:
            bias = tl.load(at, mask=inside, other=0.0)
            if bias.dtype != tl.float64:
                bias = bias.to(tl.float32)
            seen = inside & ((bias <= HIDDEN) == 0)
        index = tl.zeros([ROWS, COLS], tl.int32) + key[None, :]
        first = tl.minimum(first, tl.min(tl.where(seen, index, keys), 1))
        last = tl.maximum(last, tl.max(tl.where(seen, index + 1, 0), 1))
        unseen = (seen == 0) & (index > first[:, None])
        hole = tl.minimum(hole, tl.min(tl.where(unseen, index, keys), 1))
    if CAUSAL:
        hole = tl.minimum(hole, query + 1)
    at = bh * queries + query
    tl.store(first_ptr + at, first, mask=alive)
    tl.store(hole_ptr + at, tl.minimum(hole, keys), mask=alive)
    tl.store(last_ptr + at, last, mask=alive)
