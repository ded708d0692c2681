"""The kernels of the scatter ops: keys, and walks along the contributions of one destination in ascending order."""

from __future__ import annotations

import triton
import triton.language as tl

_LOOSE = ["n", "blocks", "programs", "skipped"]
"""Not specialised; of widths and strides known to be divisible by 16, several elements are loaded at once."""


@triton.jit
def _step(a, b, HOW: tl.constexpr):
    if HOW == "add":
        return a + b
    elif HOW == "multiply":
        return a * b
    elif HOW == "larger":
        return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    else:
        return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _with_one_nan(x):
    """``x`` with the canonical NaN for every other."""
    wide = x.to(tl.float32)
    if x.dtype == tl.float64:
        bits = tl.where(wide != wide, 0x7FF8000000000000, x.to(tl.int64, bitcast=True))
    elif x.dtype == tl.float32:
        bits = tl.where(wide != wide, 0x7FC00000, x.to(tl.int32, bitcast=True))
    elif x.dtype == tl.bfloat16:
        bits = tl.where(wide != wide, 0x7FC0, x.to(tl.int16, bitcast=True))
    else:
        bits = tl.where(wide != wide, 0x7E00, x.to(tl.int16, bitcast=True))
    return bits.to(x.dtype, bitcast=True)


@triton.jit(do_not_specialize=["n", "columns", "count", "step"])
def keys_kernel(index_ptr, keys_ptr, n, columns, count, step, WRAP: tl.constexpr, BLOCK: tl.constexpr):
    """The destination of each index of a [n / columns, columns] array: ``index * columns + column``, checked."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = i < n
    at = tl.load(index_ptr + i * step, mask=live, other=0).to(tl.int64)
    if WRAP:
        at = tl.where(at < 0, at + count, at)
    tl.device_assert((at >= 0) & (at < count) | (i >= n), "bicompile scatter: index out of range")
    tl.store(keys_ptr + i, (at * columns + i % columns).to(keys_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["n"])
def canonical_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """Copy, with the canonical NaN for every other."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0)
    tl.store(out_ptr + i, _with_one_nan(x), mask=i < n)


