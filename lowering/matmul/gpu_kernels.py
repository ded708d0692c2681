"""The Triton kernels of the matrix products: one chain over ascending k for each output element."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _place(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Which rows and columns a tile takes: ``GROUP`` rows of tiles at a time, so that neighbours share operands."""
    width = GROUP * tiles_n
    first = tile // width * GROUP
    height = min(tiles_m - first, GROUP)
    return first + (tile % width) % height, (tile % width) // height


@triton.jit
def _finish(acc, c_ptr, rows, columns, inside, stride_cm, stride_cn, ADD: tl.constexpr, OUT: tl.constexpr):
    """Round to the output type, once; then add the addend in that type, which rounds again."""
    result = acc.to(OUT)
    if ADD:
        offsets = rows[:, None].to(tl.int64) * stride_cm + columns[None, :].to(tl.int64) * stride_cn
        addend = tl.load(c_ptr + offsets, mask=inside, other=0.0)
        result = (result.to(acc.dtype) + addend.to(acc.dtype)).to(OUT)
    return result


@triton.jit
def _chain(
    a_ptr,
    b_ptr,
    near_m,
    near_n,
    num_k,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """The sum over all k of one tile, ``[BLOCK_M, BLOCK_N]``; ``a_ptr`` and ``b_ptr`` point to its first factors.

    ``near_m`` and ``near_n`` are the tile's rows and columns.  ``SWAP`` computes the transposed tile, which lets a few
    rows be the narrow side of the tensor core's instruction.  ``EVEN``: K is a multiple of ``BLOCK_K``.  ``WIDE``:
    offsets inside a tile may pass 2**31.
    """
    in_k = tl.arange(0, BLOCK_K)
    if WIDE:
        a_offsets = near_m[:, None].to(tl.int64) * stride_am + in_k[None, :].to(tl.int64) * stride_ak
        b_offsets = near_n[None, :].to(tl.int64) * stride_bn + in_k[:, None].to(tl.int64) * stride_bk
    else:
        a_offsets = near_m[:, None] * stride_am + in_k[None, :] * stride_ak
        b_offsets = near_n[None, :] * stride_bn + in_k[:, None] * stride_bk
    if SWAP:
        acc = tl.zeros((BLOCK_N, BLOCK_M), ACC)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for k in range(0, num_k, BLOCK_K):
        if EVEN:
            a = tl.load(a_ptr + a_offsets)
            b = tl.load(b_ptr + b_offsets)
        else:
            a = tl.load(a_ptr + a_offsets, mask=in_k[None, :] < num_k - k, other=0.0)
            b = tl.load(b_ptr + b_offsets, mask=in_k[:, None] < num_k - k, other=0.0)
        if SWAP:
            acc = tl.dot(b.T, a.T, acc, input_precision=PRECISION, out_dtype=ACC)
        else:
            acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=ACC)
        a_ptr += tl.full((), BLOCK_K, tl.int64) * stride_ak
        b_ptr += tl.full((), BLOCK_K, tl.int64) * stride_bk
    if SWAP:
        return acc.T
    else:
        return acc


