"""The scatter ops on a GPU.

A stable sort by destination puts the contributions of each destination side by side, in the order of the source.  Then
the first of them walks along the rest and adds them up, one IEEE addition after the other: no atomics, and nothing to
see of who ran what.  Nothing waits for the GPU, so all of it can be captured in a CUDA graph.

An index that is out of range fails a device-side assertion, as it does in torch: the next call that waits for the GPU
raises.
"""

# Kernels are typed by Triton, when they are called.
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bicompile.lowering.gpu.device import device_key
from bicompile.lowering.gpu.launch import INTERPRETED, Launch, on_device, planned

from .order import order_for
from .schedule import ElementSchedule, RowSchedule, element_schedule_for, row_schedule_for
from .selftest import require_scatters

_STEPS = {"sum": "add", "mean": "add", "prod": "multiply", "amax": "larger", "amin": "smaller"}
_STARTS = {"sum": 0.0, "mean": 0.0, "prod": 1.0, "amax": float("-inf"), "amin": float("inf")}
_INTEGERS = ["n", "width", "blocks", "programs", "values_outer", "values_row", "out_outer", "skipped"]
_FLAT = 1024  # elements of one program of a kernel that goes over memory once


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
def _keys_kernel(index_ptr, keys_ptr, n, columns, count, step, WRAP: tl.constexpr, BLOCK: tl.constexpr):
    """The destination of each index of a [n / columns, columns] array: ``index * columns + column``, checked."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = i < n
    at = tl.load(index_ptr + i * step, mask=live, other=0).to(tl.int64)
    if WRAP:
        at = tl.where(at < 0, at + count, at)
    tl.device_assert((at >= 0) & (at < count) | (i >= n), "bicompile scatter: index out of range")
    tl.store(keys_ptr + i, (at * columns + i % columns).to(keys_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["n"])
def _canonical_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
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


@triton.jit(do_not_specialize=_INTEGERS)
def _walk_rows_kernel(
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


@triton.jit(do_not_specialize=_INTEGERS)
def _walk_long_rows_kernel(
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
    """The destinations that ``_walk_rows_kernel`` leaves alone, by the program of their first aligned stretch."""
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
def _walk_sorted_kernel(
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
def _walk_columns_kernel(
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


# -- Launchers --------------------------------------------------------------------------------------------------------


def _launch(
    kernel: Any,
    programs: int,
    tensors: tuple[Tensor | None, ...],
    integers: tuple[int, ...],
    constants: tuple[Any, ...],
    warps: int = 4,
    debug: bool = False,
) -> None:
    """Launch ``programs`` programs; with ``debug``, assertions of the kernel are compiled in."""
    layout = tuple(t if t is None else (t.dtype, t.data_ptr() % 16 == 0) for t in tensors)
    index = next(t.device.index for t in tensors if t is not None)

    def build() -> Launch:
        launch = Launch(kernel, (programs,), integers, constants, warps)
        if debug:
            launch.options["debug"] = True
        return launch

    planned((kernel, programs, layout, index, integers, constants, warps), build)(index, *tensors)


def _keys(index: Tensor, count: int, columns: int, wrap: bool = False) -> Tensor:
    """``index * columns + column`` for each element of ``index``, [n, columns] or [n] for one column, in row order.

    An index outside [0, count), or outside [-count, count) where it may ``wrap``, fails a device-side assertion.
    """
    if index.dim() == 2 and not index.is_contiguous():
        index = index.contiguous()
    step = index.stride(0) if index.dim() == 1 else 1
    keys = torch.empty(index.numel(), dtype=_key_dtype(count * columns), device=index.device)
    if index.numel():
        n = index.numel()
        _launch(
            _keys_kernel, triton.cdiv(n, _FLAT), (index, keys), (n, columns, count, step), (wrap, _FLAT), debug=True
        )
    return keys


def _key_dtype(count: int) -> torch.dtype:
    return torch.int32 if count < 2**31 else torch.int64


def _sorted(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The keys in ascending order, and where each was; equal ones stay in order."""
    ordered, positions = torch.sort(keys, stable=True)
    return ordered, positions


def _canonical(x: Tensor) -> Tensor:
    """A contiguous copy of ``x``, with the canonical NaN for every other."""
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel():
        _launch(_canonical_kernel, triton.cdiv(x.numel(), _FLAT), (x, out), (x.numel(),), (_FLAT,))
    return out


