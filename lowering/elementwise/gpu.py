"""Elementwise ops on a GPU, for code that is not compiled: each is compiled by itself, once.

Compiled code gets its elementwise functions from Inductor, and which instructions those are follows the release of
torch.  So eager code takes them from there too: a graph of the one op, compiled by the same backend for every size.
With the numerics that the backend pins, an element has the bits that it would have in any larger graph.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import no_python_dispatcher
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
_COMPILED: dict[Any, _Function] = {}


def compiled(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The elementwise ``op`` of ``args`` and ``kwargs``, broadcast, as compiled code computes it.

    The first call with other numbers or dtypes compiles, which takes about a second.

    Raises:
        UnsupportedOpError: the backend refuses the op.
    """
    values = (*args, *kwargs.values())
    tensors = [x for x in values if isinstance(x, Tensor)]
    wide = [x for x in tensors if x.dim()]  # a 0-d tensor stays one: it takes a lesser part in type promotion
    shape = wide[0].shape if wide else torch.Size()
    if any(x.shape != shape for x in wide):
        shape = torch.broadcast_shapes(*(x.shape for x in wide))
    if shape.numel() == 0:
        return op(*args, **kwargs)
    strides = _common_strides(shape, wide)
    function = _function(op, len(args), tuple(kwargs), values)
    modes = _disable_current_modes() if torch._C._len_torch_dispatch_stack() else contextlib.nullcontext()
    with modes, no_python_dispatcher(), torch.no_grad():
        given = [_flat(x, shape, strides) if x.dim() else x.detach() for x in tensors]
        result = function(*given)
        if isinstance(result, Tensor):
            return _shaped(result, shape, strides)
        return tree_map_only(Tensor, lambda x: _shaped(x, shape, strides), result)


def _flat(x: Tensor, shape: torch.Size, strides: tuple[int, ...] | None) -> Tensor:
    """``x``, broadcast to ``shape``, in one dim: where all have ``strides``, as it lies in memory."""
    if strides is None:
        return x.expand(shape).reshape(-1).contiguous()
    return x.as_strided((shape.numel(),), (1,))


def _shaped(flat: Tensor, shape: torch.Size, strides: tuple[int, ...] | None) -> Tensor:
    """What ``_flat`` undoes."""
    return flat.view(shape) if strides is None else flat.as_strided(shape, strides)


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


class _Function:
    """A compiled function of tensors of one dim or none: one graph for every size above 1."""

    def __init__(self, call: Callable[..., Any], name: str) -> None:
        # Dynamo counts recompilations by code object, so each function gets one of its own.  Not dynamic=True, which
        # would make unknowns of the constants: a square would become a power.
        code = call.__code__.replace(co_name=name)
        own = types.FunctionType(code, call.__globals__, None, None, call.__closure__)
        self._compiled = torch.compile(own, backend="batch_invariant", fullgraph=True)
        self._is_dynamic = False

    def __call__(self, *given: Tensor) -> Any:
        if not self._is_dynamic:
            for x in given:
                if x.dim() and len(x) > 1:  # Dynamo compiles for the one size 1 by itself
                    torch._dynamo.mark_dynamic(x, 0)
                    self._is_dynamic = True
        return self._compiled(*given)


def _function(op: OpOverload, positional: int, names: tuple[str, ...], values: tuple[Any, ...]) -> _Function:
    """A compiled function of the tensors among ``values`` alone; all else is constant in it."""
    constants = [None if isinstance(x, Tensor) else x for x in values]
    # repr tells 1 from 1.0 and 0.0 from -0.0
    layout = tuple((x.dtype, x.device, x.dim() > 0) if isinstance(x, Tensor) else None for x in values)
    key = (op, layout, names, repr(constants))
    if (found := _COMPILED.get(key)) is not None:
        return found
    places = [place for place, x in enumerate(values) if isinstance(x, Tensor)]

    def call(*given: Tensor) -> Any:
        if not torch.compiler.is_compiling():
            raise RuntimeError(
                f"{op}: bicompile.eager() compiles elementwise functions for the GPU, but compiling is switched off "
                "(TORCHDYNAMO_DISABLE or torch.compiler.set_stance). Switch it on."
            )
        values = list(constants)
        for place, x in zip(places, given, strict=True):
            values[place] = x
        return op(*values[:positional], **dict(zip(names, values[positional:], strict=True)))

    _COMPILED[key] = _Function(call, op._opname)
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
