"""The forward kernel of sm_90, in Gluon: one warp loads by TMA, two groups of four warps compute.

The groups take turns at the tensor core by themselves: while one computes weights, the other multiplies.  The sums of
the splits before the current one wait in shared memory.  The order is that of ``kernels.tile_kernel``.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .rows_kernel import FOLLOWS_SIZES

ROWS = 64
"""Queries of one group of four warps; a program has two groups."""


@gluon.jit
def _fold(x, ROWS: gl.constexpr, WIDTH: gl.constexpr, TO: gl.constexpr):
    steps: gl.constexpr = (WIDTH // TO).bit_length() - 1
    for i in gl.static_range(steps):
        x = gl.sum(gl.reshape(x, [ROWS, 2, WIDTH >> (i + 1)]), axis=1)
    return x


@gluon.jit
def _ends_split(stop, SPLITS: gl.constexpr):
    """``kernels.ends_split``."""
    size = SPLITS[0][2]
    for i in gl.static_range(1, len(SPLITS)):
        size = gl.where(stop > SPLITS[i][0], SPLITS[i][2], size)
    return (stop & (size - 1)) == 0


@gluon.jit
def _merge(M, W, Y, m, w, acc, BLOCK: gl.constexpr):
    """``kernels.merge``."""
    new = gl.maximum(M, m)
    safe = gl.where(new == float("-inf"), 0.0, new)
    a = gl.exp2(M - safe)
    b = gl.exp2(m - safe)
    W = gl.fma(W, a, w * b)
    wide: gl.constexpr = gl.SliceLayout(1, BLOCK)
    a = gl.convert_layout(a, wide)
    b = gl.convert_layout(b, wide)
    Y = gl.fma(Y, a[:, None] + gl.zeros_like(Y), acc * b[:, None])
    return new, W, Y


@gluon.jit
def _load(
    q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_bar, k_ready, k_free, v_ready, v_free, b, h, hk, start,
    anchor, blocks,
    ROWS: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """What the loading warp does."""
    mbarrier.expect(q_bar, 2 * q_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(q_desc, [b, h, start, 0], q_bar, q_smem.index(0))
    tma.async_copy_global_to_shared(q_desc, [b, h, start + ROWS, 0], q_bar, q_smem.index(1))
    for i in range(blocks):
        stage = i % STAGES
        phase = (i // STAGES) & 1
        mbarrier.wait(k_free.index(stage), phase ^ 1)
        mbarrier.expect(k_ready.index(stage), k_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(k_desc, [b, hk, anchor + i * BN, 0], k_ready.index(stage), k_smem.index(stage))
        mbarrier.wait(v_free.index(stage), phase ^ 1)
        mbarrier.expect(v_ready.index(stage), v_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(v_desc, [b, hk, anchor + i * BN, 0], v_ready.index(stage), v_smem.index(stage))


@gluon.jit
def _weigh(
    s, m, w, first_key, query, queries, keys, whole, c, mask_ptr, mask_q, mask_k,
    ROWS: gl.constexpr, BN: gl.constexpr, LANES: gl.constexpr, MASK: gl.constexpr, CAUSAL: gl.constexpr,
    SCORES: gl.constexpr, SUMS: gl.constexpr,
):  # fmt: skip
    """Weights of a block's scores, the new running maximum and lanes, and the factor of what was summed before."""
    if first_key + BN > whole:
        key = first_key + gl.arange(0, BN, layout=gl.SliceLayout(0, SCORES))
        seen = (key < keys)[None, :] & (query < queries)[:, None]
        if CAUSAL:
            seen = seen & (key[None, :] <= query[:, None])
        if MASK == "bool":
            at = mask_ptr + (query.to(gl.int64) * mask_q)[:, None] + (key.to(gl.int64) * mask_k)[None, :]
            seen = seen & (gl.load(at, mask=seen, other=0) != 0)
        s = gl.where(seen, s, float("-inf"))
    new = gl.maximum(m, gl.max(s, 1) * c)
    safe = gl.where(new == float("-inf"), 0.0, new)
    factor = gl.full([ROWS, BN], 1.0, gl.float32, layout=SCORES) * c
    p = gl.exp2(gl.fma(s, factor, gl.zeros_like(s) - safe[:, None]))
    alpha = gl.exp2(m - safe)
    folded = gl.convert_layout(_fold(p, ROWS, BN, LANES), SUMS)
    w = w * gl.convert_layout(alpha, gl.SliceLayout(1, SUMS))[:, None] + folded
    return p, new, w, alpha