@triton.jit
def _initial(self_ptr, at, live, FROM_SELF: tl.constexpr, START: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    if FROM_SELF:
        return tl.load(self_ptr + at, mask=live, other=0.0).to(ACC)
    else:
        return tl.full([BLOCK], START, ACC)


@triton.jit
def _store(out_ptr, at, live, total, count, MEAN: tl.constexpr):
    if MEAN:
        if total.dtype == tl.float64:
            total = total / count.to(tl.float64)
        else:
            total = tl.div_rn(total, tl.zeros_like(total) + count.to(tl.float32))
    tl.store(out_ptr + at, _with_one_nan(total.to(out_ptr.dtype.element_ty)), mask=live)


@triton.jit(do_not_specialize=_LOOSE)
def walk_rows_kernel(
    keys_ptr,
    positions_ptr,
    self_ptr,
    values_ptr,
    out_ptr,
    n,
    width,
    blocks,
    programs,
    values_outer,
    values_row,
    out_outer,
    skipped,
    HOW: tl.constexpr,
    START: tl.constexpr,
    FROM_SELF: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
    LONG: tl.constexpr,
    ACC: tl.constexpr,
):
    """One destination's contributions to BLOCK columns, by the program of the first of them in sorted order."""
    pid = tl.program_id(0).to(tl.int64)
    first = pid // programs
    to = tl.load(keys_ptr + first).to(tl.int64)
    before = tl.load(keys_ptr + first - 1, mask=first > 0, other=-1).to(tl.int64)
    starts = (to != before) & (to != skipped)
    if LONG > 0:
        # Sorted keys: where the first and the last of an aligned stretch are this destination's, so are all.
        stretch = (first + LONG - 1) // LONG * LONG
        start = tl.load(keys_ptr + stretch, mask=stretch + LONG <= n, other=-1).to(tl.int64)
        last = tl.load(keys_ptr + stretch + LONG - 1, mask=stretch + LONG <= n, other=-1).to(tl.int64)
        starts = starts & ((start != to) | (last != to))
    if starts:
        outer = pid % programs // blocks
        cols = pid % blocks * BLOCK + tl.arange(0, BLOCK)
        live = cols < width
        at = outer * out_outer + to * width + cols
        source = values_ptr + outer * values_outer + cols
        total = _initial(self_ptr, at, live, FROM_SELF, START, BLOCK, ACC)
        count = tl.full([], 1 if FROM_SELF else 0, tl.int64)
        j = first
        more = to
        while more == to:
            # First all keys and places, then all values: a load waits for those before it in program order.
            mine = ()
            rows = ()
            for u in tl.static_range(AHEAD):
                mine = mine + (tl.load(keys_ptr + j + u, mask=j + u < n, other=-1).to(tl.int64) == to,)
                rows = rows + (tl.load(positions_ptr + j + u, mask=j + u < n, other=0).to(tl.int64),)
            xs = ()
            for u in tl.static_range(AHEAD):
                xs = xs + (tl.load(source + rows[u] * values_row, mask=live & mine[u], other=0.0),)
            for u in tl.static_range(AHEAD):
                # Not a neutral element: adding +0 would turn -0 into +0.
                total = tl.where(mine[u], _step(total, xs[u].to(ACC), HOW), total)
                count += mine[u].to(tl.int64)
            j += AHEAD
            more = tl.load(keys_ptr + j, mask=j < n, other=-1).to(tl.int64)
        _store(out_ptr, at, live, total, count, MEAN)


@triton.jit
def _first_at_least(keys_ptr, key, low, high):
    """The first place in (low, high] whose key is at least ``key``, for sorted keys; high stands for such a place."""
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(keys_ptr + middle).to(tl.int64) >= key:
            high = middle
        else:
            low = middle
    return high


@triton.jit
def _places(positions_ptr, j, end, AHEAD: tl.constexpr):
    """Where the contributions from ``j`` on lie in the source, as far as they lie before ``end``."""
    rows = ()
    for u in tl.static_range(AHEAD):
        rows = rows + (tl.load(positions_ptr + j + u, mask=j + u < end, other=0).to(tl.int64),)
    return rows


@triton.jit
def _values(source, rows, values_row, j, end, live, AHEAD: tl.constexpr):
    """The contributions from ``j`` on, which lie at ``rows``, as far as they lie before ``end``."""
    xs = ()
    for u in tl.static_range(AHEAD):
        xs = xs + (tl.load(source + rows[u] * values_row, mask=live & (j + u < end), other=0.0),)
    return xs


@triton.jit
def _first_values(source, positions_ptr, values_row, j, end, live, AHEAD: tl.constexpr):
    """What ``_values`` loads, after its places."""
    return _values(source, _places(positions_ptr, j, end, AHEAD), values_row, j, end, live, AHEAD)


@triton.jit(do_not_specialize=_LOOSE)
def walk_long_rows_kernel(
    keys_ptr,
    positions_ptr,
    self_ptr,
    values_ptr,
    out_ptr,
    n,
    width,
    blocks,
    programs,
    values_outer,
    values_row,
    out_outer,
    skipped,
    HOW: tl.constexpr,
    START: tl.constexpr,
    FROM_SELF: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
    LONG: tl.constexpr,
    ACC: tl.constexpr,
):
    """The destinations that ``walk_rows_kernel`` leaves alone, by the program of their first aligned stretch."""
    pid = tl.program_id(0).to(tl.int64)
    stretch = pid // programs * LONG
    to = tl.load(keys_ptr + stretch).to(tl.int64)
    last = tl.load(keys_ptr + stretch + LONG - 1).to(tl.int64)
    before = tl.load(keys_ptr + stretch - LONG, mask=stretch > 0, other=-1).to(tl.int64)
    if (to == last) & (to != before) & (to != skipped):
        outer = pid % programs // blocks
        cols = pid % blocks * BLOCK + tl.arange(0, BLOCK)
        live = cols < width
        at = outer * out_outer + to * width + cols
        source = values_ptr + outer * values_outer + cols
        total = _initial(self_ptr, at, live, FROM_SELF, START, BLOCK, ACC)
        low = tl.maximum(stretch - LONG, -1)
        j = _first_at_least(keys_ptr, to, low, stretch)
        end = _first_at_least(keys_ptr, to + 1, stretch + LONG - 1, n.to(tl.int64))
        count = end - j
        if FROM_SELF:
            count += 1
        # Four groups of values are on their way while one is added, and the places of a fifth.  Each of the four has
        # loads of its own: Triton takes variables for one that are one before the loop and change places in it.
        one = _first_values(source, positions_ptr, values_row, j, end, live, AHEAD)
        two = _first_values(source, positions_ptr, values_row, j + AHEAD, end, live, AHEAD)
        three = _first_values(source, positions_ptr, values_row, j + 2 * AHEAD, end, live, AHEAD)
        four = _first_values(source, positions_ptr, values_row, j + 3 * AHEAD, end, live, AHEAD)
        rows = _places(positions_ptr, j + 4 * AHEAD, end, AHEAD)
        while j < end:
            five = _values(source, rows, values_row, j + 4 * AHEAD, end, live, AHEAD)
            rows = _places(positions_ptr, j + 5 * AHEAD, end, AHEAD)
            for u in tl.static_range(AHEAD):
                total = tl.where(j + u < end, _step(total, one[u].to(ACC), HOW), total)
            one = two
            two = three
            three = four
            four = five
            j += AHEAD
        _store(out_ptr, at, live, total, count, MEAN)


@triton.jit(do_not_specialize=["n"])
def walk_sorted_kernel(
    keys_ptr, positions_ptr, values_ptr, total_ptr, n, HOW: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr
):
    """``total[key]`` steps over the values of its key, by the thread of the first of them in sorted order."""
    first = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    to = tl.load(keys_ptr + first, mask=first < n, other=-1).to(tl.int64)
    before = tl.load(keys_ptr + first - 1, mask=(first > 0) & (first < n), other=-1).to(tl.int64)
    head = (first < n) & (to != before)
    total = tl.load(total_ptr + to, mask=head, other=0.0)
    j = first
    mine = head
    while tl.max(mine.to(tl.int32), axis=0) > 0:
        own = ()
        places = ()
        for u in tl.static_range(AHEAD):
            mine = mine & (tl.load(keys_ptr + j + u, mask=head & (j + u < n), other=-1).to(tl.int64) == to)
            own = own + (mine,)
            places = places + (tl.load(positions_ptr + j + u, mask=head & (j + u < n), other=0).to(tl.int64),)
        xs = ()
        for u in tl.static_range(AHEAD):
            xs = xs + (tl.load(values_ptr + places[u], mask=own[u], other=0.0),)
        for u in tl.static_range(AHEAD):
            total = tl.where(own[u], _step(total, xs[u].to(total.dtype), HOW), total)
        j += AHEAD
    tl.store(total_ptr + to, total, mask=head)


@triton.jit(do_not_specialize=["length", "columns"])
def walk_columns_kernel(
    keys_ptr, values_ptr, total_ptr, length, columns, HOW: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr
):
    """``total[key]`` steps over the values of a column from first to last, by one thread."""
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = column < columns
    k = tl.full([], 0, tl.int64)
    while k < length:
        keys = ()
        xs = ()
        for u in tl.static_range(AHEAD):
            inside = live & (k + u < length)
            at = (k + u) * columns + column
            keys = keys + (tl.load(keys_ptr + at, mask=inside, other=0).to(tl.int64),)
            xs = xs + (tl.load(values_ptr + at, mask=inside, other=0.0),)
        for u in tl.static_range(AHEAD):
            inside = live & (k + u < length)
            total = tl.load(total_ptr + keys[u], mask=inside, other=0.0)
            total = _step(total, xs[u].to(total.dtype), HOW)
            tl.store(total_ptr + keys[u], total, mask=inside)
            tl.debug_barrier()  # what one thread wrote is there for whichever reads it next
        k += AHEAD
