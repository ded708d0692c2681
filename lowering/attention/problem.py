"""What forward and backward share on the GPU: a checked problem and the rows of its mask."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bicompile.dropout import threshold_of
from bicompile.lowering.gpu.launch import Launch
from bicompile.lowering.gpu.plans import Planned, new_dense

from .order import HIDDEN_BELOW, GpuAttentionOrder, gpu_order_for
from .rows_kernel import rows_kernel

_LOG2E = 1.4426950408889634
TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.float32,
    torch.float16: tl.float32,
}


class Problem(NamedTuple):
    """One call: four dims, dense last dims, a mask with a stride of 0 where it is broadcast."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    causal: bool
    scale: float
    rows: Tensor | None = None  # of the mask, where they have been read before
    seeds: Tensor | None = None  # one of each query row, dense; None without dropout
    dropout_p: float = 0.0

    @property
    def order(self) -> GpuAttentionOrder:
        return gpu_order_for(max(self.q.shape[3], self.v.shape[3]), self.q.dtype)

    @property
    def mask_or_q(self) -> Tensor:
        """The mask; without one, a tensor that no kernel reads."""
        return self.q if self.mask is None else self.mask

    @property
    def seeds_or_q(self) -> Tensor:
        """The rows' seeds; without dropout, a tensor that no kernel reads."""
        return self.q if self.seeds is None else self.seeds

    @property
    def drops(self) -> bool:
        """Whether there is dropout."""
        return self.seeds is not None

    @property
    def dropout(self) -> tuple[int, float, float]:
        """The number below which a weight is dropped, and the factor of the others as the sum of two float32."""
        kept = 1.0 - self.dropout_p
        return threshold_of(self.dropout_p), *two_parts(1.0 / kept if kept else 0.0)

    @property
    def kind(self) -> str:
        """How the kernels name the mask."""
        return "none" if self.mask is None else _kind(self.mask)

    @property
    def scales(self) -> tuple[float, float]:
        """The factor of the scores in the log2 domain, as the sum of two float32."""
        return two_parts(self.scale * _LOG2E)

    @property
    def hidden(self) -> float:
        """An additive mask hides the key from here down."""
        return 0.0 if self.mask is None else _hidden(self.mask)

    @property
    def widths(self) -> tuple[int, int]:
        """Depths of keys and values as the kernels hold them."""
        return padded(self.q.shape[3]), padded(self.v.shape[3])

    def tail(self, tma: bool, stages: int, v_programs: int = 1) -> tuple[Any, ...]:
        """The constants that the forward kernels end with."""
        q, v, order = self.q, self.v, self.order
        width, value_width = self.widths
        return (
            order.block, width, value_width // v_programs, width == q.shape[3], value_width == v.shape[3], order.lanes,
            self.kind, self.causal, self.hidden, tma, stages, TYPES[q.dtype], order.levels,
        )  # fmt: skip


@functools.cache
def two_parts(x: float) -> tuple[float, float]:
    """``x`` as the sum of two float32, which is what a kernel takes."""
    high = torch.tensor(x, dtype=torch.float32).item()
    return high, x - high


@functools.cache
def padded(depth: int) -> int:
    """The width of a tile that holds ``depth`` columns."""
    return max(16, triton.next_power_of_2(depth))


