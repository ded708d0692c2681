"""The backward kernels: gradients of queries, of keys and values, and of the mask.

All follow ``order.GpuAttentionOrder``.  A gradient is one chain of the tensor core, so the size of a block cannot show.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernels import (
    fold_all,
    is_kept,
    load_mask,
    load_queries,
    load_rows,
    scale_of,
    seen_and_bias,
    start_of,
    states_of,
)
from .rows_kernel import FOLLOWS_SIZES


@triton.jit(do_not_specialize=FOLLOWS_SIZES)
def delta_kernel(
    grad_ptr, out_ptr, delta_ptr, queries, heads, num_rows, g_b, g_h, g_n, o_b, o_h, o_n, value_depth,
    ROWS: tl.constexpr, BDV: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Of each row, the sum of ``grad * out``: columns folded half by half.  Grid: (tiles of rows,)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    alive = row < num_rows
    query = row % queries
    b = row // queries // heads
    h = row // queries % heads
    cols = tl.arange(0, BDV)
    mask = alive[:, None] & (cols < value_depth)[None, :]
    at = grad_ptr + (b * g_b + h * g_h + query * g_n)[:, None] + cols[None, :]
    grad = tl.load(at, mask=mask, other=0.0).to(DTYPE)
    out = tl.load(out_ptr + (b * o_b + h * o_h + query * o_n)[:, None] + cols[None, :], mask=mask, other=0.0).to(DTYPE)
    tl.store(delta_ptr + row, fold_all(grad * out, ROWS, BDV), mask=alive)


@triton.jit
def weights(s, c, bias, seen, lse, ACROSS: tl.constexpr, MASK: tl.constexpr):
    """``exp2(fma(s, c, bias - lse))``, 0 where the key is not seen.  ACROSS: rows of ``s`` are keys."""
    factor = tl.full(s.shape, 1.0, s.dtype) * c
    offset = lse[None, :] if ACROSS else lse[:, None]
    if MASK == "additive":
        t = bias - offset
    else:
        t = tl.broadcast_to(-offset, s.shape)
    p = tl.exp2(tl.fma(s, factor, t))
    if seen is not None:
        p = tl.where(seen, p, 0.0)
    return p


@triton.jit
def finite(x):
    """``x`` with 0 for NaN and Inf: what a row does not see, times its weight of 0, must add nothing."""
    return tl.where(x * 0.0 == 0.0, x, 0.0)


@triton.jit
def statistics(lse_ptr, delta_ptr, at, alive):
    """The statistic of rows in the log2 domain (Inf makes every weight 0), and their delta."""
    lse = tl.load(lse_ptr + at, mask=alive, other=float("-inf"))
    nothing = lse == float("-inf")
    lse = tl.where(nothing, float("inf"), lse * 1.4426950408889634)
    delta = tl.load(delta_ptr + at, mask=alive, other=0.0)
    return lse, tl.where(nothing, 0.0, delta)


@triton.jit
def walk_keys(
    dq, start, stop, q, grad, lse, delta, k_p, v_p, k_n, v_n, depth, value_depth, c, drop, mask_row, query, rows,
    mask_k,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, EVEN: tl.constexpr, EVEN_V: tl.constexpr,
    ALL: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, HIDDEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Add the blocks of keys from ``start`` to ``stop`` to the gradient of a tile of queries."""
    for n in tl.range(start, stop, BN, num_stages=STAGES):
        if ALL:
            k = load_rows(k_p, 0, 0, n, 0, None, k_n, depth, BN, BD, EVEN, False)
            v = load_rows(v_p, 0, 0, n, 0, None, v_n, value_depth, BN, BDV, EVEN_V, False)
            seen = None
            bias = None
        else:
            k = load_rows(k_p, 0, 0, n, 0, stop, k_n, depth, BN, BD, EVEN, False)
            v = load_rows(v_p, 0, 0, n, 0, stop, v_n, value_depth, BN, BDV, EVEN_V, False)
            seen, bias = seen_and_bias(mask_row, n, query, stop, rows, mask_k, HIDDEN, BM, BN, MASK, CAUSAL, lse.dtype)
        s = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=lse.dtype)
        p = weights(s, c, bias, seen, lse, False, "none" if ALL else MASK)
        dp = tl.dot(grad, tl.trans(v), input_precision="ieee", out_dtype=lse.dtype)
        if drop is not None:
            states, threshold, inverse = drop
            kept = is_kept(states[:, None], (n + tl.arange(0, BN))[None, :], threshold)
            dp = tl.where(kept, dp * inverse, 0.0)
        ds = p * (dp - delta[:, None])
        if not ALL:
            ds = tl.where(seen, ds, 0.0)
            k = finite(k)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee", out_dtype=lse.dtype)
    return dq


