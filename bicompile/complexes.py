"""Complex sums and products by their real and imaginary parts: normal forms.

PyTorch computes complex numbers in kernels of its own, which differ between vector and scalar code.  Here the parts are
real tensors, and what is done with them is elementwise like anything else.  ``(a + bi)(c + di)`` is
``(ac - bd) + (ad + bc)i``, each operation rounded; a real factor is one whose imaginary part is 0, as in PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

aten = torch.ops.aten


def _is_complex(x: Any) -> bool:
    return x.is_complex() if isinstance(x, Tensor) else isinstance(x, complex)


def _parts(x: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    """Real and imaginary part, those of tensors in ``dtype``, which is real."""
    if not isinstance(x, Tensor):
        return x.real, x.imag
    if not x.is_complex():
        return x.to(dtype), torch.zeros((), dtype=dtype, device=x.device)
    real, imaginary = torch.view_as_real(x).unbind(-1)
    return real.to(dtype), imaginary.to(dtype)


def _joined(real: Tensor, imaginary: Tensor) -> Tensor:
    return torch.view_as_complex(torch.stack(torch.broadcast_tensors(real, imaginary), -1))


def _by_parts(combine: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Any]:
    """The op on complex operands, of which the first is a tensor, as ``combine`` makes its parts of theirs."""

    def normal_form(x: Tensor, y: Any, **options: Any) -> Any:
        if not (_is_complex(x) or _is_complex(y)):
            return NotImplemented
        dtype = torch.result_type(x, y).to_real()
        return _joined(*combine(*_parts(x, dtype), *_parts(y, dtype), **options))

    return normal_form


def _product(a: Tensor, b: Tensor, c: Any, d: Any) -> tuple[Tensor, Tensor]:
    return a * c - b * d, a * d + b * c


def _sum(a: Tensor, b: Tensor, c: Any, d: Any, alpha: complex = 1) -> tuple[Tensor, Tensor]:
    if alpha != 1:
        c, d = _product(c, d, alpha.real, alpha.imag)
    return a + c, b + d


def _difference(a: Tensor, b: Tensor, c: Any, d: Any, alpha: complex = 1) -> tuple[Tensor, Tensor]:
    if alpha != 1:
        c, d = _product(c, d, alpha.real, alpha.imag)
    return a - c, b - d


def _negative(x: Tensor) -> Any:
    if not x.is_complex():
        return NotImplemented
    return torch.view_as_complex(-torch.view_as_real(x))


def _total(
    x: Tensor, dim: Sequence[int] | None = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Any:
    if not x.is_complex() or (dtype or x.dtype) != x.dtype:
        return NotImplemented
    real, imaginary = _parts(x, x.dtype.to_real())
    return _joined(real.sum(dim, keepdim), imaginary.sum(dim, keepdim))


def _polar(length: Tensor, angle: Tensor) -> Tensor:
    return _joined(length * angle.cos(), length * angle.sin())


NORMAL_FORMS: dict[OpOverload, Callable[..., Any]] = {
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar), _by_parts(_product)),
    **dict.fromkeys((aten.add.Tensor, aten.add.Scalar), _by_parts(_sum)),
    **dict.fromkeys((aten.sub.Tensor, aten.sub.Scalar), _by_parts(_difference)),
    aten.neg.default: _negative,
    **dict.fromkeys((aten.sum.default, aten.sum.dim_IntList), _total),
    aten.complex.default: _joined,
    aten.polar.default: _polar,
}
