"""Writes into indexed places in one order: of several to one place, the last in the order of the indices stays.

PyTorch's kernels, and Inductor's, write all at once, and any of them may stay.  So each takes the value of the last
that goes to its place: then they are equal, and it does not matter which stays::

    index_put(x, [at], values)                                            # before
    last = zeros(len(x)).scatter_reduce(0, at, arange(len(at)), "amax")   # after; of integers, so exact in any order
    index_put(x, [at], values[last[at]])

Left alone: one write, writes of one value for all, a mask by itself, sums (``lowering.scatter``).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .errors import UnsupportedOpError
from .passes.rewriting import bind

aten = torch.ops.aten
_ORDERED: ContextVar[bool] = ContextVar("bicompile_ordered_writes", default=False)


def ordered(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """The arguments with which ``func`` leaves the last write to each place; None where any will do.

    Raises:
        UnsupportedOpError: a mask stands beside other indices.
    """
    if (rule := _RULES.get(func)) is None or _ORDERED.get():
        return None
    return rule(**bind(func, args, kwargs))


def _index_put(
    self: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool
) -> tuple[Any, ...] | None:
    indexed = [dim for dim, index in enumerate(indices) if index is not None]
    given = [index for index in indices if index is not None]
    if accumulate or (len(given) == 1 and _is_mask(given[0])):
        return None
    if any(map(_is_mask, given)):
        if statically_known_true(values.numel() == 1):
            return None
        raise UnsupportedOpError(
            "aten.index_put: expected integer indices, or one mask, got a mask beside others, whose places may be "
            "equal. Make integers of the mask with mask.nonzero(as_tuple=True)."
        )
    shape = torch.broadcast_shapes(*(index.shape for index in given))
    apart = indexed != list(range(indexed[0], indexed[-1] + 1))
    before = 0 if apart else indexed[0]
    rest = [size for dim, size in enumerate(self.shape) if dim not in indexed]
    place = (*rest[:before], *shape, *rest[before:])
    if _is_one(math.prod(shape)) or _is_same(values, len(place), range(before, before + len(shape))):
        return None
    sizes = [self.shape[dim] for dim in indexed]
    linear = torch.zeros((), dtype=torch.int64, device=self.device)
    for index, size in zip(given, sizes, strict=True):
        wide = index.to(self.device, torch.int64)
        linear = linear * size + torch.where(wide < 0, wide + size, wide)
    last = _last(linear.expand(shape).reshape(-1), math.prod(sizes))
    flat = values.expand(place).flatten(before, before + len(shape) - 1)
    chosen = aten.index.Tensor(flat, [None] * before + [last.reshape(shape)])
    return self, indices, chosen, accumulate


def _index_copy(self: Tensor, dim: int, index: Tensor, source: Tensor) -> tuple[Any, ...] | None:
    if self.dim() == 0 or _is_one(index.numel()):
        return None
    return self, dim, index, source.index_select(dim, _last(index.reshape(-1).long(), self.shape[dim]))


def _scatter(self: Tensor, dim: int, index: Tensor, src: Tensor) -> tuple[Any, ...] | None:
    if self.dim() == 0 or _is_one(index.shape[dim]):
        return None
    places = torch.arange(index.shape[dim], device=index.device)
    places = places.reshape(-1, *[1] * (index.dim() - 1 - dim % index.dim())).expand(index.shape)
    last = torch.zeros(self.shape, dtype=torch.int64, device=index.device)
    last = last.scatter_reduce(dim, index, places, "amax")
    return self, dim, index, src.gather(dim, last.gather(dim, index))


def _last(index: Tensor, count: Any) -> Tensor:
    """For each element of ``index``, which is in [0, count), the position of the last one that equals it."""
    places = torch.arange(index.shape[0], device=index.device)
    last = torch.zeros(count, dtype=torch.int64, device=index.device).scatter_reduce(0, index, places, "amax")
    return last[index]


def _is_mask(index: Tensor) -> bool:
    return index.dtype in (torch.bool, torch.uint8)


def _is_one(count: Any) -> bool:
    """Is there at most one write to a place?"""
    return statically_known_true(count <= 1)


def _is_same(values: Tensor, rank: int, dims: range) -> bool:
    """Do all writes to a place have the same value: are ``values`` broadcast along ``dims`` of the ``rank``?"""
    own = [dim - rank + values.dim() for dim in dims]
    return all(dim < 0 or statically_known_true(values.shape[dim] == 1) for dim in own)


_RULES: dict[OpOverload, Callable[..., tuple[Any, ...] | None]] = {
    **dict.fromkeys((aten.index_put.default, aten.index_put_.default, aten._unsafe_index_put.default), _index_put),
    **dict.fromkeys((aten.index_copy.default, aten.index_copy_.default), _index_copy),
    **dict.fromkeys((aten.scatter.src, aten.scatter_.src), _scatter),
}


WRITES = frozenset(_RULES)


@contextlib.contextmanager
def _as_ordered() -> Iterator[None]:
    token = _ORDERED.set(True)
    try:
        yield
    finally:
        _ORDERED.reset(token)


def _decomposition(func: OpOverload) -> Callable[..., Any]:
    """``func`` of ordered arguments, for the table of decompositions, which asks again for ``func`` itself."""

    def decompose(*args: Any, **kwargs: Any) -> Any:
        if (better := ordered(func, args, kwargs)) is None:
            return NotImplemented
        with _as_ordered():
            return func(*better)

    return decompose


NORMAL_FORMS: dict[OpOverload, Callable[..., Any]] = {
    func: _decomposition(func) for func in (aten.index_put.default, aten._unsafe_index_put.default, aten.scatter.src)
}
