"""What forward and backward share on the GPU: a checked problem and the rows of its mask."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bicompile.dropout import threshold_of
from bicompile.lowering.gpu.launch import Launch, key_of, on_device, planned

from .order import HIDDEN_BELOW, GpuAttentionOrder, gpu_order_for
from .rows_kernel import rows_kernel

_LOG2E = 1.4426950408889634
TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.float32,
    torch.float16: tl.float32,
}


@dataclass(frozen=True)
class Problem:
    """One call, checked: four dims, dense last dims, a mask with a stride of 0 where it is broadcast."""

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
    def key(self) -> tuple[Any, ...]:
        """All that a plan may depend on."""
        loose = [None if t is None else key_of(t) for t in (self.mask, self.rows, self.seeds)]
        tensors = (key_of(self.q), key_of(self.k), key_of(self.v), *loose)
        return (*tensors, self.causal, self.scale, self.dropout_p)

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
    """Check what the fake kernel does not, and bring the inputs into the form that the kernels take."""
    if k.shape[1] == 0 and q.shape[1] or k.shape[1] and q.shape[1] % k.shape[1]:
        raise ValueError(f"bicompile::{op}: {q.shape[1]} query heads are no multiple of {k.shape[1]} key heads")
    if max(q.shape[3], v.shape[3]) > 256:
        raise ValueError(
            f"bicompile::{op}: heads of depth {q.shape[3]} and {v.shape[3]}; the GPU kernels take up to 256"
        )
    if scale <= 0.0:  # the kernels take the maximum before they multiply
        q, scale = (torch.zeros_like(q), 1.0) if scale == 0.0 else (-q, -scale)
    q, k, v = (t if t.stride(3) == 1 or t.shape[3] <= 1 else t.contiguous() for t in (q, k, v))
    if mask is not None:
        full = (*q.shape[:3], k.shape[2])
        mask = _four_dims(mask)
        sizes = zip(mask.shape, full, strict=True)
        if any(size not in (1, wanted) for size, wanted in sizes):
            raise ValueError(
                f"bicompile::{op}: expected a mask that broadcasts to [batch, heads, queries, keys] = {full}, got "
                f"{tuple(mask.shape)}"
            )
        if rows is not None and rows.shape != (3, *mask.shape[:2], q.shape[2]):
            raise ValueError(f"bicompile::{op}: rows of shape {tuple(rows.shape)} are not those of this mask")
    seeds = None if seeds is None or dropout_p == 0.0 else seeds.contiguous()
    return Problem(q, k, v, mask, causal, scale, rows, seeds, dropout_p)


def _four_dims(mask: Tensor) -> Tensor:
    """``mask`` as the kernels take it."""
    mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    return mask[(None,) * (4 - mask.dim())]


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


@on_device
def mask_rows(mask: Tensor, is_causal: bool) -> Tensor:
    """``[3, batch, heads, queries]`` of int32 for a mask of ``[batch, heads, queries, keys]``; see ``RowInfo``."""
    return _read_rows(_four_dims(mask), mask.shape[-2], mask.shape[-1], is_causal)


def _read_rows(mask: Tensor, queries: int, keys: int, causal: bool) -> Tensor:
    batch, heads = mask.shape[:2]
    found = torch.empty((3, batch, heads, queries), dtype=torch.int32, device=mask.device)
    rows, cols = (1, 1024) if queries < 64 else (4, 512)

    def build() -> Launch:
        constants = (rows, cols, _kind(mask), causal, _hidden(mask))
        grid, sizes = (cdiv(queries, rows), batch * heads), (queries, keys, heads)
        return Launch(rows_kernel, grid, (*sizes, *mask_strides(mask)), constants, 4)

    if found.numel():
        planned(("mask rows", key_of(mask), queries, keys, causal), build)(mask.device.index, mask, *found.unbind(0))
    return found
