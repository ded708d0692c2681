"""Plan the ops of a graph on a GPU while Inductor compiles what is around them.

The first plan of its kind compiles kernels and holds them against references: seconds, which would otherwise come
after those that Inductor takes.

Numerics: unchanged.  What is not planned here, or cannot be, is planned when it runs.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from .plans import ON_GPU, Planned, is_capturing, on_device

DEVICE = "cuda"
THREAD = "bicompile plans"
_log = logging.getLogger(__name__)
_POOL: ContextVar[ThreadPoolExecutor | None] = ContextVar("pool", default=None)


@dataclass(frozen=True)
class Like:
    """A tensor that is not there yet."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def make(self) -> Tensor:
        """One that lies like it, with anything in it: a plan looks at no element."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)


@contextlib.contextmanager
def early_plans() -> Iterator[None]:
    """Let ``plan_early`` begin its work in this thread, and leave when all of it is done."""
    with ThreadPoolExecutor(1, THREAD) as pool:  # of several threads, Inductor would have to wait at Python's lock
        token = _POOL.set(pool)
        try:
            yield
        finally:
            _POOL.reset(token)


def plan_early(gm: GraphModule) -> None:
    """Begin to plan the ops in ``gm`` on a GPU, in a thread; outside of ``early_plans``, nothing.

    Nor while a CUDA graph is captured, as nothing could be compiled then.
    """
    calls, pool = {repr(call): call for node in gm.graph.nodes if (call := _call_of(node)) is not None}, _POOL.get()
    if calls and pool is not None and not is_capturing():
        for call in calls.values():
            pool.submit(_plan, *call)


def _plan(op: str, arguments: Sequence[Any]) -> None:
    """Plan a call, if it is planned at all."""
    try:
        function = ON_GPU[op].function
        if isinstance(function, Planned):
            with torch.no_grad():
                on_device(function.plan)(*[x.make() if isinstance(x, Like) else x for x in arguments])
    except Exception:  # such as too little memory: the op plans again where it runs, and raises there
        _log.debug("%s: not planned early", op, exc_info=True)


def _call_of(node: Node) -> tuple[str, list[Any]] | None:
    """The name of the op that ``node`` calls and its arguments, if it is one of ours on a GPU."""
    op = node.target
    if not isinstance(op, OpOverload) or op.namespace != "bicompile" or node.kwargs:
        return None
    name, arguments = op._schema.name.removeprefix("bicompile::"), [_like(x) for x in node.args]
    devices = {x.device.type for x in arguments if isinstance(x, Like)}
    return (name, arguments) if name in ON_GPU and devices == {DEVICE} else None


def _like(argument: Any) -> Any:
    """An argument of a node, with what it was traced with in the place of symbolic numbers."""
    value = argument.meta.get("val") if isinstance(argument, Node) else argument
    if isinstance(value, Tensor):
        shape, strides = (tuple(_like(n) for n in numbers) for numbers in (value.shape, value.stride()))
        return Like(shape, strides, value.dtype, value.device)
    return value.node.hint if isinstance(value, (torch.SymInt, torch.SymFloat)) else value
