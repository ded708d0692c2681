"""The inverse of the error function from functions that ``lowering.elementwise`` defines: a normal form."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from .bags import wide

aten = torch.ops.aten

# M. Giles, "Approximating the erfinv function", GPU Computing Gems 2, 2011: in w - 2.5 and in sqrt(w) - 3.
# fmt: off
_CENTRE = (
    2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087, -0.00125372503, -0.00417768164,
    0.246640727, 1.50140941,
)
_TAIL = (
    -0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773, -0.0076224613, 0.00943887047,
    1.00167406, 2.83297682,
)
# fmt: on


def _polynomial(coefficients: Sequence[float], x: Tensor) -> Tensor:
    """By Horner's rule, the highest power first."""
    return functools.reduce(lambda total, c: total * x + c, coefficients[1:], torch.full_like(x, coefficients[0]))


def _erfinv(x: Tensor) -> Tensor:
    """Giles's approximation, about 3e-7 of the value off, and a step of Newton's method; in float64, whose numbers come
    nearer to 1 than the approximation was made for, four."""
    y = wide(x if x.is_floating_point() else x.to(torch.get_default_dtype()))
    size = y.abs()
    w = -torch.log((1.0 - size) * (1.0 + size))
    found = torch.where(w < 5, _polynomial(_CENTRE, w - 2.5), _polynomial(_TAIL, w.sqrt() - 3.0)) * size
    for _ in range(4 if y.dtype == torch.float64 else 1):
        rest = torch.erfc(found)  # by the logarithm of what is left to 1, where erf says little
        missing = torch.where(size < 0.5, size - torch.erf(found), rest * torch.log(rest / (1.0 - size)))
        found = found + missing * (found * found).exp() * (math.sqrt(math.pi) / 2)
    found = torch.where(size == 1, math.inf, found)
    return torch.copysign(found, y).to(x.dtype if x.is_floating_point() else y.dtype)


NORMAL_FORMS: dict[OpOverload, Callable[..., Any]] = {
    aten.erfinv.default: _erfinv,
    aten.special_erfinv.default: _erfinv,
}