@triton.jit(do_not_specialize=FOLLOWS_SIZES)
def query_kernel(
    q_ptr, k_p, v_p, mask_ptr, first_ptr, hole_ptr, last_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr, seeds_ptr,
    queries, keys, heads, kv_heads, c_high, c_low, scale, scale_low, threshold, inverse_high, inverse_low,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, mask_b, mask_h, mask_q, mask_k, info_b, info_h, depth, value_depth,
    g_b, g_h, g_n,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, EVEN: tl.constexpr, EVEN_V: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, HIDDEN: tl.constexpr, STAGES: tl.constexpr, DTYPE: tl.constexpr,
    DROPOUT: tl.constexpr,
):  # fmt: skip
    """The gradient of BM queries of one head.  Grid: (batch * heads, tiles of queries), the last tile first."""
    bh = tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    b = (bh // heads).to(tl.int64)
    h = (bh % heads).to(tl.int64)
    hk = h // (heads // kv_heads)
    c = scale_of(c_high, c_low, DTYPE)
    query = tile * BM + tl.arange(0, BM)
    alive = query < queries
    at = query.to(tl.int64)
    q = load_queries(q_ptr + b * q_b + h * q_h + at * q_n, alive, depth, BD)
    grad = load_queries(grad_ptr + b * g_b + h * g_h + at * g_n, alive, value_depth, BDV)
    k_p += b * k_b + hk * k_h
    v_p += b * v_b + hk * v_h
    stat = bh.to(tl.int64) * queries + query
    lse, delta = statistics(lse_ptr, delta_ptr, stat, alive)
    cols = tl.arange(0, BD)
    dq_at = dq_ptr + stat[:, None] * depth + cols[None, :]
    dq_mask = (cols < depth)[None, :]
    inverse = scale_of(inverse_high, inverse_low, DTYPE)
    drop = None
    if MASK == "none":
        stop = keys
        whole = keys
        if CAUSAL:
            stop = tl.minimum(keys, tile * BM + BM)
            whole = tl.minimum(keys, tile * BM + 1)
        whole = start_of(0, whole, BN)
        if DROPOUT:
            drop = (states_of(seeds_ptr, stat, alive, None), threshold, inverse)
        dq = walk_keys(
            tl.zeros([BM, BD], DTYPE), 0, whole, q, grad, lse, delta, k_p, v_p, k_n, v_n, depth, value_depth, c,
            drop, query, query, alive, mask_k, BM, BN, BD, BDV, EVEN, EVEN_V, True, MASK, CAUSAL, HIDDEN, STAGES,
        )  # fmt: skip
        dq = walk_keys(
            dq, whole, stop, q, grad, lse, delta, k_p, v_p, k_n, v_n, depth, value_depth, c,
            drop, query, query, alive, mask_k, BM, BN, BD, BDV, EVEN, EVEN_V, False, MASK, CAUSAL, HIDDEN, 1,
        )  # fmt: skip
        dq = dq * scale_of(scale, scale_low, DTYPE) + 0.0
        tl.store(dq_at, dq.to(dq_ptr.dtype.element_ty), mask=alive[:, None] & dq_mask)
    else:
        mask_row = mask_ptr + b * mask_b + h * mask_h + at * mask_q
        info = b * info_b + h * info_h + at
        first = tl.load(first_ptr + info, mask=alive, other=keys)
        hole = tl.load(hole_ptr + info, mask=alive, other=keys)
        last = tl.load(last_ptr + info, mask=alive, other=0)
        nothing = alive & (first >= keys)
        tl.store(dq_at, tl.zeros([BM, BD], dq_ptr.dtype.element_ty), mask=nothing[:, None] & dq_mask)
        if DROPOUT:
            drop = (states_of(seeds_ptr, stat, alive, first), threshold, inverse)
        anchor = tl.min(first, 0)
        while anchor < keys:
            rows = alive & (first == anchor)
            stop = tl.max(tl.where(rows, last, 0), 0)
            dq = tl.zeros([BM, BD], DTYPE)
            whole = anchor
            if MASK == "bool":
                whole = start_of(anchor, tl.min(tl.where(rows, hole, keys), 0), BN)
                dq = walk_keys(
                    dq, anchor, whole, q, grad, lse, delta, k_p, v_p, k_n, v_n, depth, value_depth, c, drop, mask_row,
                    query, rows, mask_k, BM, BN, BD, BDV, EVEN, EVEN_V, True, MASK, CAUSAL, HIDDEN, STAGES,
                )  # fmt: skip
            dq = walk_keys(
                dq, whole, stop, q, grad, lse, delta, k_p, v_p, k_n, v_n, depth, value_depth, c, drop, mask_row, query,
                rows, mask_k, BM, BN, BD, BDV, EVEN, EVEN_V, False, MASK, CAUSAL, HIDDEN, STAGES,
            )  # fmt: skip
            dq = dq * scale_of(scale, scale_low, DTYPE) + 0.0
            tl.store(dq_at, dq.to(dq_ptr.dtype.element_ty), mask=rows[:, None] & dq_mask)
            anchor = tl.min(tl.where(first > anchor, first, keys), 0)


@triton.jit
def seen_and_bias_across(
    mask_p, keys_at, query, num_keys, alive, mask_q, mask_k, HIDDEN: tl.constexpr, MASK: tl.constexpr,
    CAUSAL: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """``seen_and_bias`` with keys along the rows, [keys, queries]."""
    log2e: tl.constexpr = 1.4426950408889634
    seen = (keys_at < num_keys)[:, None] & alive[None, :]
    if CAUSAL:
        seen = seen & (keys_at[:, None] <= query[None, :])
    bias = tl.zeros(seen.shape, DTYPE)
    if MASK != "none":
        at = mask_p + query.to(tl.int64)[None, :] * mask_q + keys_at.to(tl.int64)[:, None] * mask_k
        if MASK == "bool":
            seen = seen & (load_mask(at, seen, 0, num_keys) != 0)
        else:
            raw = load_mask(at, seen, float("-inf"), num_keys).to(DTYPE)
            seen = seen & ((raw <= HIDDEN) == 0)
            bias = tl.where(seen, raw, 0.0) * log2e
    return seen, bias


@triton.jit
def walk_queries(
    dk, dv, start, stop, k, v, q_p, grad_p, lse_p, delta_p, mask_p, first_p, keys_at, num_keys, q_n, g_n, mask_q,
    mask_k, depth, value_depth, c, drop,
    BM: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, ALL: tl.constexpr, MASK: tl.constexpr,
    CAUSAL: tl.constexpr, HIDDEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Add the blocks of one head's queries from ``start`` to ``stop`` to the gradients of a tile of keys.

    ``drop``: of dropout, where the head's seeds are, the threshold and the factor of what is kept; None without.
    """
    for n in tl.range(start, stop, BM, num_stages=STAGES):
        query = n + tl.arange(0, BM)
        alive = query < stop
        first = None
        if MASK != "none" and (not ALL or drop is not None):
            first = tl.load(first_p + query, mask=alive, other=num_keys)
            alive = alive & (first < num_keys)
        at = query.to(tl.int64)
        q = load_queries(q_p + at * q_n, alive, depth, BD)
        grad = load_queries(grad_p + at * g_n, alive, value_depth, BDV)
        lse, delta = statistics(lse_p, delta_p, at, alive)
        s = tl.dot(k, tl.trans(q), input_precision="ieee", out_dtype=lse.dtype)
        if ALL:
            p = weights(s, c, None, None, lse, True, "none")
        else:
            seen, bias = seen_and_bias_across(
                mask_p, keys_at, query, num_keys, alive, mask_q, mask_k, HIDDEN, MASK, CAUSAL, lse.dtype
            )
            p = weights(s, c, bias, seen, lse, True, MASK)
        given = p
        if drop is not None:
            seeds_p, threshold, inverse = drop
            states = states_of(seeds_p, at, alive, first)
            kept = is_kept(states[None, :], keys_at[:, None], threshold)
            given = tl.where(kept, p * inverse, 0.0)
        dv = tl.dot(given.to(grad.dtype), grad, dv, input_precision="ieee", out_dtype=lse.dtype)
        dp = tl.dot(v, tl.trans(grad), input_precision="ieee", out_dtype=lse.dtype)
        if drop is not None:
            dp = tl.where(kept, dp * inverse, 0.0)
        ds = p * (dp - delta[None, :])
        if not ALL:
            ds = tl.where(seen, ds, 0.0)
            q = finite(q)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee", out_dtype=lse.dtype)
    return dk, dv


@triton.jit
def reach(first_p, last_p, start, stop, queries, keys):
    """The first query, and one past the last, whose keys reach into [start, stop)."""
    low = queries
    high = queries * 0
    for n in range(0, queries, 1024):
        query = n + tl.arange(0, 1024)
        inside = query < queries
        first = tl.load(first_p + query, mask=inside, other=keys)
        last = tl.load(last_p + query, mask=inside, other=0)
        there = (first < stop) & (last > start)
        low = tl.minimum(low, tl.min(tl.where(there, query, queries), 0))
        high = tl.maximum(high, tl.max(tl.where(there, query + 1, 0), 0))
    return low, high


@triton.jit
def clear_from(first_p, hole_p, start, stop, low, high):
    """The query in [low, high] from which on all up to ``high`` see every key in [start, stop)."""
    clear = low
    for n in range(low, high, 1024):
        query = n + tl.arange(0, 1024)
        inside = query < high
        first = tl.load(first_p + query, mask=inside, other=start)
        hole = tl.load(hole_p + query, mask=inside, other=stop)
        clear = tl.maximum(clear, tl.max(tl.where((first > start) | (hole < stop), query + 1, 0), 0))
    return clear


@triton.jit(do_not_specialize=FOLLOWS_SIZES)
def key_kernel(
    q_ptr, k_p, v_p, mask_ptr, first_ptr, hole_ptr, last_ptr, begin_ptr, grad_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    seeds_ptr, queries, keys, heads, kv_heads, c_high, c_low, scale, scale_low, threshold, inverse_high, inverse_low,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, mask_b, mask_h, mask_q, mask_k, info_b, info_h, depth, value_depth,
    g_b, g_h, g_n, begin_b, begin_h,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, EVEN: tl.constexpr, EVEN_V: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, HIDDEN: tl.constexpr, STAGES: tl.constexpr, DTYPE: tl.constexpr,
    DROPOUT: tl.constexpr,
):  # fmt: skip
    """Gradients of BN keys and values of one head: over the group's heads, then over queries, both ascending.

    Grid: (batch * kv heads, tiles of keys).  Queries are counted from ``begin``, the first that sees any key.
    """
    bh = tl.program_id(0)
    n = tl.program_id(1) * BN
    b = (bh // kv_heads).to(tl.int64)
    hk = (bh % kv_heads).to(tl.int64)
    group = heads // kv_heads
    c = scale_of(c_high, c_low, DTYPE)
    inverse = scale_of(inverse_high, inverse_low, DTYPE)
    k = load_rows(k_p + b * k_b + hk * k_h, 0, 0, n, 0, keys, k_n, depth, BN, BD, EVEN, False)
    v = load_rows(v_p + b * v_b + hk * v_h, 0, 0, n, 0, keys, v_n, value_depth, BN, BDV, EVEN_V, False)
    keys_at = n + tl.arange(0, BN)
    dk = tl.zeros([BN, BD], DTYPE)
    dv = tl.zeros([BN, BDV], DTYPE)
    for g in range(0, group):
        h = hk * group + g
        q_p = q_ptr + b * q_b + h * q_h
        grad_p = grad_ptr + b * g_b + h * g_h
        stat = (b * heads + h) * queries
        drop = None
        if DROPOUT:
            drop = (seeds_ptr + stat, threshold, inverse)
        if MASK == "none":
            start = 0
            middle = tl.where(n + BN > keys, queries, 0)  # a ragged tile has rows that must not see anything
            if CAUSAL:
                start = start_of(0, n, BM)
                # From there on every query sees the whole tile.
                whole = start + (n + BN - 1 - start + BM - 1) // BM * BM
                middle = tl.where(n + BN > keys, queries, tl.minimum(whole, queries))
            dk, dv = walk_queries(
                dk, dv, start, middle, k, v, q_p, grad_p, lse_ptr + stat, delta_ptr + stat, mask_ptr, first_ptr,
                keys_at, keys, q_n, g_n, mask_q, mask_k, depth, value_depth, c, drop, BM, BD, BDV, False, MASK, CAUSAL,
                HIDDEN, 1,
            )  # fmt: skip
            dk, dv = walk_queries(
                dk, dv, middle, queries, k, v, q_p, grad_p, lse_ptr + stat, delta_ptr + stat, mask_ptr, first_ptr,
                keys_at, keys, q_n, g_n, mask_q, mask_k, depth, value_depth, c, drop, BM, BD, BDV, True, MASK, CAUSAL,
                HIDDEN, STAGES,
            )  # fmt: skip
        else:
            info = b * info_b + h * info_h
            begin = tl.load(begin_ptr + b * begin_b + h * begin_h)
            low, high = reach(first_ptr + info, last_ptr + info, n, n + BN, queries, keys)
            start = start_of(begin, low, BM)
            middle = high
            if MASK == "bool":
                clear = clear_from(first_ptr + info, hole_ptr + info, n, n + BN, low, high)
                middle = tl.minimum(start + (clear - start + BM - 1) // BM * BM, high)
            dk, dv = walk_queries(
                dk, dv, start, middle, k, v, q_p, grad_p, lse_ptr + stat, delta_ptr + stat,
                mask_ptr + b * mask_b + h * mask_h, first_ptr + info, keys_at, keys, q_n, g_n, mask_q, mask_k, depth,
                value_depth, c, drop, BM, BD, BDV, False, MASK, CAUSAL, HIDDEN, STAGES,
            )  # fmt: skip
            if MASK == "bool":
                dk, dv = walk_queries(
                    dk, dv, middle, high, k, v, q_p, grad_p, lse_ptr + stat, delta_ptr + stat, mask_ptr,
                    first_ptr, keys_at, keys, q_n, g_n, mask_q, mask_k, depth, value_depth, c, drop, BM, BD, BDV,
                    True, MASK, CAUSAL, HIDDEN, STAGES,
                )  # fmt: skip
    dk = dk * scale_of(scale, scale_low, DTYPE) + 0.0
    dv = dv + 0.0
    row = bh.to(tl.int64) * keys + keys_at
    cols = tl.arange(0, BD)
    mask = (keys_at < keys)[:, None] & (cols < depth)[None, :]
    tl.store(dk_ptr + row[:, None] * depth + cols[None, :], dk.to(dk_ptr.dtype.element_ty), mask=mask)
    cols = tl.arange(0, BDV)
    mask = (keys_at < keys)[:, None] & (cols < value_depth)[None, :]
    tl.store(dv_ptr + row[:, None] * value_depth + cols[None, :], dv.to(dv_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=FOLLOWS_SIZES)
def begin_kernel(first_ptr, begin_ptr, queries, keys, BLOCK: tl.constexpr):
    """The first query of each row of the mask that sees any key; ``queries`` if none.  Grid: (rows of the mask,)."""
    row = tl.program_id(0).to(tl.int64)
    begin = queries
    for start in range(0, queries, BLOCK):
        query = start + tl.arange(0, BLOCK)
        first = tl.load(first_ptr + row * queries + query, mask=query < queries, other=keys)
        begin = tl.minimum(begin, tl.min(tl.where(first < keys, query, queries), 0))
    tl.store(begin_ptr + row, begin)


@triton.jit(do_not_specialize=FOLLOWS_SIZES)
def mask_kernel(
    q_ptr, k_p, v_p, mask_ptr, first_ptr, grad_ptr, lse_ptr, delta_ptr, ds_ptr, seeds_ptr,
    queries, keys, batch, heads, kv_heads, batches, mask_heads, c_high, c_low, threshold, inverse_high, inverse_low,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, mask_b, mask_h, mask_q, mask_k, info_b, info_h, depth, value_depth,
    g_b, g_h, g_n,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, EVEN: tl.constexpr, EVEN_V: tl.constexpr,
    CAUSAL: tl.constexpr, HIDDEN: tl.constexpr, DTYPE: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """The gradient of the masked scores, summed over the batches and heads that share a mask, in ascending order.

    Grid: (tiles of keys, tiles of queries, batches * heads of the mask).  Writes [batches, mask heads, L, S].
    """
    c = scale_of(c_high, c_low, DTYPE)
    n = tl.program_id(0) * BN
    keys_at = n + tl.arange(0, BN)
    query = tl.program_id(1) * BM + tl.arange(0, BM)
    alive = query < queries
    at = query.to(tl.int64)
    own = tl.program_id(2)
    own_b = own // mask_heads
    own_h = own % mask_heads
    total = tl.zeros([BM, BN], DTYPE)
    for i in range(0, batch // batches):
        b = tl.cast(own_b + i, tl.int64)
        for j in range(0, heads // mask_heads):
            h = tl.cast(own_h + j, tl.int64)
            hk = h // (heads // kv_heads)
            q = load_queries(q_ptr + b * q_b + h * q_h + at * q_n, alive, depth, BD)
            grad = load_queries(grad_ptr + b * g_b + h * g_h + at * g_n, alive, value_depth, BDV)
            k = load_rows(k_p + b * k_b + hk * k_h, 0, 0, n, 0, keys, k_n, depth, BN, BD, EVEN, False)
            v = load_rows(v_p + b * v_b + hk * v_h, 0, 0, n, 0, keys, v_n, value_depth, BN, BDV, EVEN_V, False)
            stat = (b * heads + h) * queries + query
            lse, delta = statistics(lse_ptr, delta_ptr, stat, alive)
            mask_row = mask_ptr + b * mask_b + h * mask_h + at * mask_q
            seen, bias = seen_and_bias(
                mask_row, n, query, keys, alive, mask_k, HIDDEN, BM, BN, "additive", CAUSAL, DTYPE
            )
            s = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=DTYPE)
            p = weights(s, c, bias, seen, lse, False, "additive")
            dp = tl.dot(grad, tl.trans(v), input_precision="ieee", out_dtype=DTYPE)
            if DROPOUT:
                first = tl.load(first_ptr + b * info_b + h * info_h + query, mask=alive, other=keys)
                kept = is_kept(states_of(seeds_ptr, stat, alive, first)[:, None], keys_at[None, :], threshold)
                dp = tl.where(kept, dp * scale_of(inverse_high, inverse_low, DTYPE), 0.0)
            total += tl.where(seen, p * (dp - delta[:, None]), 0.0)
    row = tl.cast(own, tl.int64) * queries + query
    mask = alive[:, None] & (keys_at < keys)[None, :]
    tl.store(ds_ptr + row[:, None] * keys + keys_at[None, :], total.to(ds_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=FOLLOWS_SIZES)
def sum_kernel(x_ptr, out_ptr, outer, length, inner, BLOCK: tl.constexpr):
    """Sum the middle dim of [outer, length, inner] in ascending order.  Grid: (outer, tiles of inner)."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = col < inner
    at = x_ptr + row * length * inner + col
    total = tl.load(at, mask=there, other=0.0)
    for i in range(1, length):
        total += tl.load(at + i * tl.cast(inner, tl.int64), mask=there, other=0.0)
    tl.store(out_ptr + row * inner + col, total.to(out_ptr.dtype.element_ty), mask=there)
