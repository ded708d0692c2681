"""``bicompile::unary`` and ``bicompile::binary``: elementwise functions for code that is not compiled.

On a CPU, the same C++ definitions that compiled kernels use (math.h), so that eager code has their bits; on a GPU,
Inductor's own kernels (gpu.py).  Half precisions are computed in float32 and rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._ops import OpOverload

from bicompile.lowering.reduction.op import check_floating

aten = torch.ops.aten
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
_HALVES = (torch.bfloat16, torch.float16)

_UNARY_NAMES = (
    "acos acosh asin asinh atan atanh cos cosh erf erfc exp exp2 expm1 lgamma log log10 log1p log2 rsqrt sigmoid sin "
    "sinh sqrt tan tanh"
).split()

# ATen ops and the names that ``bicompile::unary`` and ``bicompile::binary`` know them by.
PINNED_UNARY: dict[OpOverload, str] = {getattr(aten, name).default: name for name in _UNARY_NAMES}
PINNED_BINARY: dict[OpOverload, str] = {
    aten.pow.Tensor_Tensor: "pow",
    aten.pow.Tensor_Scalar: "pow_by_number",
    aten.pow.Scalar: "pow_of_number",
    aten.atan2.default: "atan2",
    aten.hypot.default: "hypot",
    aten.nextafter.default: "nextafter",
    aten.fmod.Tensor: "fmod",
    aten.fmod.Scalar: "fmod",
    aten.remainder.Tensor: "remainder",
    aten.remainder.Scalar: "remainder",
    aten.remainder.Scalar_Tensor: "remainder",
}

_LIB = torch.library.Library("bicompile", "FRAGMENT")
_LIB.define("unary(Tensor x, str name) -> Tensor", tags=_TAGS)
_LIB.define("binary(Tensor a, Tensor b, str name) -> Tensor", tags=_TAGS)


@torch.library.register_fake("bicompile::unary", lib=_LIB)
def _(x: Tensor, name: str) -> Tensor:
    _check_name("unary", name, PINNED_UNARY)
    check_floating("unary", "x", x.dtype)
    return _empty_like(x, x.dtype)


@torch.library.register_fake("bicompile::binary", lib=_LIB)
def _(a: Tensor, b: Tensor, name: str) -> Tensor:
    _check_name("binary", name, PINNED_BINARY)
    check_floating("binary", "a", a.dtype)
    check_floating("binary", "b", b.dtype)
    torch._check_value(
        a.dim() == b.dim(),
        lambda: f"bicompile::binary: expected a and b of one shape, got {a.shape} and {b.shape}; broadcast them first",
    )
    dtypes = {a.dtype, b.dtype}
    torch._check_value(
        len(dtypes) == 1 or (torch.float32 in dtypes and bool(dtypes & set(_HALVES))),
        lambda: (
            "bicompile::binary: expected a and b of one dtype, or one of them float32 beside a half precision, got "
            f"{a.dtype} and {b.dtype}; convert one first"
        ),
    )
    dtype = b.dtype if b.dtype in _HALVES else a.dtype
    return _empty_like(a, dtype) if a.stride() == b.stride() else a.new_empty(a.shape, dtype=dtype)


def _check_name(op: str, name: str, table: dict[OpOverload, str]) -> None:
    known = sorted(set(table.values()))
    torch._check_value(
        name in known, lambda: f"bicompile::{op}: expected name to be one of {', '.join(known)}; got {name}"
    )


def _empty_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The strides of ``x`` if its elements fill one piece of memory, each once; else contiguous."""
    step = 1
    for size, stride in sorted(zip(x.shape, x.stride(), strict=True), key=lambda dim: dim[1]):
        if size != 1 and stride != step:
            return x.new_empty(x.shape, dtype=dtype)
        step *= size
    return x.new_empty_strided(x.shape, x.stride(), dtype=dtype)


def _unary_cuda(x: Tensor, name: str) -> Tensor:
    from .gpu import unary

    _check_name("unary", name, PINNED_UNARY)
    check_floating("unary", "x", x.dtype)
    return unary(x, name)


def _binary_cuda(a: Tensor, b: Tensor, name: str) -> Tensor:
    from .gpu import binary

    _check_name("binary", name, PINNED_BINARY)
    check_floating("binary", "a", a.dtype)
    check_floating("binary", "b", b.dtype)
    return binary(a, b, name)


_LIB.impl("unary", _unary_cuda, "CUDA")
_LIB.impl("binary", _binary_cuda, "CUDA")
