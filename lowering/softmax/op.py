"""``bicompile::softmax`` and its gradient: softmax and log-softmax over any one dim.

``x`` is converted to the type that ``dtype`` computes in (float64 for itself, float32 for the others); the result is
rounded once to ``dtype``.  A row of nothing but ``-inf`` gives NaN, as in torch, or zeros if ``safe``.

``softmax_statistics`` are the two numbers of each row that a log-softmax is: ``(x - shift) - log_total``, bit for bit.

``log_probability_backward`` makes of them what scores ``x`` [N, C] get of the gradient ``grad`` [N] of the
log-probabilities of one class of each row: ``(one_hot - exp(log_softmax)) * grad``, rounded to the dtype of ``x``.

Numerics: the row's exact maximum is subtracted, sums have the order of ``order.py``, every operation is rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bicompile.lowering.gpu.plans import on_gpu
from bicompile.lowering.reduction.op import canonical_dim, check_floating, reduced_shape

_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)

_LIB = torch.library.Library("bicompile", "FRAGMENT")
_LIB.define("softmax(Tensor x, int dim, bool log, ScalarType dtype, bool safe=False) -> Tensor", tags=_TAGS)
_LIB.define("softmax_statistics(Tensor x, int dim) -> (Tensor shift, Tensor log_total)", tags=_TAGS)
_LIB.define(
    "log_probability_backward(Tensor grad, Tensor x, Tensor index, Tensor shift, Tensor log_total) -> Tensor",
    tags=_TAGS,
)
_LIB.define("softmax_backward(Tensor grad, Tensor y, int dim, bool log, ScalarType dtype) -> Tensor", tags=_TAGS)


@torch.library.register_fake("bicompile::softmax", lib=_LIB)
def _(x: Tensor, dim: int, log: bool, dtype: torch.dtype, safe: bool = False) -> Tensor:
    check_floating("softmax", "x", x.dtype)
    check_floating("softmax", "dtype", dtype)
    torch._check_value(
        not (log and safe), lambda: "bicompile::softmax: expected log or safe, got both; pass safe=False"
    )
    canonical_dim("softmax", dim, x.dim())
    return x.new_empty(x.shape, dtype=dtype)


@torch.library.register_fake("bicompile::softmax_statistics", lib=_LIB)
def _(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    check_floating("softmax_statistics", "x", x.dtype)
    shape, dtype = reduced_shape("softmax_statistics", x, [dim], False), statistics_dtype(x.dtype)
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)


@torch.library.register_fake("bicompile::softmax_backward", lib=_LIB)
def _(grad: Tensor, y: Tensor, dim: int, log: bool, dtype: torch.dtype) -> Tensor:
    check_floating("softmax_backward", "grad", grad.dtype)
    check_floating("softmax_backward", "y", y.dtype)
    check_floating("softmax_backward", "dtype", dtype)
    canonical_dim("softmax_backward", dim, y.dim())
    torch._check_value(
        grad.dim() == y.dim(),
        lambda: (
            "bicompile::softmax_backward: expected grad and y of one shape, got "
            f"{tuple(grad.shape)} and {tuple(y.shape)}; expand grad first"
        ),
    )
    return y.new_empty(y.shape, dtype=dtype)


@torch.library.register_fake("bicompile::log_probability_backward", lib=_LIB)
def _(grad: Tensor, x: Tensor, index: Tensor, shift: Tensor, log_total: Tensor) -> Tensor:
    check_floating("log_probability_backward", "x", x.dtype)
    wide = statistics_dtype(x.dtype)
    rows = (("grad", grad, wide), ("index", index, torch.int64), ("shift", shift, wide), ("log_total", log_total, wide))
    for name, row, dtype in rows:
        torch._check_value(
            x.dim() == 2 and row.dim() == 1 and row.shape[0] == x.shape[0] and row.dtype == dtype,
            lambda name=name, row=row, dtype=dtype: (
                f"bicompile::log_probability_backward: expected scores [N, C] and {name} [N] of {dtype}, got shapes "
                f"{tuple(x.shape)} and {tuple(row.shape)}, and {row.dtype}; flatten the rows first"
            ),
        )
    return x.new_empty(x.shape)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """What ``dtype`` is computed in, and statistics are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


on_gpu(_LIB, f"{__package__}.gpu", "softmax", "softmax_backward", "softmax_statistics")
on_gpu(_LIB, f"{__package__}.gpu_gradient", "log_probability_backward")
