"""``bicompile::mm``, ``bmm``, ``addmm`` and ``baddbmm``: schemas and fake kernels.

Functional; the output is new and contiguous.  ``addmm(c, a, b, 1, 1)`` has the bits of ``mm(a, b) + c``, and
``bmm(a, b)[i]`` those of ``mm(a[i], b[i])``: one layer traces to different ones of them at different batch sizes.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LIB = torch.library.Library("bicompile", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
_LIB.define("mm(Tensor a, Tensor b) -> Tensor", tags=_TAGS)
_LIB.define("bmm(Tensor a, Tensor b) -> Tensor", tags=_TAGS)
_LIB.define("addmm(Tensor c, Tensor a, Tensor b, float beta, float alpha) -> Tensor", tags=_TAGS)
_LIB.define("baddbmm(Tensor c, Tensor a, Tensor b, float beta, float alpha) -> Tensor", tags=_TAGS)

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@torch.library.register_fake("bicompile::mm", lib=_LIB)
def _(a: Tensor, b: Tensor) -> Tensor:
    return _new_product("mm", a, b, 2)


@torch.library.register_fake("bicompile::bmm", lib=_LIB)
def _(a: Tensor, b: Tensor) -> Tensor:
    return _new_product("bmm", a, b, 3)


@torch.library.register_fake("bicompile::addmm", lib=_LIB)
def _(c: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> Tensor:
    return _checked_addend("addmm", c, _new_product("addmm", a, b, 2))


@torch.library.register_fake("bicompile::baddbmm", lib=_LIB)
def _(c: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> Tensor:
    return _checked_addend("baddbmm", c, _new_product("baddbmm", a, b, 3))


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


def _mm(a: Tensor, b: Tensor) -> Tensor:
    from . import gpu  # late: importing the op must not import triton

    return gpu.mm(a, b)


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    from . import gpu

    return gpu.bmm(a, b)


def _addmm(c: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> Tensor:
    from . import gpu

    return gpu.addmm(c, a, b, beta, alpha)


def _baddbmm(c: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> Tensor:
    from . import gpu

    return gpu.baddbmm(c, a, b, beta, alpha)


_LIB.impl("mm", _mm, "CUDA")
_LIB.impl("bmm", _bmm, "CUDA")
_LIB.impl("addmm", _addmm, "CUDA")
_LIB.impl("baddbmm", _baddbmm, "CUDA")
