"""What the row kernels share: where the elements of a row lie, and how a section of it is folded.

Every sum has the order of ``reduction.order.gpu_order_for``.  The kernels say it in their data flow: lanes are added
element by element, and a tree is a chain of sums over an axis of size two, each of which is one IEEE addition
whatever layout the compiler chose.  A sum over a longer axis would follow the layout, and the layout follows warps and
alignment.  A schedule therefore cannot change a bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from bicompile.lowering.reduction.order import gpu_order_for

_TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


# -- Kernel helpers ---------------------------------------------------------------------------------------------------


@triton.jit
def divide(a, b):
    """The correctly rounded quotient; Triton's ``/`` of float32 is not."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def square_root(a):
    """The correctly rounded square root."""
    if a.dtype == tl.float64:
        return tl.sqrt(a)
    else:
        return tl.sqrt_rn(a)


@triton.jit
def exponential(x, FAST: tl.constexpr):
    """``e**x``: within 2 ulp, or if ``FAST`` with an error that a half-precision result cannot show."""
    if FAST or x.dtype == tl.float64:
        return tl.exp(x)
    else:
        # e**x = 2**t * e**r with |r| <= ln(2) / 2.  Beyond the limits the result is 0 or infinite anyway.
        x = tl.maximum(x, -104.0, propagate_nan=tl.PropagateNan.ALL)
        x = tl.minimum(x, 89.0, propagate_nan=tl.PropagateNan.ALL)
        t = tl.floor(x * 1.4426950408889634 + 0.5)
        r = tl.fma(t, -1.42860677e-6, tl.fma(t, -0.693145752, x))
        return tl.exp2(t) * tl.exp2(r * 1.4426950408889634)


@triton.jit
def multiply(a, b):
    return a * b


@triton.jit
def larger(a, b):
    """The larger of two: NaN if either is, +0 above -0."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def smaller(a, b):
    """The smaller of two: NaN if either is, -0 below +0."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def combine(a, b, HOW: tl.constexpr):
    """One step of a fold."""
    if HOW == "add":
        return a + b
    elif HOW == "multiply":
        return a * b
    elif HOW == "larger":
        return larger(a, b)
    else:
        return smaller(a, b)


@triton.constexpr_function
def neutral(how):
    """What changes nothing in ``combine``; a lane past the end of the row holds it."""
    return {"add": 0.0, "multiply": 1.0, "larger": float("-inf"), "smaller": float("inf")}[how]


@triton.constexpr_function
def levels_of(lanes):
    """How often ``lanes`` halves until one is left."""
    return lanes.bit_length() - 1


@triton.jit
def fold_pairs(pairs, HOW: tl.constexpr, AXIS: tl.constexpr):
    """One level of a tree: ``pairs`` without its axis of size two, one operation for each pair, in any layout."""
    if HOW == "add":
        return tl.sum(pairs, axis=AXIS)
    else:
        return tl.reduce(pairs, AXIS, multiply)


@triton.jit
def tree(lanes, HOW: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr):
    """Fold ``lanes``, [ROWS, LANES], to [ROWS]: neighbours first, then neighbouring pairs, and so on."""
    if HOW == "larger":
        return tl.reduce(lanes, 1, larger)  # exact, so its order cannot show
    elif HOW == "smaller":
        return tl.reduce(lanes, 1, smaller)
    else:
        for i in tl.static_range(levels_of(LANES)):
            if ROWS == 1 and LANES > 32 and LANES >> i == 32:
                # What is left moves to one warp at once, instead of through shared memory at every further level.
                lanes = tl.gather(lanes, tl.arange(0, 32)[None, :], 1)
            lanes = fold_pairs(tl.reshape(lanes, [ROWS, LANES >> (i + 1), 2]), HOW, 2)
        return tl.reshape(lanes, [ROWS])


