"""``bicompile::layer_norm`` and ``group_norm``, their gradients, and the gradients of their parameters.

``mean`` and ``rstd`` come in the type that ``x`` is computed in (float64 for itself, float32 for the others), of the
shapes that ``aten.native_layer_norm`` and ``aten.native_group_norm`` give them; the backward ops take them in any
dtype.  ``weight`` and ``bias`` may differ from ``x`` in dtype.

Numerics: statistics in two passes in the order of ``order.py``; ``y = ((x - mean) * rstd) * weight + bias`` with every
operation rounded in the compute type, and once more to the dtype of ``x``.  On the CPU ``rstd`` is computed in float64
from the sum of squares and rounded once, and the gradients of a group norm's parameters are summed in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bicompile.lowering.gpu.plans import on_gpu
from bicompile.lowering.reduction.op import check_floating

_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)

_LIB = torch.library.Library("bicompile", "FRAGMENT")
_LIB.define(
    "layer_norm(Tensor x, int normalized_dims, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_LIB.define(
    "group_norm(Tensor x, int groups, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)", tags=_TAGS
)
_LIB.define("rms_norm(Tensor x, Tensor? weight, float eps, bool round_first) -> Tensor", tags=_TAGS)
for _name, _rows in (("layer_norm", "normalized_dims"), ("group_norm", "groups")):
    _statistics = f"Tensor grad, Tensor x, int {_rows}, Tensor mean, Tensor rstd"
    _LIB.define(f"{_name}_backward({_statistics}, Tensor? weight) -> Tensor", tags=_TAGS)
    _LIB.define(f"{_name}_backward_params({_statistics}, ScalarType dtype) -> (Tensor, Tensor)", tags=_TAGS)


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_normalized_dims(op: str, x: Tensor, normalized_dims: int) -> None:
    torch._check_value(
        1 <= normalized_dims <= x.dim(),
        lambda: (
            f"bicompile::{op}: expected normalized_dims in [1, {x.dim()}], got {normalized_dims}; "
            "pass how many trailing dims of x one row has"
        ),
    )


def _check_groups(op: str, x: Tensor, groups: int) -> None:
    torch._check_value(
        x.dim() >= 2,
        lambda: f"bicompile::{op}: expected x of rank 2 or more, [N, C, ...], got rank {x.dim()}; add the missing dims",
    )
    torch._check_value(
        groups > 0 and x.shape[1] % groups == 0,
        lambda: f"bicompile::{op}: expected groups to divide the {x.shape[1]} channels of x, got {groups}",
    )


def _check_dtypes(op: str, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None:
            check_floating(op, name, tensor.dtype)


def _check_parameters(op: str, shape: Sequence[int], **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None:
            torch._check_value(
                tensor.dim() == len(shape),
                lambda name=name, tensor=tensor: (
                    f"bicompile::{op}: expected {name} of shape {tuple(shape)}, got {tuple(tensor.shape)}; "
                    "pass one number for each normalized element or channel"
                ),
            )


@torch.library.register_fake("bicompile::layer_norm", lib=_LIB)
def _(
    x: Tensor, normalized_dims: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    _check_dtypes("layer_norm", x=x, weight=weight, bias=bias)
    _check_normalized_dims("layer_norm", x, normalized_dims)
    first = x.dim() - normalized_dims
    _check_parameters("layer_norm", x.shape[first:], weight=weight, bias=bias)
    rows = [*x.shape[:first], *([1] * normalized_dims)]
    dtype = _compute_dtype(x.dtype)
    return x.new_empty(x.shape), x.new_empty(rows, dtype=dtype), x.new_empty(rows, dtype=dtype)


@torch.library.register_fake("bicompile::layer_norm_backward", lib=_LIB)
def _(grad: Tensor, x: Tensor, normalized_dims: int, mean: Tensor, rstd: Tensor, weight: Tensor | None) -> Tensor:
    _check_dtypes("layer_norm_backward", grad=grad, x=x, mean=mean, rstd=rstd, weight=weight)
    _check_normalized_dims("layer_norm_backward", x, normalized_dims)
    return x.new_empty(x.shape)


@torch.library.register_fake("bicompile::layer_norm_backward_params", lib=_LIB)
def _(
    grad: Tensor, x: Tensor, normalized_dims: int, mean: Tensor, rstd: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    _check_dtypes("layer_norm_backward_params", grad=grad, x=x, mean=mean, rstd=rstd)
    check_floating("layer_norm_backward_params", "dtype", dtype)
    _check_normalized_dims("layer_norm_backward_params", x, normalized_dims)
    shape = x.shape[x.dim() - normalized_dims :]
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)


@torch.library.register_fake("bicompile::group_norm", lib=_LIB)
def _(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    _check_dtypes("group_norm", x=x, weight=weight, bias=bias)
    _check_groups("group_norm", x, groups)
    _check_parameters("group_norm", x.shape[1:2], weight=weight, bias=bias)
    rows, dtype = (x.shape[0], groups), _compute_dtype(x.dtype)
    return x.new_empty(x.shape), x.new_empty(rows, dtype=dtype), x.new_empty(rows, dtype=dtype)


@torch.library.register_fake("bicompile::group_norm_backward", lib=_LIB)
def _(grad: Tensor, x: Tensor, groups: int, mean: Tensor, rstd: Tensor, weight: Tensor | None) -> Tensor:
    _check_dtypes("group_norm_backward", grad=grad, x=x, mean=mean, rstd=rstd, weight=weight)
    _check_groups("group_norm_backward", x, groups)
    return x.new_empty(x.shape)


@torch.library.register_fake("bicompile::group_norm_backward_params", lib=_LIB)
def _(grad: Tensor, x: Tensor, groups: int, mean: Tensor, rstd: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    _check_dtypes("group_norm_backward_params", grad=grad, x=x, mean=mean, rstd=rstd)
    check_floating("group_norm_backward_params", "dtype", dtype)
    _check_groups("group_norm_backward_params", x, groups)
    return x.new_empty((x.shape[1],), dtype=dtype), x.new_empty((x.shape[1],), dtype=dtype)


@torch.library.register_fake("bicompile::rms_norm", lib=_LIB)
def _(x: Tensor, weight: Tensor | None, eps: float, round_first: bool) -> Tensor:
    """RMS norm over the last dim, in one pass, on GPUs: see ``passes.fuse_rms_norms``."""
    _check_dtypes("rms_norm", x=x, weight=weight)
    _check_normalized_dims("rms_norm", x, 1)
    _check_parameters("rms_norm", x.shape[-1:], weight=weight)
    return x.new_empty(x.shape)


def check_layer_norm(x: Tensor, normalized_dims: int, weight: Tensor | None, bias: Tensor | None) -> None:
    """What the fake kernel leaves to the sizes at hand."""
    _check_dtypes("layer_norm", x=x, weight=weight, bias=bias)
    _check_normalized_dims("layer_norm", x, normalized_dims)
    _check_sizes("layer_norm", x.shape[x.dim() - normalized_dims :], weight=weight, bias=bias)


def check_layer_norm_backward(
    grad: Tensor, x: Tensor, normalized_dims: int, mean: Tensor, rstd: Tensor, weight: Tensor | None
) -> None:
    """What the fake kernel leaves to the sizes at hand."""
    _check_dtypes("layer_norm_backward", grad=grad, x=x, mean=mean, rstd=rstd, weight=weight)
    _check_normalized_dims("layer_norm_backward", x, normalized_dims)
    first = x.dim() - normalized_dims
    _check_sizes("layer_norm_backward", x.shape, grad=grad)
    _check_sizes("layer_norm_backward", x.shape[first:], weight=weight)
    _check_counts("layer_norm_backward", x.shape[:first].numel(), mean=mean, rstd=rstd)


def check_layer_norm_backward_params(
    grad: Tensor, x: Tensor, normalized_dims: int, mean: Tensor, rstd: Tensor, dtype: torch.dtype
) -> None:
    """What the fake kernel leaves to the sizes at hand."""
    _check_dtypes("layer_norm_backward_params", grad=grad, x=x, mean=mean, rstd=rstd)
    check_floating("layer_norm_backward_params", "dtype", dtype)
    _check_normalized_dims("layer_norm_backward_params", x, normalized_dims)
    _check_sizes("layer_norm_backward_params", x.shape, grad=grad)
    rows = x.shape[: x.dim() - normalized_dims].numel()
    _check_counts("layer_norm_backward_params", rows, mean=mean, rstd=rstd)


def check_group_norm(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None) -> None:
    """What the fake kernel leaves to the sizes at hand."""
    _check_dtypes("group_norm", x=x, weight=weight, bias=bias)
    _check_groups("group_norm", x, groups)
    _check_sizes("group_norm", x.shape[1:2], weight=weight, bias=bias)


def check_group_norm_backward(
    grad: Tensor, x: Tensor, groups: int, mean: Tensor, rstd: Tensor, weight: Tensor | None
) -> None:
    """What the fake kernel leaves to the sizes at hand."""
    _check_dtypes("group_norm_backward", grad=grad, x=x, mean=mean, rstd=rstd, weight=weight)
    _check_groups("group_norm_backward", x, groups)
    _check_sizes("group_norm_backward", x.shape, grad=grad)
    _check_sizes("group_norm_backward", x.shape[1:2], weight=weight)
    _check_counts("group_norm_backward", x.shape[0] * groups, mean=mean, rstd=rstd)


def check_group_norm_backward_params(
    grad: Tensor, x: Tensor, groups: int, mean: Tensor, rstd: Tensor, dtype: torch.dtype
) -> None:
    """What the fake kernel leaves to the sizes at hand."""
    _check_dtypes("group_norm_backward_params", grad=grad, x=x, mean=mean, rstd=rstd)
    check_floating("group_norm_backward_params", "dtype", dtype)
    _check_groups("group_norm_backward_params", x, groups)
    _check_sizes("group_norm_backward_params", x.shape, grad=grad)
    _check_counts("group_norm_backward_params", x.shape[0] * groups, mean=mean, rstd=rstd)


def check_rms_norm(x: Tensor, weight: Tensor | None) -> None:
    """What the fake kernel leaves to the sizes at hand."""
    _check_dtypes("rms_norm", x=x, weight=weight)
    _check_normalized_dims("rms_norm", x, 1)
    _check_sizes("rms_norm", x.shape[-1:], weight=weight)


def _check_sizes(op: str, shape: Sequence[int], **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        torch._check_value(
            tensor is None or tuple(tensor.shape) == tuple(shape),
            lambda name=name, tensor=tensor: (
                f"bicompile::{op}: expected {name} of shape {tuple(shape)}, got {tuple(tensor.shape)}; "
                "pass one number for each element or channel that it belongs to"
            ),
        )


def _check_counts(op: str, rows: int, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        torch._check_value(
            tensor.numel() == rows,
            lambda name=name, tensor=tensor: (
                f"bicompile::{op}: expected {name} with one number for each of {rows} rows, got shape "
                f"{tuple(tensor.shape)}; pass what the forward op returned"
            ),
        )


on_gpu(_LIB, f"{__package__}.gpu", "layer_norm", "group_norm")
on_gpu(_LIB, f"{__package__}.gpu_rms", "rms_norm")
for _name in ("layer_norm", "group_norm"):
    on_gpu(_LIB, f"{__package__}.gpu_backward", f"{_name}_backward", f"{_name}_backward_params")
