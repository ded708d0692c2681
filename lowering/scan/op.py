"""The scan ops: ``cumsum``, ``cumprod`` and ``logcumsumexp``, each in one ascending order per row.

Their backward passes need no op of their own.  ATen writes them with ``flip``, elementwise ops and the same three
scans (``cumprod`` also with a row sum).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bicompile.lowering.gpu.plans import on_gpu

_LIB = torch.library.Library("bicompile", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
_LIB.define("cumsum(Tensor x, int dim, ScalarType dtype) -> Tensor", tags=_TAGS)
_LIB.define("cumprod(Tensor x, int dim, ScalarType dtype) -> Tensor", tags=_TAGS)
_LIB.define("logcumsumexp(Tensor x, int dim) -> Tensor", tags=_TAGS)

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_scan(op: str, x: Tensor, dim: int, dtype: torch.dtype) -> None:
    """Raise unless ``op`` takes such arguments."""
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
    check_scan(op, x, dim, dtype)
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


on_gpu(_LIB, f"{__package__}.gpu", "cumsum", "cumprod", "logcumsumexp")