def cdiv(a: int, b: int) -> int:
    """``a / b``, rounded up; Triton's own takes microseconds."""
    return -(-a // b)


def problem_of(
    op: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float,
    rows: Tensor | None = None, seeds: Tensor | None = None, dropout_p: float = 0.0,
) -> Problem:  # fmt: skip
    """Check what the fake kernel does not, and bring the inputs into the form that the kernels take.

    Raises:
        ValueError: the sizes are none that the kernels take.
    """
    if k.shape[1] == 0 and q.shape[1] or k.shape[1] and q.shape[1] % k.shape[1]:
        raise ValueError(f"bicompile::{op}: {q.shape[1]} query heads are no multiple of {k.shape[1]} key heads")
    if max(q.shape[3], v.shape[3]) > 256:
        raise ValueError(
            f"bicompile::{op}: heads of depth {q.shape[3]} and {v.shape[3]}; the GPU kernels take up to 256"
        )
    p = prepared(q, k, v, mask, causal, scale, rows, seeds, dropout_p)
    if p.mask is not None:
        full = (*q.shape[:3], k.shape[2])
        if any(size not in (1, wanted) for size, wanted in zip(p.mask.shape, full, strict=True)):
            raise ValueError(
                f"bicompile::{op}: expected a mask that broadcasts to [batch, heads, queries, keys] = {full}, got "
                f"{tuple(p.mask.shape)}"
            )
        if rows is not None and rows.shape != (3, *p.mask.shape[:2], q.shape[2]):
            raise ValueError(f"bicompile::{op}: rows of shape {tuple(rows.shape)} are not those of this mask")
    return p


def prepared(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, rows: Tensor | None = None,
    seeds: Tensor | None = None, dropout_p: float = 0.0,
) -> Problem:  # fmt: skip
    """The inputs in the form that the kernels take, without a check."""
    if scale <= 0.0:  # the kernels take the maximum before they multiply
        q, scale = (torch.zeros_like(q), 1.0) if scale == 0.0 else (-q, -scale)
    q, k, v = [t if t.stride(3) == 1 or t.shape[3] <= 1 else t.contiguous() for t in (q, k, v)]
    mask = None if mask is None else _four_dims(mask)
    seeds = None if seeds is None or dropout_p == 0.0 else seeds.contiguous()
    return Problem(q, k, v, mask, causal, scale, rows, seeds, dropout_p)


def _four_dims(mask: Tensor) -> Tensor:
    """``mask`` as the kernels take it."""
    mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    return mask if mask.dim() == 4 else mask[(None,) * (4 - mask.dim())]


def _kind(mask: Tensor) -> str:
    """How the kernels name it."""
    return "bool" if mask.dtype in (torch.bool, torch.uint8) else "additive"


def _hidden(mask: Tensor) -> float:
    """An additive mask hides the key from here down."""
    return HIDDEN_BELOW[mask.dtype] if _kind(mask) == "additive" else 0.0


def mask_strides(mask: Tensor | None) -> tuple[int, int, int, int]:
    """Strides of the mask, 0 where it is broadcast."""
    if mask is None:
        return 0, 0, 0, 0
    b, h, q, k = (s if n != 1 else 0 for s, n in zip(mask.stride(), mask.shape, strict=True))
    return b, h, q, k


def info_strides(p: Problem) -> tuple[int, int]:
    """Strides of what ``row_info`` gives, 0 where the mask is broadcast."""
    if p.mask is None:
        return 0, 0
    (batch, heads), queries = p.mask.shape[:2], p.q.shape[2]
    return heads * queries if batch > 1 else 0, queries if heads > 1 else 0


class RowInfo(NamedTuple):
    """Where each row's keys begin, have their first gap, and end; [mask batch, mask heads, queries] of int32."""

    first: Tensor
    hole: Tensor
    last: Tensor


def row_info(p: Problem) -> RowInfo:
    """What the mask's rows say, read now if it has not been before; without a mask, tensors that no kernel reads."""
    if p.mask is None:
        return RowInfo(p.q, p.q, p.q)
    rows = p.rows if p.rows is not None else _read_rows(p.mask, p.q.shape[2], p.k.shape[2], p.causal)
    return RowInfo(*rows.unbind(0))


@Planned
def mask_rows(mask: Tensor, is_causal: bool) -> Callable[..., Tensor]:
    """``[3, batch, heads, queries]`` of int32 for a mask of ``[batch, heads, queries, keys]``; see ``RowInfo``."""
    queries, keys = mask.shape[-2:]
    read = _read_rows.build(_four_dims(mask), queries, keys, is_causal)
    return lambda mask, is_causal: read(_four_dims(mask), queries, keys, is_causal)


@Planned
def _read_rows(mask: Tensor, queries: int, keys: int, causal: bool) -> Callable[..., Tensor]:
    """``mask_rows`` of a mask that may be broadcast along queries and keys."""
    (batch, heads), device = mask.shape[:2], mask.device.index
    new = new_dense(mask, (3, batch, heads, queries), torch.int32)
    if batch * heads * queries == 0:
        return lambda *arguments: new()
    rows, cols = (1, 1024) if queries < 64 else (4, 512)
    grid, sizes = (cdiv(queries, rows), batch * heads), (queries, keys, heads)
    constants = (rows, cols, _kind(mask), causal, _hidden(mask))
    launch = Launch(rows_kernel, grid, (*sizes, *mask_strides(mask)), constants, 4)

    def run(mask: Tensor, queries: int, keys: int, causal: bool) -> Tensor:
        found = new()
        launch(device, mask, *found.unbind(0))
        return found

    return run
