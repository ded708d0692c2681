"""Reductions over any dims: ``sum``, ``mean``, ``prod``, ``amax``, ``var``, norms and ``logsumexp``.

An empty ``dim`` means all dims.  ``dtype`` is the output's; the elements of ``x`` are converted to the type it computes
in (float64 for itself, float32 for the others) before anything is done with them.  Results are new contiguous tensors.

Numerics: the order of ``order.py``.  ``mean_square(x) == mean(x.float() * x.float())`` and
``sum_square(x) == sum(x.float() * x.float())`` bit for bit: no product is fused with its addition.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bicompile.lowering.gpu.plans import on_gpu

_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_LIB = torch.library.Library("bicompile", "FRAGMENT")

SUMS = ("sum", "mean", "sum_square", "mean_square", "prod", "amax", "amin")
for _name in SUMS:
    _LIB.define(f"{_name}(Tensor x, int[] dim, bool keepdim, ScalarType dtype) -> Tensor", tags=_TAGS)
_LIB.define("var(Tensor x, int[] dim, float correction, bool keepdim, bool sqrt) -> (Tensor, Tensor)", tags=_TAGS)
_LIB.define("vector_norm(Tensor x, float ord, int[] dim, bool keepdim, ScalarType dtype) -> Tensor", tags=_TAGS)
_LIB.define("logsumexp(Tensor x, int[] dim, bool keepdim) -> Tensor", tags=_TAGS)


def check_floating(op: str, argument: str, dtype: torch.dtype) -> None:
    """Raise unless ``dtype`` is one that the kernels compute in."""
    torch._check_type(
        dtype in _FLOATING,
        lambda: (
            f"bicompile::{op}: expected {argument} in float32, float64, bfloat16 or float16, got {dtype}; "
            "convert it first, or call torch's own op"
        ),
    )


def canonical_dim(op: str, dim: int, rank: int) -> int:
    """``dim`` counted from the front; a 0-d tensor takes 0 and -1, as in torch."""
    limit = max(rank, 1)
    torch._check_index(
        -limit <= dim < limit,
        lambda: (
            f"bicompile::{op}: expected a dim in [{-limit}, {limit - 1}], got {dim} for a tensor of rank {rank}; "
            "pass a dim that the tensor has"
        ),
    )
    return dim % limit


def reduced_dims(op: str, dim: Sequence[int], rank: int) -> set[int]:
    """The dims that ``dim`` names, counted from the front; all of them where it is empty."""
    dims = {canonical_dim(op, d, rank) for d in dim}
    torch._check_value(
        len(dims) == len(dim),
        lambda: f"bicompile::{op}: expected each dim once, got {list(dim)}; name every reduced dim once",
    )
    return dims or set(range(rank))


def reduced_shape(op: str, x: Tensor, dim: Sequence[int], keepdim: bool) -> list[int]:
    """The result's shape; its sizes may be symbols."""
    dims = reduced_dims(op, dim, x.dim())
    if keepdim:
        return [1 if d in dims else size for d, size in enumerate(x.shape)]
    return [size for d, size in enumerate(x.shape) if d not in dims]


def _register_sum(name: str) -> None:
    @torch.library.register_fake(f"bicompile::{name}", lib=_LIB)
    def _(x: Tensor, dim: Sequence[int], keepdim: bool, dtype: torch.dtype) -> Tensor:
        check_floating(name, "x", x.dtype)
        check_floating(name, "dtype", dtype)
        return x.new_empty(reduced_shape(name, x, dim, keepdim), dtype=dtype)


for _name in SUMS:
    _register_sum(_name)


@torch.library.register_fake("bicompile::var", lib=_LIB)
def _(x: Tensor, dim: Sequence[int], correction: float, keepdim: bool, sqrt: bool) -> tuple[Tensor, Tensor]:
    check_floating("var", "x", x.dtype)
    shape = reduced_shape("var", x, dim, keepdim)
    return x.new_empty(shape), x.new_empty(shape)


@torch.library.register_fake("bicompile::vector_norm", lib=_LIB)
def _(x: Tensor, ord: float, dim: Sequence[int], keepdim: bool, dtype: torch.dtype) -> Tensor:
    check_floating("vector_norm", "x", x.dtype)
    check_floating("vector_norm", "dtype", dtype)
    return x.new_empty(reduced_shape("vector_norm", x, dim, keepdim), dtype=dtype)


@torch.library.register_fake("bicompile::logsumexp", lib=_LIB)
def _(x: Tensor, dim: Sequence[int], keepdim: bool) -> Tensor:
    check_floating("logsumexp", "x", x.dtype)
    return x.new_empty(reduced_shape("logsumexp", x, dim, keepdim))


on_gpu(_LIB, f"{__package__}.gpu", *SUMS, "vector_norm")
on_gpu(_LIB, f"{__package__}.gpu_statistics", "var", "logsumexp")
