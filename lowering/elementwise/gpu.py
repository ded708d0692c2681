"""Elementwise ops on a GPU, for code that is not compiled: each is compiled by itself, once.

Compiled code gets its elementwise functions from Inductor, and which instructions those are follows the release of
torch.  So eager code takes them from there too: a graph of the one op, compiled by the same backend for every size.
With the numerics that the backend pins, an element has the bits that it would have in any larger graph.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten
_BINARY = {
    "pow": aten.pow.Tensor_Tensor,
    "atan2": aten.atan2.default,
    "hypot": aten.hypot.default,
    "nextafter": aten.nextafter.default,
    "fmod": aten.fmod.Tensor,
    "remainder": aten.remainder.Tensor,
}
_HALVES = (torch.bfloat16, torch.float16)
_COMPILED: dict[Any, Callable[..., Any]] = {}


def compiled(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The elementwise ``op`` of ``args`` and ``kwargs``, broadcast, as compiled code computes it.

    The first call with other numbers or dtypes compiles, which takes about a second.

    Raises:
        UnsupportedOpError: the backend refuses the op.
    """
    tensors = {place: x for place, x in enumerate([*args, *kwargs.values()]) if isinstance(x, Tensor)}
    shape = torch.broadcast_shapes(*(x.shape for x in tensors.values()))
    if shape.numel() == 0:
        return op(*args, **kwargs)
    # A 0-d tensor stays one: it takes a lesser part in type promotion.
    wide = {place: x for place, x in tensors.items() if x.dim()}
    strides = _common_strides(shape, list(wide.values()))
    flat = dict(tensors)
    for place, x in wide.items():
        flat[place] = (
            x.expand(shape).reshape(-1).contiguous() if strides is None else x.as_strided((shape.numel(),), (1,))
        )
    given = [x.detach() for x in flat.values()]
    for x in given:
        if x.dim() and len(x) > 1:  # Dynamo compiles for the one size 1 by itself
            torch._dynamo.mark_dynamic(x, 0)
    with _disable_current_modes(), torch.no_grad():
        result = _function(op, args, kwargs, flat)(*given)
    if strides is None:
        return tree_map_only(Tensor, lambda x: x.view(shape), result)
    return tree_map_only(Tensor, lambda x: x.as_strided(shape, strides), result)


def unary(x: Tensor, name: str) -> Tensor:
    """The function that ``bicompile::unary`` knows as ``name``."""
    return compiled(getattr(aten, name).default, (x,), {})


def binary(a: Tensor, b: Tensor, name: str) -> Tensor:
    """The function that ``bicompile::binary`` knows as ``name``; beside a half precision, float32 is rounded to it.

    Raises:
        ValueError: a power of or by a number, whose compiled code follows the number.
    """
    if name not in _BINARY:
        raise ValueError(
            f"bicompile::binary: expected one of {', '.join(_BINARY)} on a GPU, got {name}, whose code follows the "
            "number; call torch.pow inside bicompile.eager()"
        )
    return compiled(_BINARY[name], (a, b), {}).to(b.dtype if b.dtype in _HALVES else a.dtype)


def _function(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: dict[int, Tensor]) -> Any:
    """A compiled function of the tensors alone; all else is constant in it."""
    constants = [None if place in tensors else x for place, x in enumerate([*args, *kwargs.values()])]
    # repr tells 1 from 1.0 and 0.0 from -0.0
    layout = tuple((place, x.dtype, x.device, x.dim()) for place, x in tensors.items())
    key = (op, layout, len(args), tuple(kwargs), repr(constants))
    if (found := _COMPILED.get(key)) is not None:
        return found
    places, names = list(tensors), list(kwargs)

    def call(*given: Tensor) -> Any:
        if not torch.compiler.is_compiling():
            raise RuntimeError(
                f"{op}: bicompile.eager() compiles elementwise functions for the GPU, but compiling is switched off "
                "(TORCHDYNAMO_DISABLE or torch.compiler.set_stance). Switch it on."
            )
        values = list(constants)
        for place, x in zip(places, given, strict=True):
            values[place] = x
        count = len(values) - len(names)
        return op(*values[:count], **dict(zip(names, values[count:], strict=True)))

    # Dynamo counts recompilations by code object, so each function gets one of its own.  Not dynamic=True, which would
    # make unknowns of the constants: a square would become a power.
    own = types.FunctionType(call.__code__.replace(co_name=op._opname), call.__globals__, None, None, call.__closure__)
    _COMPILED[key] = torch.compile(own, backend="batch_invariant", fullgraph=True)
    return _COMPILED[key]


def _common_strides(shape: torch.Size, tensors: list[Tensor]) -> tuple[int, ...] | None:
    """The strides that all ``tensors`` have, if they have ``shape`` and fill one piece of memory; else None."""
    strides = {x.stride() for x in tensors}
    if len(strides) != 1 or any(x.shape != shape for x in tensors):
        return None
    common = strides.pop()
    step = 1
    for size, stride in sorted(zip(shape, common, strict=True), key=lambda dim: dim[1]):
        if size != 1 and stride != step:
            return None
        step *= size
    return common
