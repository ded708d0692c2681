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
    ``SWAP`` computes the transposed tile, which lets a few rows be the narrow side of the tensor core's instruction.
    ``EVEN``: K is a multiple of ``BLOCK_K``.  ``WIDE``: offsets inside a tile may pass 2**31.
    """
    tiles_m = tl.cdiv(num_m, BLOCK_M)
    tiles_n = tl.cdiv(num_n, BLOCK_N)
    program = tl.program_id(0)
    batch = (program // (tiles_m * tiles_n)).to(tl.int64)
    tile_m, tile_n = _place(program % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP)
    in_m = tl.arange(0, BLOCK_M)
    in_n = tl.arange(0, BLOCK_N)
    in_k = tl.arange(0, BLOCK_K)
    rows = tile_m * BLOCK_M + in_m
    columns = tile_n * BLOCK_N + in_n
    # Rows and columns past the end read the first of the tile, and are not stored.
    near_m = tl.where(rows < num_m, in_m, 0)
    near_n = tl.where(columns < num_n, in_n, 0)
    a_ptr += batch * step_a + (tile_m * BLOCK_M).to(tl.int64) * stride_am
    b_ptr += batch * step_b + (tile_n * BLOCK_N).to(tl.int64) * stride_bn
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
    total = acc
    if SWAP:
        total = acc.T
    inside = (rows[:, None] < num_m) & (columns[None, :] < num_n)
    result = _finish(
        total, c_ptr + batch * step_c, rows, columns, inside, stride_cm, stride_cn, ADD, out_ptr.dtype.element_ty
    )
    out_ptr += (batch * num_m + tile_m * BLOCK_M) * num_n + tile_n * BLOCK_N
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
