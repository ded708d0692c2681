"""``_foreach`` ops, which optimizers call for all parameters at once: one tensor after the other, by the op for one.

Compiled code leaves them to Inductor, but for norms.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from .passes.rewriting import bind

aten = torch.ops.aten
_PREFIX = "_foreach_"
_SCALED = ("addcdiv", "addcmul")  # whose factor is the keyword ``value``
_WITHOUT_SINGLE = frozenset(  # the op for one takes tensors only, or numbers only
    f"{name}.{overload}"
    for names, overloads in ((("maximum", "minimum"), ("Scalar", "ScalarList")), (_SCALED, ("Tensor",)))
    for name in names
    for overload in overloads
)


def norm(tensors: list[Tensor], ord: float = 2, dtype: torch.dtype | None = None) -> list[Tensor]:
    """The norm of each tensor, as ``clip_grad_norm_`` asks for it."""
    return [torch.linalg.vector_norm(x, ord, dtype=dtype) for x in tensors]


def one_by_one(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor] | None:
    """What a functional ``_foreach`` op returns, a tensor for each of its tensors; None for any other op."""
    name = func._opname.removeprefix(_PREFIX)
    if name == func._opname or not hasattr(aten, name) or f"{name}.{func._overloadname}" in _WITHOUT_SINGLE:
        return None
    given = bind(func, args, kwargs)
    keywords = {argument.name for argument in func._schema.arguments if argument.kwarg_only}
    if name in _SCALED:
        keywords.add("value" if "value" in given else "scalars")
    count = max(len(value) for value in given.values() if isinstance(value, (list, tuple)))
    results = []
    for i in range(count):
        own = {key: value[i] if isinstance(value, (list, tuple)) else value for key, value in given.items()}
        named = {"value" if key == "scalars" else key: own.pop(key) for key in keywords}
        results.append(getattr(aten, name)(*own.values(), **named))
    return results
