"""The forward kernel for one tile of query rows over all its keys, and what the other kernels share with it.

All follow ``order.GpuAttentionOrder``; they differ in which program does which part of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rows_kernel import FOLLOWS_SIZES

# -- Dropout -----------------------------------------------------------------------------------------------------------


@triton.jit
def mixed(z):
    """SplitMix64's output function, of uint64; ``bicompile.dropout`` has the same on tensors."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def jump(steps):
    """How far ``steps`` steps move SplitMix64's state, uint64."""
    return steps.to(tl.uint64) * 0x9E3779B97F4A7C15


@triton.jit
def states_of(seeds_ptr, at, rows, first):
    """SplitMix64's state of each row before the numbers of its keys, uint64, [rows].

    ``first``: the key that has the row's first number; None: key 0.  So the keys' places alone lead from here.
    """
    states = tl.load(seeds_ptr + at, mask=rows, other=0).to(tl.uint64)
    if first is not None:
        states -= jump(first)
    return states


@triton.jit
def is_kept(states, keys, threshold):
    """Whether dropout keeps the weight of each of ``keys``; ``states`` and ``keys`` broadcast."""
    return (mixed(states + jump(keys + 1)) >> 40).to(tl.int32) >= threshold


# -- One block of keys ------------------------------------------------------------------------------------------------


