"""Catch attention, cross entropy, dropout, recurrent layers and determinants above autograd.

``F.scaled_dot_product_attention`` is a composite op: by the time a decomposition table sees it, it has become one of
several backend ops or a product of matrices, by shape, mask and dropout.  ``F.cross_entropy`` is one too, whose parts
would keep the log-softmax of all classes for the gradient.  A Python kernel for their composite key is asked first,
wherever Python dispatch is on: always while AOTAutograd traces, and inside ``bicompile.eager()``.  The gate keeps it
out of every other backend's way.

The forms of dropout that draw their masks inside C++ are caught; plain dropout is an op of its own further down.
Recurrent layers have Python kernels already, PyTorch's, which ours stand in front of.

Determinants are caught too, to make their matrices contiguous: PyTorch's gradient goes by the layout of the matrix to
tell whether the factors that it kept are those of the matrix or of its transpose, and ours are made of a copy.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from . import dropout
from .lowering.attention.op import scaled_dot_product_attention
from .lowering.softmax.cross_entropy import cross_entropy_loss
from .recurrent import RECURRENT

_ACTIVE: ContextVar[bool] = ContextVar("bicompile_interception", default=False)
_COMPOSITE = DispatchKey.CompositeImplicitAutograd
_SDPA = torch.ops.aten.scaled_dot_product_attention.default
_CROSS_ENTROPY = torch.ops.aten.cross_entropy_loss.default


@contextlib.contextmanager
def intercept_composites() -> Iterator[None]:
    """Send attention and cross entropy to our lowerings while the context is open, in this thread."""
    token = _ACTIVE.set(True)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def is_intercepting() -> bool:
    """Whether they go to our lowerings in this thread: while one of our graphs is traced, or in ``eager()``.

    A dispatch mode says so by itself: a backward pass on a GPU runs in a thread of its own, which has the caller's
    modes and not its context variables, and may run parts of the forward pass again (activation checkpointing).
    """
    return _ACTIVE.get() or any(isinstance(mode, InterceptingMode) for mode in _get_current_dispatch_mode_stack())


class InterceptingMode(TorchDispatchMode):
    """A dispatch mode inside which they go to our lowerings."""


def kernel_of(op: OpOverload) -> Callable[[Callable[..., Any]], None]:
    """Make a function the op's Python kernel.  Dynamo, which may run the code that calls the op, must not trace it."""

    def register(kernel: Callable[..., Any]) -> None:
        op.py_impl(_COMPOSITE)(torch.compiler.disable(kernel))

    return register


@kernel_of(_SDPA)
def _attention(*args: Any, **kwargs: Any) -> Any:
    if is_intercepting():
        return scaled_dot_product_attention(*args, **kwargs)
    return _SDPA._op_dk(_COMPOSITE, *args, **kwargs)


@kernel_of(_CROSS_ENTROPY)
def _cross_entropy(*args: Any, **kwargs: Any) -> Any:
    # torch.func's transforms, vmap above all, know PyTorch's own parts only.
    if is_intercepting() and torch._C._functorch.peek_interpreter_stack() is None:
        if (loss := cross_entropy_loss(*args, **kwargs)) is not None:
            return loss
    return _CROSS_ENTROPY._op_dk(_COMPOSITE, *args, **kwargs)


def _of_rows(op: OpOverload, ours: Callable[[Tensor, float, bool], Tensor]) -> None:
    """Make a form of dropout, or its in-place twin, ours while the context is open."""

    @kernel_of(op)
    def _(x: Tensor, p: float, train: bool) -> Any:
        if not (is_intercepting() and x.is_floating_point()):
            return op._op_dk(_COMPOSITE, x, p, train)
        result = ours(x, p, train)
        return x.copy_(result) if op._schema.is_mutable and result is not x else result


for _name, _ours in (
    ("feature_dropout", dropout.feature_dropout),
    ("alpha_dropout", dropout.alpha_dropout),
    ("feature_alpha_dropout", functools.partial(dropout.alpha_dropout, features=True)),
):
    _of_rows(getattr(torch.ops.aten, _name).default, _ours)
    _of_rows(getattr(torch.ops.aten, f"{_name}_").default, _ours)
_of_rows(torch.ops.aten.dropout_.default, torch.dropout)


def _recurrent(op: OpOverload, ours: Callable[..., Any]) -> None:
    """Make a recurrent layer or cell ours while the context is open."""
    stock = op.py_kernels.pop(_COMPOSITE, None) or functools.partial(op._op_dk, _COMPOSITE)
    op.py_kernels.pop(DispatchKey.Autograd, None)  # the same function; without it, autograd asks for the composite

    @kernel_of(op)
    def _(*args: Any, **kwargs: Any) -> Any:
        return (ours if is_intercepting() else stock)(*args, **kwargs)


for _op, _form in RECURRENT.items():
    _recurrent(_op, _form)


def _of_contiguous(op: OpOverload) -> None:
    """Give ``op`` a contiguous matrix while the context is open."""

    @kernel_of(op)
    def _(matrix: Tensor) -> Any:
        matrix = matrix.contiguous() if is_intercepting() else matrix
        return op._op_dk(_COMPOSITE, matrix)


_of_contiguous(torch.ops.aten.linalg_det.default)
_of_contiguous(torch.ops.aten.linalg_slogdet.default)