@triton.jit
def tree_of_columns(lanes, HOW: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """Fold ``lanes``, [LANES, WIDTH], to [WIDTH] with the tree of ``tree``."""
    if HOW == "larger":
        return tl.reduce(lanes, 0, larger)
    elif HOW == "smaller":
        return tl.reduce(lanes, 0, smaller)
    else:
        for i in tl.static_range(levels_of(LANES)):
            lanes = fold_pairs(tl.reshape(lanes, [LANES >> (i + 1), 2, WIDTH]), HOW, 1)
        return tl.reshape(lanes, [WIDTH])


@triton.jit
def fold_chunks(xs, HOW: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr):
    """Fold one section, given as its chunks: each lane in ascending order, then the lanes by ``tree``."""
    lanes = tl.full([ROWS, LANES], neutral(HOW), xs[0].dtype)
    for j in tl.static_range(len(xs)):
        lanes = combine(lanes, xs[j], HOW)
    return tree(lanes, HOW, ROWS, LANES)


@triton.jit
def top_of(xs):
    """The largest element of each row of a section, NaN skipped.  Exact: no order can show."""
    lanes = xs[0]
    for j in tl.static_range(1, len(xs)):
        lanes = tl.maximum(lanes, xs[j])
    return tl.max(lanes, axis=1)


@triton.jit
def row_offsets(rows, row_size, row_stride, row_step, TWO: tl.constexpr):
    """Where row ``rows`` starts, with the meaning of ``Level``; int64, as a number times a stride can pass 2**31."""
    if TWO:
        return (rows // row_size).to(tl.int64) * row_stride + (rows % row_size).to(tl.int64) * row_step
    else:
        return rows.to(tl.int64) * row_step


@triton.constexpr_function
def is_full(j, rows, chunks, whole):
    """Does chunk ``j`` need no mask?  Where a program holds one WHOLE row, only its last chunk can be ragged."""
    return whole and rows == 1 and j < chunks - 1


@triton.jit
def mask_of(j, rows, num_rows, left, ROWS: tl.constexpr, LANES: tl.constexpr):
    """Which elements of chunk ``j`` exist, of a section of which ``left`` elements are left."""
    inside = j * LANES + tl.arange(0, LANES) < left
    return (rows < num_rows)[:, None] & inside[None, :]


@triton.jit
def load_chunk(p, at, mask, FULL: tl.constexpr, OTHER: tl.constexpr, COMPUTE: tl.constexpr):
    """Elements ``at`` of the rows that start at ``p``, converted; ``OTHER`` where there is none."""
    if FULL:
        return tl.load(p[:, None] + at[None, :]).to(COMPUTE)
    else:
        return tl.load(p[:, None] + at[None, :], mask=mask, other=OTHER).to(COMPUTE)


@triton.jit
def load_section(
    p,
    rows,
    num_rows,
    left,
    OTHER: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    CHUNKS: tl.constexpr,
    WHOLE: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The chunks of one section of dense rows: a tuple of [ROWS, LANES].  ``p`` points to its first elements."""
    xs = ()
    for j in tl.static_range(CHUNKS):
        mask = mask_of(j, rows, num_rows, left, ROWS, LANES)
        at = j * LANES + tl.arange(0, LANES)
        xs = xs + (load_chunk(p, at, mask, is_full(j, ROWS, CHUNKS, WHOLE), OTHER, COMPUTE),)
    return xs


@triton.jit
def store_section(
    p,
    xs,
    rows,
    num_rows,
    left,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    CHUNKS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Write the chunks of one section of dense rows, rounded to the dtype of ``p``, which points to its start."""
    for j in tl.static_range(CHUNKS):
        to = p[:, None] + (j * LANES + tl.arange(0, LANES))[None, :]
        value = xs[j].to(p.dtype.element_ty)
        if is_full(j, ROWS, CHUNKS, WHOLE):
            tl.store(to, value)
        else:
            tl.store(to, value, mask=mask_of(j, rows, num_rows, left, ROWS, LANES))


@triton.jit
def merged_sum(part_ptr, row, parts, PARTS: tl.constexpr):
    """The sum of one row from those of its ``parts`` sections, at most PARTS of them: a number."""
    part = tl.arange(0, PARTS)
    sums = tl.load(part_ptr + row * parts + part, mask=part < parts, other=0.0)
    return tl.sum(tree(tl.reshape(sums + 0.0, [1, PARTS]), "add", 1, PARTS), axis=0)


# -- Where rows lie ---------------------------------------------------------------------------------------------------


def merged(dims: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """``(size, stride)`` of each dim, outermost first, without those of size 1; neighbours that continue are merged."""
    out: list[tuple[int, int]] = []
    for size, stride in dims:
        if size == 1:
            continue
        if out and out[-1][1] == size * stride:
            out[-1] = (out[-1][0] * size, stride)
        else:
            out.append((size, stride))
    return out


@dataclass(frozen=True)
class Level:
    """A dim, or two, walked in row-major order: index ``i`` lies at ``i // size * stride + i % size * step``.

    Without ``two``, it lies at ``i * step``.
    """

    count: int
    size: int
    stride: int
    step: int
    two: bool

    @staticmethod
    def of(dims: Sequence[tuple[int, int]]) -> Level | None:
        """``dims`` as at most two levels; None where they need more."""
        found = merged(dims)
        if len(found) > 2:
            return None
        count = 1
        for size, _ in dims:
            count *= size
        if not found:
            return Level(count, 1, 0, 1, False)
        if len(found) == 1:
            return Level(count, 1, 0, found[0][1], False)
        return Level(count, found[1][0], found[0][1], found[1][1], True)

    @property
    def dense(self) -> bool:
        """Do neighbours lie next to each other?"""
        return not self.two and self.step == 1

    @property
    def walk(self) -> tuple[int, int, int]:
        """What ``row_offsets`` takes."""
        return self.size, self.stride, self.step


@dataclass(frozen=True)
class Cut:
    """How a row of ``n`` elements is cut into sections, chunks and lanes, as the kernels' constants have it."""

    n: int
    lanes: int
    chunks: int
    sections: int

    @staticmethod
    def of(n: int, dtype: torch.dtype) -> Cut:
        """The cut of ``gpu_order_for``.  A short row gets fewer lanes: the missing ones could only add the neutral."""
        order = gpu_order_for(n, dtype)
        if n <= order.lanes:
            return Cut(n, triton.next_power_of_2(n), 1, 1)
        chunks = min(triton.cdiv(n, order.lanes), order.section // order.lanes)
        return Cut(n, order.lanes, chunks, triton.cdiv(n, order.section))

    @property
    def whole(self) -> bool:
        """Is there only one section?"""
        return self.sections == 1


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What ``dtype`` is computed in."""
    return gpu_order_for(1, dtype).compute


def triton_type(dtype: torch.dtype) -> tl.dtype:
    """``dtype`` as Triton names it."""
    return _TYPES[dtype]
