"""Catch attention above autograd, before PyTorch picks a backend for it.

``F.scaled_dot_product_attention`` is a composite op: by the time a decomposition table sees it, it has become one of
several backend ops or a product of matrices, by shape, mask and dropout.  A Python kernel for its composite key is
asked first, wherever Python dispatch is on: always while AOTAutograd traces, and inside ``bicompile.eager()``.  The
gate keeps it out of every other backend's way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch._C import DispatchKey

from .lowering.attention.op import scaled_dot_product_attention

_ACTIVE: ContextVar[bool] = ContextVar("bicompile_interception", default=False)
_SDPA = torch.ops.aten.scaled_dot_product_attention.default


@contextlib.contextmanager
def intercept_attention() -> Iterator[None]:
    """Send ``F.scaled_dot_product_attention`` to our lowering while the context is open, in this thread."""
    token = _ACTIVE.set(True)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def is_intercepting() -> bool:
    """Whether attention goes to our lowering in this thread: while one of our graphs is traced, or in ``eager()``."""
    return _ACTIVE.get()


@_SDPA.py_impl(DispatchKey.CompositeImplicitAutograd)
def _attention(*args: Any, **kwargs: Any) -> Any:
    if _ACTIVE.get():
        return scaled_dot_product_attention(*args, **kwargs)
    return _SDPA._op_dk(DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