@gluon.jit
def _all_lanes(w, ROWS: gl.constexpr, LANES: gl.constexpr, SCORES: gl.constexpr):
    """The lanes of the weights' sum added up, one number for each row."""
    return gl.convert_layout(gl.reshape(_fold(w, ROWS, LANES, 1), [ROWS]), gl.SliceLayout(1, SCORES))


@gluon.jit
def _consume(
    q_smem, k_smem, v_smem, o_smem, q_bar, k_ready, k_free, v_ready, v_free, out_ptr, lse_ptr, flag_ptr, b, h,
    start, anchor, whole, blocks, queries, keys, heads, c, mask_ptr, first_ptr, mask_q, mask_k, irregular,
    WHICH: gl.constexpr, ROWS: gl.constexpr, BN: gl.constexpr, BD: gl.constexpr, LANES: gl.constexpr,
    MASK: gl.constexpr, CAUSAL: gl.constexpr, STAGES: gl.constexpr, OVERLAP: gl.constexpr, DTYPE: gl.constexpr,
    SPLITS: gl.constexpr,
):  # fmt: skip
    """What one group of four warps does: ROWS queries over all their keys."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BD, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, LANES, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=OUT, k_width=2)
    R: gl.constexpr = gl.SliceLayout(1, SCORES)
    query = start + WHICH * ROWS + gl.arange(0, ROWS, layout=R)
    q = q_smem.index(WHICH)
    parts = o_smem.index(WHICH)
    M = gl.full([ROWS], float("-inf"), gl.float32, layout=R)
    W = gl.zeros([ROWS], gl.float32, layout=R)
    m = gl.full([ROWS], float("-inf"), gl.float32, layout=R)
    w = gl.zeros([ROWS, LANES], gl.float32, layout=SUMS)
    acc = gl.zeros([ROWS, BD], gl.float32, layout=OUT)
    nothing = gl.zeros([ROWS, BN], gl.float32, layout=SCORES)
    merged = 0
    mbarrier.wait(q_bar, 0)
    if OVERLAP:
        # While the tensor core adds the weighted values of one block, the weights of the next are computed.
        mbarrier.wait(k_ready.index(0), 0)
        s = warpgroup_mma(q, k_smem.index(0).permute((1, 0)), nothing, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
        mbarrier.arrive(k_free.index(0), count=1)
        p, m, w, alpha = _weigh(
            s, m, w, anchor, query, queries, keys, whole, c, mask_ptr, mask_q, mask_k, ROWS, BN, LANES, MASK, CAUSAL,
            SCORES, SUMS,
        )  # fmt: skip
        weights = gl.convert_layout(p.to(DTYPE), WEIGHTS)
        for i in range(blocks - 1):
            stage = i % STAGES
            phase = (i // STAGES) & 1
            stage_k = (i + 1) % STAGES
            phase_k = ((i + 1) // STAGES) & 1
            mbarrier.wait(k_ready.index(stage_k), phase_k)
            s = warpgroup_mma(q, k_smem.index(stage_k).permute((1, 0)), nothing, use_acc=False, is_async=True)
            mbarrier.wait(v_ready.index(stage), phase)
            acc = warpgroup_mma(weights, v_smem.index(stage), acc, is_async=True)
            s = warpgroup_mma_wait(1, deps=[s])
            mbarrier.arrive(k_free.index(stage_k), count=1)
            ends = _ends_split(i * BN + BN, SPLITS)
            m_before = gl.where(ends, float("-inf"), m)
            w_before = gl.where(ends, 0.0, w)
            p, m_next, w_next, alpha = _weigh(
                s, m_before, w_before, anchor + i * BN + BN, query, queries, keys, whole, c, mask_ptr, mask_q, mask_k,
                ROWS, BN, LANES, MASK, CAUSAL, SCORES, SUMS,
            )  # fmt: skip
            acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])
            mbarrier.arrive(v_free.index(stage), count=1)
            if ends:
                if merged == 0:
                    M, W = m, _all_lanes(w, ROWS, LANES, SCORES)
                    parts.store(acc)
                else:
                    M, W, total = _merge(M, W, parts.load(OUT), m, _all_lanes(w, ROWS, LANES, SCORES), acc, OUT)
                    parts.store(total)
                merged += 1
                acc = gl.zeros([ROWS, BD], gl.float32, layout=OUT)
            acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, OUT))[:, None]
            weights = gl.convert_layout(p.to(DTYPE), WEIGHTS)
            m = m_next
            w = w_next
        stage = (blocks - 1) % STAGES
        mbarrier.wait(v_ready.index(stage), ((blocks - 1) // STAGES) & 1)
        acc = warpgroup_mma(weights, v_smem.index(stage), acc, is_async=True)
        acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])
    else:
        for i in range(blocks):
            stage = i % STAGES
            phase = (i // STAGES) & 1
            mbarrier.wait(k_ready.index(stage), phase)
            s = warpgroup_mma(q, k_smem.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=[s])
            mbarrier.arrive(k_free.index(stage), count=1)
            if _ends_split(i * BN, SPLITS) and i > 0:
                if merged == 0:
                    M, W = m, _all_lanes(w, ROWS, LANES, SCORES)
                    parts.store(acc)
                else:
                    M, W, total = _merge(M, W, parts.load(OUT), m, _all_lanes(w, ROWS, LANES, SCORES), acc, OUT)
                    parts.store(total)
                merged += 1
                m = gl.full([ROWS], float("-inf"), gl.float32, layout=R)
                w = gl.zeros([ROWS, LANES], gl.float32, layout=SUMS)
                acc = gl.zeros([ROWS, BD], gl.float32, layout=OUT)
            p, m, w, alpha = _weigh(
                s, m, w, anchor + i * BN, query, queries, keys, whole, c, mask_ptr, mask_q, mask_k, ROWS, BN, LANES,
                MASK, CAUSAL, SCORES, SUMS,
            )  # fmt: skip
            acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, OUT))[:, None]
            weights = gl.convert_layout(p.to(DTYPE), WEIGHTS)
            mbarrier.wait(v_ready.index(stage), phase)
            acc = warpgroup_mma(weights, v_smem.index(stage), acc, is_async=True)
            acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])
            mbarrier.arrive(v_free.index(stage), count=1)
    sums = _all_lanes(w, ROWS, LANES, SCORES)
    total = acc
    if merged == 0:
        M, W = m, sums
    else:
        M, W, total = _merge(M, W, parts.load(OUT), m, sums, acc, OUT)
    some = gl.where(W == 0.0, 1.0, W)
    inverse = gl.div_rn(gl.full([ROWS], 1.0, gl.float32, layout=R), some)
    y = total * gl.convert_layout(inverse, gl.SliceLayout(1, OUT))[:, None] + 0.0
    finite = gl.abs(y) < float("inf")
    y = gl.where(finite, y, float("nan"))
    wide = start + WHICH * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, OUT))
    row = (b.to(gl.int64) * queries + wide) * heads + h
    cols = gl.arange(0, BD, layout=gl.SliceLayout(0, OUT))
    mask = (wide < queries)[:, None] & (cols >= 0)[None, :]
    lse = (M + gl.log2(W)) * 0.6931471805599453
    if MASK != "none":
        some = gl.load(first_ptr + wide, mask=wide < queries, other=keys) < keys
        y = gl.where(some[:, None], y, 0.0)
        some = gl.load(first_ptr + query, mask=query < queries, other=keys) < keys
        lse = gl.where(some, lse, float("-inf"))
    gl.store(out_ptr + row[:, None] * BD + cols[None, :], y.to(DTYPE), mask=mask)
    stat = (b.to(gl.int64) * heads + h) * queries + query
    if CAUSAL or MASK != "none":
        # A value of NaN or Inf may have reached rows that do not see it.
        row = start + WHICH * ROWS
        flag = flag_ptr + (b * heads + h) * ((queries + ROWS - 1) // ROWS) + row // ROWS
        odd = gl.max(gl.max(gl.where(finite, 0, 1), 1), 0)
        gl.store(flag, odd | irregular, mask=row < queries)
    gl.store(lse_ptr + stat, lse, mask=query < queries)


@gluon.jit(do_not_specialize=FOLLOWS_SIZES)
def hopper_kernel(
    q_desc, k_desc, v_desc, mask_ptr, first_ptr, hole_ptr, last_ptr, out_ptr, lse_ptr, flag_ptr,
    queries, keys, heads, kv_heads, c, mask_b, mask_h, mask_q, mask_k, info_b, info_h,
    ROWS: gl.constexpr, BN: gl.constexpr, BD: gl.constexpr, LANES: gl.constexpr, MASK: gl.constexpr,
    CAUSAL: gl.constexpr, STAGES: gl.constexpr, OVERLAP: gl.constexpr, DTYPE: gl.constexpr,
    SPLITS: gl.constexpr,
):  # fmt: skip
    """2 * ROWS queries of one head over all their keys.  Grid: (batch * heads, tiles of queries), the last first.

    Sets the flag of each group of ROWS queries that must be computed again, by ``kernels.tile_kernel``: where its rows
    count from different keys, or where a value that is not finite may have reached a row that does not see it.
    """
    bh = gl.program_id(0)
    tile = gl.num_programs(1) - 1 - gl.program_id(1)
    b = bh // heads
    h = bh % heads
    hk = h // (heads // kv_heads)
    start = tile * 2 * ROWS
    anchor = 0
    irregular = 0
    stop = keys
    whole = keys
    if MASK == "none":
        if CAUSAL:
            stop = gl.minimum(keys, start + 2 * ROWS)
            whole = gl.minimum(keys, start + 1)
    else:
        lines: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
        query = start + gl.arange(0, 2 * ROWS, layout=lines)
        alive = query < queries
        info = b.to(gl.int64) * info_b + h.to(gl.int64) * info_h
        first_ptr += info
        mask_ptr += b.to(gl.int64) * mask_b + h.to(gl.int64) * mask_h
        first = gl.load(first_ptr + query, mask=alive, other=keys)
        hole = gl.load(hole_ptr + info + query, mask=alive, other=keys)
        last = gl.load(last_ptr + info + query, mask=alive, other=0)
        anchor = gl.min(first, 0)
        irregular = (gl.min(gl.where(first > anchor, first, keys), 0) < keys).to(gl.int32)
        stop = gl.where(irregular > 0, 0, gl.max(last, 0))
        whole = gl.min(gl.where(first < keys, hole, keys), 0)
    blocks = gl.maximum((stop - anchor + BN - 1) // BN, 1)
    tile_layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    part_layout: gl.constexpr = gl.SwizzledSharedLayout(vec=8, per_phase=1, max_phase=8, order=[1, 0])
    q_smem = gl.allocate_shared_memory(DTYPE, [2, ROWS, BD], tile_layout)
    k_smem = gl.allocate_shared_memory(DTYPE, [STAGES, BN, BD], tile_layout)
    v_smem = gl.allocate_shared_memory(DTYPE, [STAGES, BN, BD], tile_layout)
    o_smem = gl.allocate_shared_memory(gl.float32, [2, ROWS, BD], part_layout)
    q_bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_bar, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(v_free.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    q_smem, k_smem, v_smem, o_smem, q_bar, k_ready, k_free, v_ready, v_free, out_ptr, lse_ptr,
                    flag_ptr, b, h, start, anchor, whole, blocks, queries, keys, heads, c, mask_ptr, first_ptr, mask_q,
                    mask_k, irregular, 0, ROWS, BN, BD, LANES, MASK, CAUSAL, STAGES, OVERLAP, DTYPE, SPLITS,
                ),
            ),
            (
                _consume,
                (
                    q_smem, k_smem, v_smem, o_smem, q_bar, k_ready, k_free, v_ready, v_free, out_ptr, lse_ptr,
                    flag_ptr, b, h, start, anchor, whole, blocks, queries, keys, heads, c, mask_ptr, first_ptr, mask_q,
                    mask_k, irregular, 1, ROWS, BN, BD, LANES, MASK, CAUSAL, STAGES, OVERLAP, DTYPE, SPLITS,
                ),
            ),
            (
                _load,
                (
                    q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_bar, k_ready, k_free, v_ready, v_free, b, h, hk,
                    start, anchor, blocks, ROWS, BN, STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
