"""``batch_invariant``: the decorator and wrapper around ``torch.compile``."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, overload

import torch
from torch import nn

T = TypeVar("T")


@overload
def batch_invariant(target: T, /, **compile_options: Any) -> T: ...
@overload
def batch_invariant(**compile_options: Any) -> Callable[[T], T]: ...


def batch_invariant(target: Any = None, /, **compile_options: Any) -> Any:
    """Compile a function, method, ``nn.Module`` class or module so that a row's bits do not depend on its batch.

        @batch_invariant
        def score(x): ...

        @batch_invariant(dynamic=True)
        class Model(nn.Module): ...

        model = batch_invariant(model)

    Args:
        target: a function or method; a subclass of ``nn.Module``, every instance of which then has its ``forward``
            compiled; or a module, which is wrapped and left unchanged.  Left out when options are given to a decorator.
        compile_options: keyword arguments of ``torch.compile`` except ``backend``: ``dynamic``, ``fullgraph``,
            ``mode``, ``options`` (see ``bicompile.config.parse_options``), ``disable``.

    Returns:
        What was given, compiled; or, without ``target``, a decorator.

    Raises:
        TypeError: ``target`` is none of these, or a generator function, or ``backend`` is given.
    """
    if "backend" in compile_options:
        raise TypeError("batch_invariant: backend is 'batch_invariant' already; call torch.compile for another one")
    if target is None:
        return functools.partial(batch_invariant, **compile_options)
    compile_it = functools.partial(torch.compile, backend="batch_invariant", **compile_options)
    if isinstance(target, type):
        if not issubclass(target, nn.Module):
            raise TypeError(f"batch_invariant: expected a subclass of nn.Module, got the class {target.__name__}")
        target.forward = compile_it(target.forward)
        return target
    if isinstance(target, (staticmethod, classmethod)):
        return type(target)(compile_it(target.__func__))
    if not callable(target):
        raise TypeError(
            f"batch_invariant: expected a function, a module or a module class, got {type(target).__name__}"
        )
    if inspect.isgeneratorfunction(target) or inspect.iscoroutinefunction(target):
        raise TypeError(
            f"batch_invariant: {getattr(target, '__name__', target)} is a generator or coroutine, whose code runs "
            "outside of its call; put what it computes into a function and compile that"
        )
    return compile_it(target)