@triton.jit
def fold(x, ROWS: tl.constexpr, WIDTH: tl.constexpr, TO: tl.constexpr):
    """Add the halves of ``x``, [ROWS, WIDTH], until TO columns are left: one IEEE addition each, in any layout."""
    steps: tl.constexpr = (WIDTH // TO).bit_length() - 1
    for i in tl.static_range(steps):
        x = tl.sum(tl.reshape(x, [ROWS, 2, WIDTH >> (i + 1)]), axis=1)
    return x


@triton.jit
def fold_all(x, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Add the halves of ``x``, [ROWS, WIDTH], until [ROWS] is left."""
    return tl.reshape(fold(x, ROWS, WIDTH, 1), [ROWS])


@triton.jit
def finite_or(x, floor):
    """``x``, or ``floor`` where it is -inf: a row that saw no key yet."""
    return tl.where(x == float("-inf"), floor, x)


@triton.jit
def step(
    q, k, v, m, w, acc, c, drop, n, bias, seen,
    BM: tl.constexpr, BN: tl.constexpr, LANES: tl.constexpr, HOW: tl.constexpr,
):  # fmt: skip
    """One block of keys, from ``n``: the running maximum, the lanes of the weights' sum, and the weighted sum.

    ``HOW``: "all" rows see all keys; "some": ``seen`` says which; "biased": ``bias`` is added where they do.
    ``drop``: of dropout, the rows' states, the threshold and the factor of the weights that are kept; None without.
    """
    s = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=m.dtype)
    if HOW == "all":
        top = tl.max(s, 1) * c
    elif HOW == "some":
        s = tl.where(seen, s, float("-inf"))
        top = tl.max(s, 1) * c
    else:
        top = tl.max(tl.where(seen, tl.fma(s, tl.full([BM, BN], 1.0, m.dtype) * c, bias), float("-inf")), 1)
    new = tl.maximum(m, top)
    safe = finite_or(new, 0.0)
    factor = tl.full([BM, BN], 1.0, m.dtype) * c
    if HOW == "biased":
        p = tl.exp2(tl.where(seen, tl.fma(s, factor, bias - safe[:, None]), float("-inf")))
    else:
        p = tl.exp2(tl.fma(s, factor, tl.broadcast_to(-safe[:, None], [BM, BN])))
    alpha = tl.exp2(m - safe)
    w = w * alpha[:, None] + fold(p, BM, BN, LANES)
    acc = acc * alpha[:, None]
    if drop is not None:
        states, threshold, inverse = drop
        kept = is_kept(states[:, None], (n + tl.arange(0, BN))[None, :], threshold)
        p = tl.where(kept, p * inverse, 0.0)
    if HOW == "all":
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee", out_dtype=m.dtype)
    else:
        # A value of NaN or Inf must not reach the rows that do not see it.
        plain = v * 0.0 == 0.0
        acc = tl.dot(p.to(v.dtype), tl.where(plain, v, 0.0), acc, input_precision="ieee", out_dtype=m.dtype)
        if tl.min(tl.min(plain.to(tl.int32), 1), 0) == 0:
            reached = tl.dot(seen.to(tl.float16), (plain == 0).to(tl.float16))
            acc = tl.where(reached > 0.0, float("nan"), acc)
    return new, w, acc


@triton.jit
def factors(M, m):
    """The larger of two maxima, and by what the sums that belong to either are multiplied when they are merged."""
    new = tl.maximum(M, m)
    safe = finite_or(new, 0.0)
    return new, tl.exp2(M - safe), tl.exp2(m - safe)


@triton.jit
def merge(M, W, Y, m, w, acc):
    """Put the sums of the next split, (m, w, acc), onto those of the splits before it."""
    new, a, b = factors(M, m)
    W = tl.fma(W, a, w * b)
    Y = tl.fma(Y, tl.broadcast_to(a[:, None], Y.shape), acc * b[:, None])
    return new, W, Y


@triton.jit
def ends_split(stop, SPLITS: tl.constexpr):
    """Whether a split ends ``stop`` keys after the anchor; SPLITS are ``order.levels``."""
    size = SPLITS[0][2]
    for i in tl.static_range(1, len(SPLITS)):
        size = tl.where(stop > SPLITS[i][0], SPLITS[i][2], size)
    return (stop & (size - 1)) == 0


@triton.constexpr_function
def log2_of(power):
    return power.bit_length() - 1


@triton.jit
def split_start(i, shift, even, SPLITS: tl.constexpr):
    """How far from the anchor split ``i`` starts; in the first ``even`` keys, ``2**shift`` keys count as one split."""
    here = tl.minimum(i, even >> shift)
    start = here << shift
    left = i - here
    for j in tl.static_range(1, len(SPLITS)):
        here = tl.minimum(left, tl.where(even <= SPLITS[j][0], (SPLITS[j][1] - SPLITS[j][0]) // SPLITS[j][2], 0))
        start += here * SPLITS[j][2]
        left -= here
    return start


@triton.jit
def splits_in(keys, SPLITS: tl.constexpr):
    """How many splits hold ``keys`` keys from the anchor."""
    count = keys * 0
    for i in tl.static_range(len(SPLITS)):
        here = tl.minimum(tl.maximum(keys - SPLITS[i][0], 0), SPLITS[i][1] - SPLITS[i][0])
        count += (here + SPLITS[i][2] - 1) // SPLITS[i][2]
    return count


# -- Loads ------------------------------------------------------------------------------------------------------------


@triton.jit
def load_rows(
    p, b, h, n, column, stop, step_n, width, BN: tl.constexpr, BD: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr
):
    """Rows ``n`` to ``n + BN`` of a head's keys or values from ``column``, [BN, BD]; 0 past ``stop`` and the depth.

    With TMA, ``p`` is a descriptor of [batch, heads, rows, depth]; else it points to the head's first row, and
    ``stop`` None says that all rows exist.  EVEN: so do all columns.
    """
    if TMA:
        return tl.reshape(p.load([b, h, n, column]), [BN, BD])
    else:
        rows = tl.arange(0, BN)
        cols = column + tl.arange(0, BD)
        at = p + n * tl.cast(step_n, tl.int64) + rows[:, None] * step_n + cols[None, :]
        if stop is None:
            if EVEN:
                return tl.load(at)
            else:
                return tl.load(at, mask=(cols < width)[None, :] & (rows >= 0)[:, None], other=0.0)
        else:
            mask = (n + rows < stop)[:, None] & (cols < width)[None, :]
            return tl.load(at, mask=mask, other=0.0)


@triton.jit
def load_mask(at, seen, other: tl.constexpr, keys):
    """The mask where ``seen``, else ``other``; ``keys`` is any number above 0.

    The branch is always taken.  It is there because Triton takes the narrowest load that it finds behind an operand of
    ``dot``, and a mask is behind the weights, for the width of that operand's numbers: with a mask of bytes, it gives
    ``mma.sync`` other groups of keys, so other bits.  It does not look behind a branch.
    """
    found = tl.full(seen.shape, other, at.dtype.element_ty)
    if keys > 0:
        found = tl.load(at, mask=seen, other=other)
    return found


@triton.jit
def seen_and_bias(
    mask_row, n, query, stop, alive, step_k, hidden, BM: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr,
    CAUSAL: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Which of the keys from ``n`` on each row sees, and what is added to their scores (in the log2 domain)."""
    keys = n + tl.arange(0, BN)
    seen = (keys < stop)[None, :] & alive[:, None]
    if CAUSAL:
        seen = seen & (keys[None, :] <= query[:, None])
    log2e: tl.constexpr = 1.4426950408889634
    bias = tl.zeros([BM, BN], DTYPE)
    if MASK == "bool":
        seen = seen & (load_mask(mask_row[:, None] + keys[None, :].to(tl.int64) * step_k, seen, 0, stop) != 0)
    elif MASK == "additive":
        raw = load_mask(mask_row[:, None] + keys[None, :].to(tl.int64) * step_k, seen, float("-inf"), stop).to(DTYPE)
        # Written so that NaN is seen.
        seen = seen & ((raw <= hidden) == 0)
        bias = tl.where(seen, raw, 0.0) * log2e
    return seen, bias


# -- A tile over some of its keys -------------------------------------------------------------------------------------


@triton.jit
def walk(
    M, W, Y, m, w, acc, part, q, k_p, v_p, b, hk, anchor, start, stop, column, k_n, v_n, depth, value_depth, c,
    drop, mask_row, query, alive, mask_k, hidden, part_ptr, stats_ptr, splits, row_id,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, EVEN: tl.constexpr, EVEN_V: tl.constexpr,
    LANES: tl.constexpr, ALL: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, PARTS: tl.constexpr,
    TMA: tl.constexpr, STAGES: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """Blocks of keys from ``start`` to ``stop``; ALL: every row sees all of them.

    Where a split ends, its sums are merged with those before it or, with PARTS, stored as number ``part``.  ``acc`` has
    BDV columns of the values, from ``column``.
    """
    for n in tl.range(start, stop, BN, num_stages=STAGES):
        if ALL:
            k = load_rows(k_p, b, hk, n, 0, None, k_n, depth, BN, BD, EVEN, TMA)
            v = load_rows(v_p, b, hk, n, column, None, v_n, value_depth, BN, BDV, EVEN_V, TMA)
            m, w, acc = step(q, k, v, m, w, acc, c, drop, n, None, None, BM, BN, LANES, "all")
        else:
            k = load_rows(k_p, b, hk, n, 0, stop, k_n, depth, BN, BD, EVEN, TMA)
            v = load_rows(v_p, b, hk, n, column, stop, v_n, value_depth, BN, BDV, EVEN_V, TMA)
            seen, bias = seen_and_bias(mask_row, n, query, stop, alive, mask_k, hidden, BM, BN, MASK, CAUSAL, m.dtype)
            how: tl.constexpr = "biased" if MASK == "additive" else "some"
            m, w, acc = step(q, k, v, m, w, acc, c, drop, n, bias, seen, BM, BN, LANES, how)
        if ends_split(n - anchor + BN, SPLITS):
            if PARTS:
                store_part(
                    part_ptr, stats_ptr, part, splits, row_id, alive, m, w, acc, column, value_depth, BM, BDV, LANES
                )
                part += 1
            else:
                M, W, Y = merge(M, W, Y, m, fold_all(w, BM, LANES), acc)
            m = tl.full([BM], float("-inf"), m.dtype)
            w = tl.zeros([BM, LANES], m.dtype)
            acc = tl.zeros([BM, BDV], m.dtype)
    return M, W, Y, m, w, acc, part


@triton.jit
def store_part(
    part_ptr, stats_ptr, part, splits, row_id, rows, m, w, acc, column, value_depth, BM: tl.constexpr,
    BDV: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Store the sums of split number ``part`` for ``rows``."""
    at = row_id * splits + part
    cols = column + tl.arange(0, BDV)
    mask = rows[:, None] & (cols < value_depth)[None, :]
    tl.store(part_ptr + at[:, None] * value_depth + cols[None, :], acc, mask=mask)
    tl.store(stats_ptr + at * 2, m, mask=rows)
    tl.store(stats_ptr + at * 2 + 1, fold_all(w, BM, LANES), mask=rows)


@triton.jit
def start_of(anchor, whole, BN: tl.constexpr):
    """The last block boundary of the anchor's grid up to ``whole``."""
    return anchor + (whole - anchor) // BN * BN


@triton.jit
def tile_pass(
    anchor, whole, stop, rows, q, k_p, v_p, b, hk, k_n, v_n, depth, value_depth, c, drop, mask_row, query, mask_k,
    out_row, lse_row,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, EVEN: tl.constexpr, EVEN_V: tl.constexpr,
    LANES: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, HIDDEN: tl.constexpr, TMA: tl.constexpr,
    STAGES: tl.constexpr, DTYPE: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """``rows`` of a tile, whose grid starts at ``anchor``, over their keys; all of them see those up to ``whole``."""
    M = tl.full([BM], float("-inf"), DTYPE)
    W = tl.zeros([BM], DTYPE)
    Y = tl.zeros([BM, BDV], DTYPE)
    m = tl.full([BM], float("-inf"), DTYPE)
    w = tl.zeros([BM, LANES], DTYPE)
    acc = tl.zeros([BM, BDV], DTYPE)
    whole = start_of(anchor, whole, BN)
    M, W, Y, m, w, acc, _ = walk(
        M, W, Y, m, w, acc, 0, q, k_p, v_p, b, hk, anchor, anchor, whole, 0, k_n, v_n, depth, value_depth, c,
        drop, mask_row, query, rows, mask_k, HIDDEN, q, q, 0, query, BM, BN, BD, BDV, EVEN, EVEN_V, LANES,
        MASK != "additive", MASK, CAUSAL, False, TMA, STAGES, SPLITS,
    )  # fmt: skip
    M, W, Y, m, w, acc, _ = walk(
        M, W, Y, m, w, acc, 0, q, k_p, v_p, b, hk, anchor, whole, stop, 0, k_n, v_n, depth, value_depth, c,
        drop, mask_row, query, rows, mask_k, HIDDEN, q, q, 0, query, BM, BN, BD, BDV, EVEN, EVEN_V, LANES, False,
        MASK, CAUSAL, False, TMA, 1, SPLITS,
    )  # fmt: skip
    M, W, Y = merge(M, W, Y, m, fold_all(w, BM, LANES), acc)
    store_rows(M, W, Y, out_row, lse_row, BDV, value_depth, rows)


@triton.jit
def scale_of(c_high, c_low, DTYPE: tl.constexpr):
    """A factor, such as that of the scores, which comes in two parts where float32 cannot hold it."""
    if DTYPE == tl.float64:
        return tl.full([], 0.0, DTYPE) + c_high + c_low
    else:
        return c_high


@triton.jit(do_not_specialize=FOLLOWS_SIZES)
def tile_kernel(
    q_ptr, k_p, v_p, mask_ptr, first_ptr, hole_ptr, last_ptr, out_ptr, lse_ptr, flag_ptr, seeds_ptr,
    queries, keys, heads, kv_heads, c_high, c_low, threshold, inverse_high, inverse_low,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, mask_b, mask_h, mask_q, mask_k, info_b, info_h, depth, value_depth,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, EVEN: tl.constexpr, EVEN_V: tl.constexpr,
    LANES: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, HIDDEN: tl.constexpr, TMA: tl.constexpr,
    STAGES: tl.constexpr, DTYPE: tl.constexpr, FLAGGED: tl.constexpr, DROPOUT: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """BM queries of one head over all their keys.  Grid: (batch * heads, tiles of queries), the last tile first.

    FLAGGED > 0: grid (batch * heads, groups of FLAGGED tiles), and only the tiles whose flag is set.
    """
    if FLAGGED > 0:
        tiles = (queries + BM - 1) // BM
        bh = tl.program_id(0)
        first_tile = tl.program_id(1) * FLAGGED
        mine = first_tile + tl.arange(0, FLAGGED)
        flags = tl.load(flag_ptr + bh * tiles + mine, mask=mine < tiles, other=0)
        if tl.max(flags, 0) > 0:
            for tile in range(first_tile, tl.minimum(first_tile + FLAGGED, tiles)):
                if tl.load(flag_ptr + bh * tiles + tile) > 0:
                    one_tile(
                        bh, tile, q_ptr, k_p, v_p, mask_ptr, first_ptr, hole_ptr, last_ptr, out_ptr, lse_ptr,
                        seeds_ptr, queries, keys, heads, kv_heads, c_high, c_low, threshold, inverse_high, inverse_low,
                        q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, mask_b, mask_h, mask_q, mask_k, info_b, info_h,
                        depth, value_depth, BM, BN, BD, BDV, EVEN, EVEN_V, LANES, MASK, CAUSAL, HIDDEN, TMA, STAGES,
                        DTYPE, DROPOUT, SPLITS,
                    )  # fmt: skip
    else:
        one_tile(
            tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1), q_ptr, k_p, v_p, mask_ptr, first_ptr,
            hole_ptr, last_ptr, out_ptr, lse_ptr, seeds_ptr, queries, keys, heads, kv_heads, c_high, c_low,
            threshold, inverse_high, inverse_low, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, mask_b, mask_h, mask_q,
            mask_k, info_b, info_h, depth, value_depth, BM, BN, BD, BDV, EVEN, EVEN_V, LANES, MASK, CAUSAL, HIDDEN, TMA,
            STAGES, DTYPE, DROPOUT, SPLITS,
        )  # fmt: skip


@triton.jit
def one_tile(
    bh, tile, q_ptr, k_p, v_p, mask_ptr, first_ptr, hole_ptr, last_ptr, out_ptr, lse_ptr, seeds_ptr,
    queries, keys, heads, kv_heads, c_high, c_low, threshold, inverse_high, inverse_low,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, mask_b, mask_h, mask_q, mask_k, info_b, info_h, depth, value_depth,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, EVEN: tl.constexpr, EVEN_V: tl.constexpr,
    LANES: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, HIDDEN: tl.constexpr, TMA: tl.constexpr,
    STAGES: tl.constexpr, DTYPE: tl.constexpr, DROPOUT: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """Tile number ``tile`` of head ``bh``."""
    b = bh // heads
    h = bh % heads
    hk = h // (heads // kv_heads)
    b64 = b.to(tl.int64)
    h64 = h.to(tl.int64)
    c = scale_of(c_high, c_low, DTYPE)
    query = tile * BM + tl.arange(0, BM)
    alive = query < queries
    q_row = q_ptr + b64 * q_b + h64 * q_h + query.to(tl.int64) * q_n
    q = load_queries(q_row, alive, depth, BD)
    if not TMA:
        k_p += b64 * k_b + hk.to(tl.int64) * k_h
        v_p += b64 * v_b + hk.to(tl.int64) * v_h
    out_row = out_ptr + ((b64 * queries + query) * heads + h) * value_depth
    stat = bh.to(tl.int64) * queries + query
    lse_row = lse_ptr + stat
    inverse = scale_of(inverse_high, inverse_low, DTYPE)
    drop = None
    if MASK == "none":
        stop = keys
        whole = keys
        if CAUSAL:
            stop = tl.minimum(keys, tile * BM + BM)
            whole = tl.minimum(keys, tile * BM + 1)
        if DROPOUT:
            drop = (states_of(seeds_ptr, stat, alive, None), threshold, inverse)
        tile_pass(
            0, whole, stop, alive, q, k_p, v_p, b, hk, k_n, v_n, depth, value_depth, c, drop, query, query, mask_k,
            out_row, lse_row, BM, BN, BD, BDV, EVEN, EVEN_V, LANES, MASK, CAUSAL, HIDDEN, TMA, STAGES, DTYPE,
            SPLITS,
        )  # fmt: skip
    else:
        mask_row = mask_ptr + b64 * mask_b + h64 * mask_h + query.to(tl.int64) * mask_q
        info = b64 * info_b + h64 * info_h + query
        first = tl.load(first_ptr + info, mask=alive, other=keys)
        hole = tl.load(hole_ptr + info, mask=alive, other=keys)
        last = tl.load(last_ptr + info, mask=alive, other=0)
        store_nothing(out_row, lse_row, BM, BDV, value_depth, alive & (first >= keys), DTYPE)
        if DROPOUT:
            drop = (states_of(seeds_ptr, stat, alive, first), threshold, inverse)
        anchor = tl.min(first, 0)
        while anchor < keys:  # one pass for each anchor among the rows: nearly always one
            rows = alive & (first == anchor)
            stop = tl.max(tl.where(rows, last, 0), 0)
            whole = tl.min(tl.where(rows, hole, keys), 0)
            tile_pass(
                anchor, whole, stop, rows, q, k_p, v_p, b, hk, k_n, v_n, depth, value_depth, c, drop, mask_row, query,
                mask_k, out_row, lse_row, BM, BN, BD, BDV, EVEN, EVEN_V, LANES, MASK, CAUSAL, HIDDEN, TMA, STAGES,
                DTYPE, SPLITS,
            )  # fmt: skip
            anchor = tl.min(tl.where(first > anchor, first, keys), 0)


@triton.jit
def load_queries(q_row, alive, depth, BD: tl.constexpr):
    """The query rows of a tile; 0 past the last and past the depth."""
    cols = tl.arange(0, BD)
    return tl.load(q_row[:, None] + cols[None, :], mask=alive[:, None] & (cols < depth)[None, :], other=0.0)


@triton.jit
def store_rows(M, W, Y, out_row, lse_row, BDV: tl.constexpr, value_depth, rows):
    """Write the quotients, rounded, and the statistics of ``rows``."""
    cols = tl.arange(0, BDV)
    y = Y * reciprocal(W)[:, None] + 0.0  # no -0
    # Inf can only come from a value of Inf, or NaN: one result for all ways to it.
    y = tl.where(tl.abs(y) < float("inf"), y, float("nan"))
    mask = rows[:, None] & (cols < value_depth)[None, :]
    tl.store(out_row[:, None] + cols[None, :], y.to(out_row.dtype.element_ty), mask=mask)
    tl.store(lse_row, (M + tl.log2(W)) * 0.6931471805599453, mask=rows)


@triton.jit
def store_nothing(out_row, lse_row, BM: tl.constexpr, BDV: tl.constexpr, value_depth, rows, DTYPE: tl.constexpr):
    """What a row that sees no key gives: zeros and -inf."""
    cols = tl.arange(0, BDV)
    mask = rows[:, None] & (cols < value_depth)[None, :]
    tl.store(out_row[:, None] + cols[None, :], tl.zeros([BM, BDV], out_row.dtype.element_ty), mask=mask)
    tl.store(lse_row, tl.full([BM], float("-inf"), DTYPE), mask=rows)


@triton.jit
def reciprocal(x):
    """Correctly rounded; 1 for 0, which only a row that is not stored has."""
    x = tl.where(x == 0.0, 1.0, x)
    one = tl.full(x.shape, 1.0, x.dtype)
    if x.dtype == tl.float64:
        return one / x
    else:
        return tl.div_rn(one, x)