@triton.jit(do_not_specialize=["num_m"])
def tile_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    out_ptr,
    num_m,
    num_n,
    num_k,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    stride_cm,
    stride_cn,
    step_a,
    step_b,
    step_c,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    SWAP: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """One program for each tile of each ``out[i] = a[i] @ b[i] (+ c[i])``; any strides, any sizes.

    ``a`` is ``[B, M, K]``, ``b`` ``[B, K, N]``, ``out`` contiguous ``[B, M, N]``; ``step_*`` are the batch strides.
    """
    tiles_m = tl.cdiv(num_m, BLOCK_M)
    tiles_n = tl.cdiv(num_n, BLOCK_N)
    program = tl.program_id(0)
    batch = (program // (tiles_m * tiles_n)).to(tl.int64)
    tile_m, tile_n = _place(program % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP)
    in_m = tl.arange(0, BLOCK_M)
    in_n = tl.arange(0, BLOCK_N)
    rows = tile_m * BLOCK_M + in_m
    columns = tile_n * BLOCK_N + in_n
    # Rows and columns past the end read the first of the tile, and are not stored.
    total = _chain(
        a_ptr + batch * step_a + (tile_m * BLOCK_M).to(tl.int64) * stride_am,
        b_ptr + batch * step_b + (tile_n * BLOCK_N).to(tl.int64) * stride_bn,
        tl.where(rows < num_m, in_m, 0),
        tl.where(columns < num_n, in_n, 0),
        num_k,
        stride_am,
        stride_ak,
        stride_bk,
        stride_bn,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        SWAP,
        EVEN,
        WIDE,
        PRECISION,
        ACC,
    )
    inside = (rows[:, None] < num_m) & (columns[None, :] < num_n)
    result = _finish(
        total, c_ptr + batch * step_c, rows, columns, inside, stride_cm, stride_cn, ADD, out_ptr.dtype.element_ty
    )
    out_ptr += (batch * num_m + tile_m * BLOCK_M) * num_n + tile_n * BLOCK_N
    tl.store(out_ptr + in_m[:, None].to(tl.int64) * num_n + in_n[None, :], result, mask=inside)


@triton.jit
def _bounds(ends_ptr, groups, num_groups, limit):
    """Where each of ``groups`` starts and ends; the one after the last takes what is left up to ``limit``.

    Offsets that are too large, or below the one before, are pulled to what is possible: nothing outside may be read.
    """
    starts = tl.load(ends_ptr + groups - 1, mask=(groups > 0) & (groups <= num_groups), other=0)
    ends = tl.load(ends_ptr + groups, mask=groups < num_groups, other=limit)
    ends = tl.minimum(tl.maximum(ends, 0), limit)
    starts = tl.minimum(tl.maximum(starts, 0), limit)
    return starts, tl.where(groups <= num_groups, tl.maximum(ends, starts), starts)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit(do_not_specialize=["num_m", "tiles_m"])
def grouped_rows_kernel(
    a_ptr,
    b_ptr,
    ends_ptr,
    out_ptr,
    num_m,
    tiles_m,
    num_n,
    num_k,
    num_groups,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    step_b,
    stride_out,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """``out[rows of group g] = a[rows of group g] @ b[g]``; rows beyond the last group get zeros.

    ``a`` is ``[M, K]``, ``b`` ``[G, K, N]``; group g ends before row ``ends[g]``.  ``GROUPS``, a power of two, is more
    than G.  Only the device knows the groups, so there are as many programs as the most tiles that there can be.
    """
    tile = tl.program_id(0) % tiles_m
    tile_n = tl.program_id(0) // tiles_m
    groups = tl.arange(0, GROUPS)
    starts, ends = _bounds(ends_ptr, groups, num_groups, num_m)
    # No row belongs to two groups, or two programs would write it.
    starts = tl.associative_scan(starts, 0, _larger)
    ends = tl.maximum(ends, starts)
    tiles = tl.cdiv(ends - starts, BLOCK_M)
    group = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)  # sums of integers: exact in any order
    if group > num_groups:
        return
    mine = groups == group
    end = tl.sum(tl.where(mine, ends, 0), 0)
    first = tl.sum(tl.where(mine, starts, 0), 0) + (tile - tl.sum(tl.where(groups < group, tiles, 0), 0)) * BLOCK_M
    in_m = tl.arange(0, BLOCK_M)
    in_n = tl.arange(0, BLOCK_N)
    rows = first + in_m
    columns = tile_n * BLOCK_N + in_n
    is_beyond = group == num_groups
    weight = tl.where(is_beyond, 0, group).to(tl.int64)
    total = _chain(
        a_ptr + first.to(tl.int64) * stride_am,
        b_ptr + weight * step_b + (tile_n * BLOCK_N).to(tl.int64) * stride_bn,
        tl.where(rows < end, in_m, 0),
        tl.where(columns < num_n, in_n, 0),
        tl.where(is_beyond, 0, num_k),
        stride_am,
        stride_ak,
        stride_bk,
        stride_bn,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        SWAP,
        EVEN,
        WIDE,
        PRECISION,
        ACC,
    )
    inside = (rows[:, None] < end) & (columns[None, :] < num_n)
    out_ptr += first.to(tl.int64) * stride_out + tile_n * BLOCK_N
    offsets = in_m[:, None].to(tl.int64) * stride_out + in_n[None, :]
    tl.store(out_ptr + offsets, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_k"])
def grouped_depths_kernel(
    a_ptr,
    b_ptr,
    ends_ptr,
    out_ptr,
    num_m,
    num_n,
    num_k,
    num_groups,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    stride_out,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    SWAP: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """``out[g] = a[:, k of group g] @ b[k of group g]``: ``[M, K]`` and ``[K, N]`` to ``[G, M, N]``.

    Group g ends before ``ends[g]``, and its chain starts at its own first k.
    """
    tiles_m = tl.cdiv(num_m, BLOCK_M)
    tiles_n = tl.cdiv(num_n, BLOCK_N)
    program = tl.program_id(0)
    group = program // (tiles_m * tiles_n)
    tile_m, tile_n = _place(program % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP)
    start, end = _bounds(ends_ptr, group, num_groups, num_k)
    in_m = tl.arange(0, BLOCK_M)
    in_n = tl.arange(0, BLOCK_N)
    rows = tile_m * BLOCK_M + in_m
    columns = tile_n * BLOCK_N + in_n
    total = _chain(
        a_ptr + (tile_m * BLOCK_M).to(tl.int64) * stride_am + start.to(tl.int64) * stride_ak,
        b_ptr + (tile_n * BLOCK_N).to(tl.int64) * stride_bn + start.to(tl.int64) * stride_bk,
        tl.where(rows < num_m, in_m, 0),
        tl.where(columns < num_n, in_n, 0),
        end - start,
        stride_am,
        stride_ak,
        stride_bk,
        stride_bn,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        SWAP,
        False,
        WIDE,
        PRECISION,
        ACC,
    )
    inside = (rows[:, None] < num_m) & (columns[None, :] < num_n)
    out_ptr += (group.to(tl.int64) * num_m + tile_m * BLOCK_M) * stride_out + tile_n * BLOCK_N
    offsets = in_m[:, None].to(tl.int64) * stride_out + in_n[None, :]
    tl.store(out_ptr + offsets, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_m"])
def scaled_kernel(
    a_ptr,
    b_ptr,
    a_scale_ptr,
    b_scale_ptr,
    bias_ptr,
    out_ptr,
    num_m,
    num_n,
    num_k,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    step_a_scale,
    step_b_scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    SWAP: tl.constexpr,
    EVEN: tl.constexpr,
    ADD: tl.constexpr,
):
    """``out = (a @ b) * a_scale * b_scale (+ bias)`` of 8-bit floats; a scale for each row or column, or (step 0) one.

    Each ``BLOCK_K`` of k is a chain of its own from +0, because the tensor core keeps few bits of such a chain.
    """
    tiles_m = tl.cdiv(num_m, BLOCK_M)
    tiles_n = tl.cdiv(num_n, BLOCK_N)
    tile_m, tile_n = _place(tl.program_id(0), tiles_m, tiles_n, GROUP)
    in_m = tl.arange(0, BLOCK_M)
    in_n = tl.arange(0, BLOCK_N)
    in_k = tl.arange(0, BLOCK_K)
    rows = tile_m * BLOCK_M + in_m
    columns = tile_n * BLOCK_N + in_n
    near_m = tl.where(rows < num_m, rows, 0).to(tl.int64)
    near_n = tl.where(columns < num_n, columns, 0).to(tl.int64)
    a_ptrs = a_ptr + near_m[:, None] * stride_am + in_k[None, :] * stride_ak
    b_ptrs = b_ptr + near_n[None, :] * stride_bn + in_k[:, None] * stride_bk
    if SWAP:
        total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, num_k, BLOCK_K):
        if EVEN:
            a = tl.load(a_ptrs)
            b = tl.load(b_ptrs)
        else:
            a = tl.load(a_ptrs, mask=in_k[None, :] < num_k - k, other=0.0)
            b = tl.load(b_ptrs, mask=in_k[:, None] < num_k - k, other=0.0)
        # A fused multiply by one is an addition that the compiler does not move into the tensor core's chain.
        if SWAP:
            total = tl.fma(tl.dot(b.T, a.T), tl.full((BLOCK_N, BLOCK_M), 1.0, tl.float32), total)
        else:
            total = tl.fma(tl.dot(a, b), tl.full((BLOCK_M, BLOCK_N), 1.0, tl.float32), total)
        a_ptrs += tl.full((), BLOCK_K, tl.int64) * stride_ak
        b_ptrs += tl.full((), BLOCK_K, tl.int64) * stride_bk
    result = total
    if SWAP:
        result = total.T
    result = result * tl.load(a_scale_ptr + near_m * step_a_scale)[:, None]
    result = result * tl.load(b_scale_ptr + near_n * step_b_scale)[None, :]
    inside = (rows[:, None] < num_m) & (columns[None, :] < num_n)
    result = _finish(result, bias_ptr, rows, columns, inside, 0, 1, ADD, out_ptr.dtype.element_ty)
    out_ptr += (tile_m * BLOCK_M).to(tl.int64) * num_n + tile_n * BLOCK_N
    tl.store(out_ptr + in_m[:, None].to(tl.int64) * num_n + in_n[None, :], result, mask=inside)


@triton.jit(do_not_specialize=["num_m"])
def stream_kernel(
    a_desc,
    b_desc,
    c_ptr,
    out_desc,
    num_m,
    num_n,
    num_k,
    stride_cm,
    stride_cn,
    PROGRAMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    SWAP: tl.constexpr,
    A_BY_K: tl.constexpr,
    B_BY_K: tl.constexpr,
    PARTS: tl.constexpr,
    FLATTEN: tl.constexpr,
    ADD: tl.constexpr,
):
    """``out = a @ b (+ c)`` of matrices, loaded and stored by the tensor memory accelerator; persistent programs.

    Each of ``PROGRAMS`` programs takes every ``PROGRAMS``-th tile.  ``A_BY_K``: ``a_desc`` is of ``a`` as ``[M, K]``,
    else of its transposed; ``B_BY_K``: ``b_desc`` is of ``b`` transposed, ``[N, K]``, else of ``[K, N]``.
    The tile is stored in ``PARTS`` parts, which need less shared memory.
    """
    OUT: tl.constexpr = out_desc.dtype
    tiles_m = tl.cdiv(num_m, BLOCK_M)
    tiles_n = tl.cdiv(num_n, BLOCK_N)
    steps = tl.cdiv(num_k, BLOCK_K)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=FLATTEN):
        tile_m, tile_n = _place(tile, tiles_m, tiles_n, GROUP)
        if SWAP:
            acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        else:
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(steps):
            if A_BY_K:
                a = a_desc.load([tile_m * BLOCK_M, step * BLOCK_K])
            else:
                a = a_desc.load([step * BLOCK_K, tile_m * BLOCK_M]).T
            if B_BY_K:
                b = b_desc.load([tile_n * BLOCK_N, step * BLOCK_K]).T
            else:
                b = b_desc.load([step * BLOCK_K, tile_n * BLOCK_N])
            if SWAP:
                acc = tl.dot(b.T, a.T, acc)
            else:
                acc = tl.dot(a, b, acc)
        total = acc
        if SWAP:
            total = acc.T
        rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        if PARTS == 1:
            columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
            inside = (rows[:, None] < num_m) & (columns[None, :] < num_n)
            result = _finish(total, c_ptr, rows, columns, inside, stride_cm, stride_cn, ADD, OUT)
            out_desc.store([tile_m * BLOCK_M, tile_n * BLOCK_N], result)
        else:
            HALF: tl.constexpr = BLOCK_N // 2
            halves = tl.split(tl.permute(tl.reshape(total, (BLOCK_M, 2, HALF)), (0, 2, 1)))
            for part in tl.static_range(2):
                columns = tile_n * BLOCK_N + part * HALF + tl.arange(0, HALF)
                inside = (rows[:, None] < num_m) & (columns[None, :] < num_n)
                result = _finish(halves[part], c_ptr, rows, columns, inside, stride_cm, stride_cn, ADD, OUT)
                out_desc.store([tile_m * BLOCK_M, tile_n * BLOCK_N + part * HALF], result)
