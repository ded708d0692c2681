"""Reductions across processes, in one order of the ranks.

How a backend such as NCCL or gloo adds follows its rings and trees, and an element's place in the buffer.  So the
parts are moved, which is exact, and added by the reductions of ``bicompile.lowering``::

    all_reduce(x, "sum", group)                                # before
    all_gather_into_tensor(x, size, group).sum over the ranks  # after

A reduction into one's own part moves as many bytes as before, one for all as many times more as there are ranks / 2.
What reduces outside of every graph, as ``DistributedDataParallel`` does: see ``bicompile.distributed``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._ops import OpOverload

from .errors import UnsupportedOpError

_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda parts: parts.sum(0),
    "avg": lambda parts: parts.mean(0),
    "product": lambda parts: parts.prod(0),
    "max": lambda parts: parts.amax(0),
    "min": lambda parts: parts.amin(0),
}


def _reduction(name: str, op: str) -> Callable[[Tensor], Tensor]:
    if op.lower() not in _REDUCTIONS:
        raise UnsupportedOpError(f"{name}: expected one of {', '.join(_REDUCTIONS)}, got the reduction {op!r}")
    return _REDUCTIONS[op.lower()]


def _gathered(x: Tensor, group: str) -> Tensor:
    """``[ranks, *x.shape]``."""
    from torch.distributed.distributed_c10d import _resolve_process_group

    c10d, ranks = torch.ops._c10d_functional, _resolve_process_group(group).size()  # type: ignore[arg-type]
    return c10d.wait_tensor(c10d.all_gather_into_tensor(x.contiguous().unsqueeze(0), ranks, group))


def _all_reduce(x: Tensor, op: str, group: str) -> Tensor:
    return _reduction("all_reduce", op)(_gathered(x, group))


def _reduce_scatter(x: Tensor, op: str, ranks: int, group: str) -> Tensor:
    reduction, c10d = _reduction("reduce_scatter_tensor", op), torch.ops._c10d_functional
    sizes = [x.shape[0] // ranks] * ranks
    return reduction(
        c10d.wait_tensor(c10d.all_to_all_single(x.contiguous(), sizes, sizes, group)).unflatten(0, (ranks, -1))
    )


def _normal_forms() -> dict[OpOverload, Callable[..., Any]]:
    if not dist.is_available():
        return {}
    c10d = torch.ops._c10d_functional
    return {
        c10d.all_reduce.default: _all_reduce,
        c10d.all_reduce_coalesced.default: lambda xs, *rest: [_all_reduce(x, *rest) for x in xs],
        c10d.reduce_scatter_tensor.default: _reduce_scatter,
        c10d.reduce_scatter_tensor_coalesced.default: lambda xs, *rest: [_reduce_scatter(x, *rest) for x in xs],
    }


NORMAL_FORMS = _normal_forms()
