"""The forward kernels for splits of keys over programs: one tile of query rows over some splits, and the merge.

They follow ``order.GpuAttentionOrder``, as ``kernels.tile_kernel`` does in one program.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .kernels import (
    factors,
    load_queries,
    log2_of,
    scale_of,
    split_start,
    splits_in,
    start_of,
    store_nothing,
    store_part,
    store_rows,
    tile_pass,
    walk,
)
from .rows_kernel import FOLLOWS_SIZES


@triton.jit
def split_pass(
    near, far, anchor, whole, stop, column, rows, q, k_p, v_p, b, hk, k_n, v_n, depth, value_depth, c, mask_row, query,
    mask_k, part_ptr, stats_ptr, splits, row_id, out_row, lse_row,
    SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, EVEN: tl.constexpr,
    EVEN_V: tl.constexpr, LANES: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, HIDDEN: tl.constexpr,
    TMA: tl.constexpr, STAGES: tl.constexpr, DTYPE: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """``rows`` of a tile over the splits from ``near`` to ``far`` keys after the anchor; each split's sums are stored.

    Without SPLIT, over all their keys.  BDV columns of the values, from ``column``.
    """
    if not SPLIT:
        tile_pass(
            anchor, whole, stop, rows, q, k_p, v_p, b, hk, k_n, v_n, depth, value_depth, c, None, mask_row, query,
            mask_k, out_row, lse_row, BM, BN, BD, BDV, EVEN, EVEN_V, LANES, MASK, CAUSAL, HIDDEN, TMA, STAGES, DTYPE,
            SPLITS,
        )  # fmt: skip
        return
    start = anchor + near
    stop = tl.minimum(stop, anchor + far)
    if start < stop:
        part = splits_in(near, SPLITS)
        m = tl.full([BM], float("-inf"), DTYPE)
        w = tl.zeros([BM, LANES], DTYPE)
        acc = tl.zeros([BM, BDV], DTYPE)
        whole = tl.maximum(start_of(anchor, tl.minimum(whole, stop), BN), start)
        _, _, _, m, w, acc, part = walk(
            m, m, acc, m, w, acc, part, q, k_p, v_p, b, hk, anchor, start, whole, column, k_n, v_n, depth,
            value_depth, c, None, mask_row, query, rows, mask_k, HIDDEN, part_ptr, stats_ptr, splits, row_id, BM, BN,
            BD, BDV, EVEN, EVEN_V, LANES, MASK != "additive", MASK, CAUSAL, True, TMA, STAGES, SPLITS,
        )  # fmt: skip
        _, _, _, m, w, acc, part = walk(
            m, m, acc, m, w, acc, part, q, k_p, v_p, b, hk, anchor, whole, stop, column, k_n, v_n, depth,
            value_depth, c, None, mask_row, query, rows, mask_k, HIDDEN, part_ptr, stats_ptr, splits, row_id, BM, BN,
            BD, BDV, EVEN, EVEN_V, LANES, False, MASK, CAUSAL, True, TMA, 1, SPLITS,
        )  # fmt: skip
        # Blocks that reach past ``stop`` may have ended the last split; else it is stored here.
        if anchor + split_start(part, log2_of(SPLITS[0][2]), SPLITS[0][1], SPLITS) < stop:
            store_part(part_ptr, stats_ptr, part, splits, row_id, rows, m, w, acc, column, value_depth, BM, BDV, LANES)


@triton.jit(do_not_specialize=FOLLOWS_SIZES)
def split_kernel(
    q_ptr, k_p, v_p, mask_ptr, first_ptr, hole_ptr, last_ptr, part_ptr, stats_ptr,
    queries, keys, heads, kv_heads, splits, shift, even, c_high, c_low,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, mask_b, mask_h, mask_q, mask_k, info_b, info_h, depth, value_depth,
    EARLY: tl.constexpr, SPLIT: tl.constexpr, V_PROGRAMS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr, BDV: tl.constexpr, EVEN: tl.constexpr, EVEN_V: tl.constexpr, LANES: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, HIDDEN: tl.constexpr, TMA: tl.constexpr, STAGES: tl.constexpr,
    DTYPE: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """BM rows, which are the queries of a group of heads, over the splits of ``2**shift`` keys, but one split at least.

    Grid: (batch * kv heads, tiles * V_PROGRAMS that have BDV columns of the values each, programs that share the keys),
    the last keys first: their splits are the longest.
    Without SPLIT one program takes all keys, and ``part_ptr`` and ``stats_ptr`` are the output and its statistics.

    Row ``r`` is query ``r // group`` under the group's head ``r % group``: heads that share keys share their loads.
    EARLY: ``merge_kernel`` may be started before this one has ended, and waits by itself.
    """
    if EARLY:
        gdc_launch_dependents()
    share = tl.num_programs(2) - 1 - tl.program_id(2)
    near = split_start(share, shift, even, SPLITS)
    far = split_start(share + 1, shift, even, SPLITS)
    bh = tl.program_id(0)
    b = bh // kv_heads
    hk = bh % kv_heads
    group = heads // kv_heads
    row = tl.program_id(1) // V_PROGRAMS * BM + tl.arange(0, BM)
    column = tl.program_id(1) % V_PROGRAMS * BDV
    query = row // group
    h = hk * group + row % group
    alive = query < queries
    b64 = b.to(tl.int64)
    c = scale_of(c_high, c_low, DTYPE)
    q_row = q_ptr + b64 * q_b + h.to(tl.int64) * q_h + query.to(tl.int64) * q_n
    q = load_queries(q_row, alive, depth, BD)
    if not TMA:
        k_p += b64 * k_b + hk.to(tl.int64) * k_h
        v_p += b64 * v_b + hk.to(tl.int64) * v_h
    row_id = (b64 * heads + h) * queries + query
    out_row = part_ptr + ((b64 * queries + query) * heads + h) * value_depth
    lse_row = stats_ptr + row_id
    if MASK == "none":
        stop = keys
        whole = keys
        if CAUSAL:
            stop = tl.minimum(keys, tl.max(tl.where(alive, query, 0), 0) + 1)
            whole = tl.minimum(keys, tl.min(query, 0) + 1)
        split_pass(
            near, far, 0, whole, stop, column, alive, q, k_p, v_p, b, hk, k_n, v_n, depth, value_depth, c, query, query,
            mask_k, part_ptr, stats_ptr, splits, row_id, out_row, lse_row, SPLIT, BM, BN, BD, BDV, EVEN, EVEN_V, LANES,
            MASK, CAUSAL, HIDDEN, TMA, STAGES, DTYPE, SPLITS,
        )  # fmt: skip
    else:
        mask_row = mask_ptr + b64 * mask_b + h.to(tl.int64) * mask_h + query.to(tl.int64) * mask_q
        info = b64 * info_b + h.to(tl.int64) * info_h + query
        first = tl.load(first_ptr + info, mask=alive, other=keys)
        hole = tl.load(hole_ptr + info, mask=alive, other=keys)
        last = tl.load(last_ptr + info, mask=alive, other=0)
        if not SPLIT:
            store_nothing(out_row, lse_row, BM, BDV, value_depth, alive & (first >= keys), DTYPE)
        anchor = tl.min(first, 0)
        while anchor < keys:
            rows = alive & (first == anchor)
            stop = tl.max(tl.where(rows, last, 0), 0)
            whole = tl.min(tl.where(rows, hole, keys), 0)
            split_pass(
                near, far, anchor, whole, stop, column, rows, q, k_p, v_p, b, hk, k_n, v_n, depth, value_depth, c,
                mask_row, query, mask_k, part_ptr, stats_ptr, splits, row_id, out_row, lse_row, SPLIT, BM, BN, BD, BDV,
                EVEN, EVEN_V, LANES, MASK, CAUSAL, HIDDEN, TMA, STAGES, DTYPE, SPLITS,
            )  # fmt: skip
            anchor = tl.min(tl.where(first > anchor, first, keys), 0)


@triton.jit
def load_parts(part_ptr, stats_ptr, row_id, splits, start, count, cols, value_depth, AT_ONCE: tl.constexpr):
    """AT_ONCE splits of a row from split ``start``; those from ``count`` on add nothing."""
    parts = ()
    for j in tl.static_range(AT_ONCE):  # their loads are in flight together
        at = row_id * splits + start + j
        there = start + j < count
        m = tl.load(stats_ptr + at * 2, mask=there, other=float("-inf"))
        w = tl.load(stats_ptr + at * 2 + 1, mask=there, other=0.0)
        acc = tl.load(part_ptr + at * value_depth + cols, mask=(cols < value_depth) & there, other=0.0)
        parts = parts + ((m, w, acc),)
    return parts


@triton.jit(do_not_specialize=FOLLOWS_SIZES)
def merge_kernel(
    part_ptr, stats_ptr, first_ptr, last_ptr, out_ptr, lse_ptr,
    queries, keys, heads, splits, info_b, info_h, value_depth,
    EARLY: tl.constexpr, BDV: tl.constexpr, AT_ONCE: tl.constexpr, AGAIN: tl.constexpr, MASK: tl.constexpr,
    CAUSAL: tl.constexpr, DTYPE: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """Merge the splits of one row in ascending order, AT_ONCE and, with AGAIN, the next that many while it does.

    Grid: (batch * heads * queries,).
    """
    row_id = tl.program_id(0).to(tl.int64)
    query = (row_id % queries).to(tl.int32)
    bh = row_id // queries
    b = bh // heads
    h = bh % heads
    if MASK == "none":
        seen = keys
        if CAUSAL:
            seen = tl.minimum(keys, query + 1)
    else:
        info = b * info_b + h * info_h + query
        seen = tl.maximum(tl.load(last_ptr + info) - tl.load(first_ptr + info), 0)
    count = splits_in(seen, SPLITS)
    cols = tl.arange(0, BDV)
    # Numbers, not tensors of one row: the factors of such a tensor reach its columns through shared memory.
    M = tl.full([], float("-inf"), DTYPE)
    W = tl.full([], 0.0, DTYPE)
    Y = tl.zeros([BDV], DTYPE)
    if EARLY:  # what is above needs nothing of ``split_kernel``
        gdc_wait()
    parts = load_parts(part_ptr, stats_ptr, row_id, splits, 0, count, cols, value_depth, AT_ONCE)
    for start in range(0, count, AT_ONCE):
        coming = parts
        if AGAIN:
            following = start + AT_ONCE
            coming = load_parts(part_ptr, stats_ptr, row_id, splits, following, count, cols, value_depth, AT_ONCE)
        for j in tl.static_range(AT_ONCE):
            m, w, acc = parts[j]
            M, before, after = factors(M, m)
            W = tl.fma(W, before, w * after)
            Y = tl.fma(Y, tl.full([BDV], 1.0, DTYPE) * before, acc * after)
        parts = coming
    one = tl.arange(0, 1)
    out_row = out_ptr + ((b * queries + query) * heads + h) * value_depth + one
    lse_row = lse_ptr + row_id + one
    some = one + seen > 0
    if MASK != "none":
        store_nothing(out_row, lse_row, 1, BDV, value_depth, some == 0, DTYPE)
    store_rows(one + M, one + W, Y[None, :], out_row, lse_row, BDV, value_depth, some)
