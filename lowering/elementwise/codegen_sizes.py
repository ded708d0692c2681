"""Make a number made of symbolic sizes what it is where sizes are known: a constant.

In a graph of half precisions Inductor holds constants in float32, and rounds the same number to the half precision
where it is made of symbols::

    tmp3 = tl.full([1], 0.003003003003003003, tl.float32)    # x * (1 / x.shape[1]), static
    tmp5 = (1.0 / ks0).to(tl.bfloat16).to(tl.float32)        # dynamic before
    tmp3 = (1.0 / ks0).to(tl.float32)                        # dynamic after

Torch 2.14 rounds constants of additions on the CPU, too; here they are not.  An index is no such number: converted to a
half precision, it is rounded, as an element of any tensor is.
"""

from __future__ import annotations

import contextlib
import unittest.mock
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch._inductor import lowering as inductor
from torch._inductor.index_propagation import IndexPropagation, IndexPropVar, SymPyOps
from torch.utils._sympy.symbol import SymT, symbol_is_type

_SIZES = (SymT.SIZE, SymT.FLOAT, SymT.UNBACKED_INT, SymT.UNBACKED_FLOAT, SymT.PRECOMPUTED_SIZE)
_HALVES = (torch.bfloat16, torch.float16)


@contextlib.contextmanager
def pinned_sizes() -> Iterator[None]:
    """Pin what Inductor makes of symbolic sizes until the context is left.  May be nested."""
    with (
        unittest.mock.patch.object(IndexPropagation, "propagate_sympy", _propagating(IndexPropagation.propagate_sympy)),
        unittest.mock.patch.object(IndexPropagation, "materialize_expr", _held(IndexPropagation.materialize_expr)),
        unittest.mock.patch.object(inductor, "promote_constants", _not_rounded(inductor.promote_constants)),
    ):
        yield


def is_number_of_sizes(expr: Any) -> bool:
    """Whether ``expr`` has one value for all elements, and follows sizes."""
    return (
        isinstance(expr, sympy.Expr)
        and bool(expr.free_symbols)
        and all(symbol_is_type(symbol, _SIZES) for symbol in expr.free_symbols)
    )


def _propagating(stock: Any) -> Any:
    """Inductor carries constants and integers through conversions; a quotient or root of sizes too, but no index."""

    def propagate_sympy(self: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if name in ("index_expr", "to_dtype"):
            values = [a.value if isinstance(a, IndexPropVar) else a for a in args]
            result = getattr(SymPyOps, name)(*values, **kwargs)
            if is_number_of_sizes(result.expr):
                if result.dtype.is_floating_point:
                    return IndexPropVar.new_symbolic(result)
            elif result.dtype in _HALVES and not result.is_constant():
                return self.fallback(name, args, kwargs)
        return stock(self, name, args, kwargs)

    return propagate_sympy


def _not_rounded(stock: Any) -> Any:
    """Constants of arithmetic keep their value, whatever this torch rounds; comparisons round theirs in every torch."""

    def promote_constants(*args: Any, **kwargs: Any) -> Any:
        for flag in ("round_scalar_constants", "round_scalars_to_tensor_dtype"):
            if flag in kwargs:
                kwargs[flag] = False
        return stock(*args, **kwargs)

    return promote_constants


def _held(stock: Any) -> Any:
    """A number is computed with in float32 at least."""

    def materialize_expr(self: Any, expr: Any, dtype: torch.dtype) -> Any:
        return stock(self, expr, torch.float32 if dtype in _HALVES and is_number_of_sizes(expr) else dtype)

    return materialize_expr
