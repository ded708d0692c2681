"""The matmul family: schemas and dispatch of ``bicompile::mm``, its kin, ``grouped_mm`` and ``scaled_mm``.

Functional; the output is new and contiguous.  ``addmm(c, a, b, 1, 1)`` has the bits of ``mm(a, b) + c``, and
``bmm(a, b)[i]`` those of ``mm(a[i], b[i])``: one layer traces to different ones of them at different batch sizes.
Each group of ``grouped_mm`` has the bits of a ``mm`` of its own.

``mm_continued`` is for a product whose k come in pieces, on the CPU: it returns the sums before they are rounded, and
takes those of the pieces before.  Where every piece but the last is a multiple of ``MatmulOrder.block``, the last
one's sums round to the bits of the whole ``mm``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bicompile.lowering.gpu.plans import on_gpu

from . import grouped
from .order import order_for

_LIB = torch.library.Library("bicompile", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
_LIB.define("mm(Tensor a, Tensor b) -> Tensor", tags=_TAGS)
_LIB.define("mm_continued(Tensor? sums, Tensor a, Tensor b) -> Tensor", tags=_TAGS)
_LIB.define("bmm(Tensor a, Tensor b) -> Tensor", tags=_TAGS)
_LIB.define("addmm(Tensor c, Tensor a, Tensor b, float beta, float alpha) -> Tensor", tags=_TAGS)
_LIB.define("baddbmm(Tensor c, Tensor a, Tensor b, float beta, float alpha) -> Tensor", tags=_TAGS)
_LIB.define("grouped_mm(Tensor a, Tensor b, Tensor ends) -> Tensor", tags=_TAGS)
_LIB.define(
    "scaled_mm(Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, Tensor? bias, ScalarType out_dtype) -> Tensor",
    tags=_TAGS,
)

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)


@torch.library.register_fake("bicompile::mm", lib=_LIB)
def _(a: Tensor, b: Tensor) -> Tensor:
    return _new_product("mm", a, b, 2)


@torch.library.register_fake("bicompile::mm_continued", lib=_LIB)
def _(sums: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    product = _new_product("mm_continued", a, b, 2)
    out = product.new_empty(product.shape, dtype=order_for(0, a.dtype).accumulator)
    torch._check(
        sums is None or (sums.dtype == out.dtype and sums.shape == out.shape),
        lambda: f"bicompile::mm_continued: expected sums of {out.dtype} and shape {tuple(out.shape)}",
    )
    return out


@torch.library.register_fake("bicompile::bmm", lib=_LIB)
def _(a: Tensor, b: Tensor) -> Tensor:
    return _new_product("bmm", a, b, 3)


@torch.library.register_fake("bicompile::addmm", lib=_LIB)
def _(c: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> Tensor:
    return _checked_addend("addmm", c, _new_product("addmm", a, b, 2))


@torch.library.register_fake("bicompile::baddbmm", lib=_LIB)
def _(c: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> Tensor:
    return _checked_addend("baddbmm", c, _new_product("baddbmm", a, b, 3))


@torch.library.register_fake("bicompile::grouped_mm", lib=_LIB)
def _(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
    dims = (a.dim(), b.dim())
    torch._check(
        dims in ((2, 3), (2, 2), (3, 2)) and ends.dim() == 1,
        lambda: (
            "bicompile::grouped_mm: expected matrices, one of them or none with a dim of groups before, and 1-D ends, "
            f"got shapes {shapes} and {tuple(ends.shape)}; without groups, use bicompile::bmm"
        ),
    )
    torch._check(
        a.dtype == b.dtype and a.dtype in FLOATS and ends.dtype in (torch.int32, torch.int64),
        lambda: (
            "bicompile::grouped_mm: expected one floating-point dtype and integer ends, "
            f"got {a.dtype}, {b.dtype} and {ends.dtype}"
        ),
    )
    torch._check(
        a.shape[-1] == b.shape[-2],
        lambda: f"bicompile::grouped_mm: the shapes {shapes} do not fit; expected [.., M, K] and [.., K, N]",
    )
    for stack in (x for x in (a, b) if x.dim() == 3):
        torch._check(
            stack.shape[0] == ends.shape[0],
            lambda: f"bicompile::grouped_mm: expected an end for each group, got shapes {shapes}, {tuple(ends.shape)}",
        )
    if dims == (2, 2):
        return a.new_empty(ends.shape[0], a.shape[0], b.shape[1])
    return a.new_empty(a.shape[-2], b.shape[-1])


@torch.library.register_fake("bicompile::scaled_mm", lib=_LIB)
def _(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
    torch._check(
        a.dim() == 2 and b.dim() == 2 and a.dtype in EIGHT_BITS and b.dtype in EIGHT_BITS,
        lambda: (
            "bicompile::scaled_mm: expected two matrices of float8_e4m3fn or float8_e5m2, "
            f"got {a.dtype} and {b.dtype} of shapes {shapes}"
        ),
    )
    torch._check(
        a.shape[1] == b.shape[0],
        lambda: f"bicompile::scaled_mm: the shapes {shapes} do not fit; expected [M, K] and [K, N]",
    )
    _check_scale("a_scale", a_scale, a.shape[0])
    _check_scale("b_scale", b_scale, b.shape[1])
    if bias is not None:
        torch._check(
            bias.dim() == 1 and bias.shape[0] == b.shape[1] and bias.dtype == out_dtype,
            lambda: f"bicompile::scaled_mm: expected a bias of {out_dtype} for each column of {shapes}",
        )
    return a.new_empty((a.shape[0], b.shape[1]), dtype=out_dtype)


def _check_scale(name: str, scale: Tensor, size: int | torch.SymInt) -> None:
    got = f"{scale.dtype} of shape {tuple(scale.shape)}"
    torch._check(
        scale.dtype == torch.float32, lambda: f"bicompile::scaled_mm: expected {name} to be float32, got {got}"
    )
    if scale.dim():
        torch._check(
            scale.numel() == 1 or scale.numel() == size,
            lambda: f"bicompile::scaled_mm: expected {name} to be one scale or one for each of {size}, got {got}",
        )


def _new_product(op: str, a: Tensor, b: Tensor, dim: int) -> Tensor:
    """An empty output for ``a @ b``, after the checks."""
    shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
    torch._check(
        a.dim() == dim and b.dim() == dim,
        lambda: f"bicompile::{op}: expected two {dim}-D tensors, got shapes {shapes}; reshape them first",
    )
    torch._check(
        a.dtype == b.dtype,
        lambda: f"bicompile::{op}: expected one dtype, got {a.dtype} and {b.dtype}; convert one of them",
    )
    torch._check(
        a.dtype in FLOATS,
        lambda: f"bicompile::{op}: expected float32, float64, bfloat16 or float16, got {a.dtype}",
    )
    for i in range(dim - 2):
        torch._check(a.shape[i] == b.shape[i], lambda: f"bicompile::{op}: batch sizes differ in shapes {shapes}")
    torch._check(
        a.shape[-1] == b.shape[-2],
        lambda: f"bicompile::{op}: the shapes {shapes} do not fit; expected [.., M, K] and [.., K, N]",
    )
    return a.new_empty((*a.shape[:-1], b.shape[-1]))


def _checked_addend(op: str, c: Tensor, out: Tensor) -> Tensor:
    """``out``, after a check that ``c`` can be added to it."""
    torch._check(
        c.dtype == out.dtype,
        lambda: (
            f"bicompile::{op}: expected one dtype, got an addend of {c.dtype} for factors of {out.dtype}; "
            "convert one of them"
        ),
    )
    torch._check(
        c.dim() <= out.dim(),
        lambda: f"bicompile::{op}: expected an addend that broadcasts to {tuple(out.shape)}, got {tuple(c.shape)}",
    )
    c.expand(out.shape)  # raises, or notes for symbolic sizes, that it broadcasts
    return out


on_gpu(_LIB, f"{__package__}.gpu", "mm", "bmm", "addmm", "baddbmm")
on_gpu(_LIB, f"{__package__}.gpu_grouped", "grouped_mm")
on_gpu(_LIB, f"{__package__}.gpu_scaled", "scaled_mm")
_LIB.impl("grouped_mm", grouped.grouped_mm, "CPU")
_LIB.impl("scaled_mm", grouped.scaled_mm, "CPU")
