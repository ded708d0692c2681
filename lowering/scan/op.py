"""The scan ops: ``cumsum``, ``cumprod`` and ``logcumsumexp``, each in one ascending order per row.

Their backward passes need no op of their own.  ATen writes them with ``flip``, elementwise ops and the same three
scans (``cumprod`` also with a row sum).
"""

from __future__ import annotations

import torch
from torch import Tensor

_LIB = torch.library.Library("bicompile", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
_LIB.define("cumsum(Tensor x, int dim, ScalarType dtype) -> Tensor", tags=_TAGS)
_LIB.define("cumprod(Tensor x, int dim, ScalarType dtype) -> Tensor", tags=_TAGS)
_LIB.define("logcumsumexp(Tensor x, int dim) -> Tensor", tags=_TAGS)

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _check(op: str, x: Tensor, dim: int, dtype: torch.dtype) -> None:
    rank = max(x.dim(), 1)
    torch._check(
        -rank <= dim < rank,
        lambda: f"bicompile::{op}: expected a dim in [{-rank}, {rank}) for shape {tuple(x.shape)}, got {dim}",
    )
    torch._check(
        dtype in _DTYPES,
        lambda: (
            f"bicompile::{op}: expected float32, float64, bfloat16 or float16 results, got {dtype}; "
            f"use torch.{op} for integers, it is exact"
        ),
    )
    torch._check(not x.is_complex(), lambda: f"bicompile::{op}: expected a real x, got {x.dtype}")


def _scan_fake(op: str, x: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    _check(op, x, dim, dtype)
    return x.new_empty(x.shape, dtype=dtype)


@torch.library.register_fake("bicompile::cumsum", lib=_LIB)
def _(x: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    return _scan_fake("cumsum", x, dim, dtype)


@torch.library.register_fake("bicompile::cumprod", lib=_LIB)
def _(x: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    return _scan_fake("cumprod", x, dim, dtype)


@torch.library.register_fake("bicompile::logcumsumexp", lib=_LIB)
def _(x: Tensor, dim: int) -> Tensor:
    return _scan_fake("logcumsumexp", x, dim, x.dtype)


# -- CUDA: the kernels are imported at the first call, because importing the op must not import triton.


def _cumsum_cuda(x: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    from .gpu import scan

    _check("cumsum", x, dim, dtype)
    return scan(x, "add", dim, dtype)


def _cumprod_cuda(x: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    from .gpu import scan

    _check("cumprod", x, dim, dtype)
    return scan(x, "multiply", dim, dtype)


def _logcumsumexp_cuda(x: Tensor, dim: int) -> Tensor:
    from .gpu import scan

    _check("logcumsumexp", x, dim, x.dtype)
    return scan(x, "logaddexp", dim, x.dtype)


_LIB.impl("cumsum", _cumsum_cuda, "CUDA")
_LIB.impl("cumprod", _cumprod_cuda, "CUDA")
_LIB.impl("logcumsumexp", _logcumsumexp_cuda, "CUDA")