def walk_rows(
    self: Tensor | None,
    index: Tensor,
    values: Tensor,
    count: int,
    *,
    reduce: str = "sum",
    include_self: bool = True,
    skipped: int = -1,
    divide: bool = False,
    schedule: RowSchedule | None = None,
) -> Tensor:
    """Take ``values[:, p]`` into ``out[:, index[p]]``, p ascending.

    Args:
        self: the initial values, [outer, count, width], or None for zeros.
        index: int64 or int32, [n].
        values: [outer, n, width].
        count: destinations.
        reduce: the step: ``sum``, ``prod``, ``amax``, ``amin`` or ``mean``.
        include_self: whether the initial value is the first contribution; where not, it stays only where nothing goes.
        skipped: a destination that takes no contributions.
        divide: divide by the number of contributions, as ``mean`` does.
    """
    require_scatters(values.device)
    outer, n, width = values.shape
    if self is None:
        out = torch.zeros(outer, count, width, dtype=values.dtype, device=values.device)
    else:
        self = self.contiguous()
        out = _canonical(self)
    keys = _keys(index, count, 1)
    if n == 0 or out.numel() == 0:
        return out
    ordered, positions = _sorted(keys)
    if width > 1 and values.stride(2) != 1:
        values = values.contiguous()
    chosen = schedule or row_schedule_for(width, values.element_size())
    from_self = self is not None and include_self
    tensors = (ordered, positions, self if from_self else None, values, out)
    what = (_STEPS[reduce], _STARTS[reduce], from_self, divide or reduce == "mean")
    acc = tl.float64 if values.dtype == torch.float64 else tl.float32

    def walk(kernel: Any, starts: int, block: int, ahead: int, warps: int) -> None:
        blocks = triton.cdiv(width, block)
        strides = (values.stride(0), values.stride(1), count * width)
        integers = (n, width, blocks, outer * blocks, *strides, skipped)
        constants = (*what, block, ahead, chosen.long, acc)
        _launch(kernel, starts * outer * blocks, tensors, integers, constants, warps)

    walk(_walk_rows_kernel, n, chosen.block, chosen.ahead, chosen.warps)
    if chosen.long and n >= chosen.long:
        walk(_walk_long_rows_kernel, n // chosen.long, chosen.long_block, chosen.long_ahead, 1)
    return out


def walk_elements(
    total: Tensor, keys: Tensor, values: Tensor, how: str, schedule: ElementSchedule | None = None
) -> None:
    """Take ``values`` [length, columns] into ``total`` at ``keys`` [length * columns], each column from first to last.

    Args:
        total: the running values, flat and contiguous, in the accumulating dtype; changed in place.
        keys: where each value goes; values of different columns never go to the same place.
        values: contiguous.
    """
    length, columns = values.shape
    n = values.numel()
    if n == 0:
        return
    require_scatters(values.device)
    num_sms = 128 if INTERPRETED else device_key(values.device.index).num_sms
    chosen = schedule or element_schedule_for(length, columns, num_sms)
    if chosen.walk == "columns":
        tensors, programs = (keys, values, total), triton.cdiv(columns, chosen.block)
        constants = (how, chosen.block, chosen.ahead)
        _launch(_walk_columns_kernel, programs, tensors, (length, columns), constants, warps=chosen.block // 32)
        return
    ordered, positions = _sorted(keys)
    constants = (how, chosen.block, chosen.ahead)
    programs = triton.cdiv(n, chosen.block)
    _launch(_walk_sorted_kernel, programs, (ordered, positions, values, total), (n,), constants)


# -- The ops ----------------------------------------------------------------------------------------------------------


@on_device
def index_add(self: Tensor, dim: int, index: Tensor, source: Tensor, alpha: float) -> Tensor:
    """``self`` plus the slices of ``source`` times ``alpha`` (rounded), each at the place that ``index`` names."""
    source = source if alpha == 1 else source * alpha
    if self.dim() == 0:
        return index_add(self.reshape(1), 0, index.reshape(1), source.reshape(1), 1.0).reshape(())
    return _along(self, dim % self.dim(), index.reshape(-1), source, "sum", True)


@on_device
def segment_add(self: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """``self`` [outer, m, width] plus ``values`` [outer, n, width] at ``index`` [n] of its middle dim."""
    return _along(self, 1, index, values, "sum", True)


@on_device
def embedding_dense_backward(
    grad: Tensor, indices: Tensor, num_weights: int, padding_idx: int, scale_grad_by_freq: bool
) -> Tensor:
    """The gradient of an embedding's weight, [num_weights, width]."""
    width = grad.shape[-1]
    values = grad.reshape(1, indices.numel(), width)
    index = indices.reshape(-1)
    out = walk_rows(None, index, values, num_weights, skipped=padding_idx, divide=scale_grad_by_freq)
    return out.view(num_weights, width)


@on_device
def scatter_reduce(self: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, include_self: bool) -> Tensor:
    """``out[i][index[i][j]] = step(out[i][index[i][j]], src[i][j])`` for ``dim=1``, j ascending, and so for others."""
    if index.numel() == 0:
        return _canonical(self)
    if self.dim() == 0:
        flat = (self.reshape(1), 0, index.reshape(-1), src.reshape(-1))
        return scatter_reduce(*flat, reduce, include_self).reshape(())
    dim = dim % self.dim()
    src = _cut(src, index)
    others = [d for d in range(self.dim()) if d != dim]
    if all(index.shape[d] == self.shape[d] and (index.stride(d) == 0 or index.shape[d] == 1) for d in others):
        at = index.movedim(dim, 0).reshape(index.shape[dim], -1)[:, 0]
        return _along(self, dim, at, src, reduce, include_self)
    index, src = index.movedim(dim, 0), src.movedim(dim, 0)
    if all(index.shape[place] == self.shape[d] for place, d in enumerate(others, 1)):
        result = _scatter_columns(self.movedim(dim, 0), index, src, reduce, include_self)
        return result.movedim(0, dim).contiguous()
    out = _canonical(self)
    part = out.movedim(dim, 0)
    for place in range(1, part.dim()):
        part = part.narrow(place, 0, index.shape[place])
    part.copy_(_scatter_columns(part, index, src, reduce, include_self))
    return out


def checked_index(index: Tensor, count: int) -> Tensor:
    """``index`` of any shape as int64 in [0, count), negative ones counted from the end."""
    keys = _keys(index.reshape(-1), count, 1, wrap=True)
    return keys.long().view(index.shape)


def _along(self: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, include_self: bool) -> Tensor:
    """``walk_rows`` along ``dim``, with the dims before it as ``outer`` and those after it as ``width``."""
    shape, n = self.shape, index.numel()
    outer, count, width = shape[:dim].numel(), shape[dim], shape[dim + 1 :].numel()
    if outer > 1 and width < 32:
        # The slices in front, so that a program's columns lie side by side.
        front = self.movedim(dim, 0), source.movedim(dim, 0)
        moved = _along(front[0], 0, index, front[1], reduce, include_self)
        return moved.movedim(0, dim).contiguous()
    out = walk_rows(
        self.reshape(outer, count, width),
        index,
        source.reshape(outer, n, width),
        count,
        reduce=reduce,
        include_self=include_self,
    )
    return out.view(shape)


def _scatter_columns(part: Tensor, index: Tensor, src: Tensor, reduce: str, include_self: bool) -> Tensor:
    """The result for ``part`` [m, ...], whose columns ``index`` and ``src`` [n, ...] name the same way."""
    count, columns = part.shape[0], part.shape[1:].numel()
    keys = _keys(index.reshape(index.shape[0], columns), count, columns)
    values = src.reshape(index.shape[0], columns).contiguous()
    total = torch.empty(part.shape, dtype=order_for(part.dtype).accumulate, device=part.device)
    total = total.copy_(part).view(-1)
    if not include_self:
        total.index_fill_(0, keys.long(), _STARTS[reduce])
    walk_elements(total, keys, values, _STEPS[reduce])
    if reduce == "mean":
        counts = torch.full_like(total, 1 if include_self else 0, dtype=torch.int32)
        counts.index_add_(0, keys, torch.ones_like(keys, dtype=torch.int32))
        total = total / counts.clamp(min=1)
    return _canonical(total.to(part.dtype)).view(part.shape)


def _cut(src: Tensor, index: Tensor) -> Tensor:
    """The first elements of ``src`` in every dim, as many as ``index`` has."""
    for d in range(src.dim()):
        src = src.narrow(d, 0, index.shape[d])
    return src
