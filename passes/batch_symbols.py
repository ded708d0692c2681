"""Which of a node's sums run over the batch: follow the batch's symbol through the shapes.

Where the batch size is symbolic (``explain`` marks it so), every shape is a sympy expression of it, through views and
reshapes: ``[5*s0, 32]`` for a flattened batch.  A node mixes rows exactly if the extent that it reduces contains the
symbol.  What this cannot see: a view that puts parts of two rows into one without reducing, and data-dependent
indices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node

from bicompile.lowering.samples.op import SAMPLE_DIMS, TRANSFORMS

from .rewriting import arguments
from .segments import segment_length

aten = torch.ops.aten


def symbols_of(size: Any) -> frozenset[sympy.Symbol]:
    """The sympy symbols in a size, none for a plain integer."""
    return frozenset(size.node.expr.free_symbols) if isinstance(size, torch.SymInt) else frozenset()


def reduced_extent(node: Node) -> list[Any] | None:
    """The sizes over which one output element of ``node`` combines input elements; None if the node combines none.

    For a matrix product the inner size, for a sum the reduced dims, for an accumulating scatter the dims of the
    source that the index runs over.
    """
    if not isinstance(node.target, OpOverload):
        return None
    name = f"{node.target.namespace}.{node.target._opname}"
    find = _EXTENTS.get(name)
    return None if find is None else find(arguments(node))


def mixes_batch(node: Node, batch: frozenset[sympy.Symbol]) -> bool:
    """Whether one output element of ``node`` takes in elements of more than one row of the batch."""
    extent = reduced_extent(node)
    return extent is not None and any(symbols_of(size) & batch for size in extent)


def _shape(node: Node) -> torch.Size:
    val = node.meta["val"]
    assert isinstance(val, Tensor)
    return val.shape


def _operand(args: dict[str, Any]) -> torch.Size:
    """The shape of the tensor that is reduced, which is the op's first."""
    return _shape(next(iter(args.values())))


def _over_dims(args: dict[str, Any]) -> list[Any]:
    shape = _operand(args)
    dim = args.get("dim")
    dims = [dim] if isinstance(dim, int) else list(dim or range(len(shape)))
    return [shape[d] for d in dims] if len(shape) else []


def _last_dim(args: dict[str, Any]) -> list[Any]:
    return [_operand(args)[-1 if args.get("dim") is None else args["dim"]]]


def _inner(args: dict[str, Any]) -> list[Any]:
    return [_shape(args["a"])[-1]]


def _inner_and_classes(args: dict[str, Any]) -> list[Any]:
    """Of ``linear_log_probability``: the terms of a score, and the scores of a row."""
    return [_shape(args["hidden"])[1], _shape(args["weight"])[0]]


def _inner_classes_and_rows(args: dict[str, Any]) -> list[Any]:
    """Of its gradients: the rows too, unless ``hidden`` alone is differentiated."""
    _, for_weight, for_bias = args["wanted"]
    return [*_inner_and_classes(args), *(_shape(args["hidden"])[:1] if for_weight or for_bias else ())]


def _normalised_dims(args: dict[str, Any]) -> list[Any]:
    return list(_shape(args["x"])[-args["normalized_dims"] :])


def _rows_of_norm(args: dict[str, Any]) -> list[Any]:
    return list(_shape(args["x"])[: -args["normalized_dims"]])


def _group(args: dict[str, Any]) -> list[Any]:
    return list(_shape(args["x"])[1:])


def _of_factors(args: dict[str, Any]) -> list[Any]:
    return [_shape(args["factors"])[-1]]


def _all_but_channels(args: dict[str, Any]) -> list[Any]:
    shape = _shape(args["x"])
    return [shape[0], *shape[2:]]


def _keys(args: dict[str, Any]) -> list[Any]:
    return [_shape(args["k"])[-2], _shape(args["q"])[-1]]


def _keys_and_queries(args: dict[str, Any]) -> list[Any]:
    return [*_keys(args), _shape(args["q"])[-2]]


def _scattered(args: dict[str, Any]) -> list[Any]:
    """Contributions meet along the scattered dim only; where each row goes to a destination of its own, in the row."""
    source, dim = args.get("src") or args.get("source"), args["dim"]
    if not _shape(source):
        return []
    positions = _shape(source)[dim]
    length = segment_length(args["index"], _operand(args)[dim], positions, dim)
    return [positions if length is None else length]


def _indexed(args: dict[str, Any]) -> list[Any]:
    return [size for index in args["indices"] if index is not None for size in _shape(index)]


def _embedded(args: dict[str, Any]) -> list[Any]:
    return list(_shape(args["indices"]))


def _transformed(args: dict[str, Any]) -> list[Any]:
    return [_operand(args)[d] for d in args["dim"]]


def _matrices(dims: tuple[int, ...]) -> Callable[[dict[str, Any]], list[Any]]:
    """The last ``dims`` dims of each tensor; a right-hand side of fewer dims than the matrices may be vectors."""

    def extent(args: dict[str, Any]) -> list[Any]:
        shapes = [_shape(node) for node in list(args.values())[: len(dims)]]
        lasts = [dim - (len(shape) < len(shapes[0])) for dim, shape in zip(dims, shapes, strict=True)]
        return [size for last, shape in zip(lasts, shapes, strict=True) for size in shape[len(shape) - last :]]

    return extent


_EXTENTS: dict[str, Callable[[dict[str, Any]], list[Any]]] = {
    **{f"bicompile.{name}": _inner for name in "mm mm_continued bmm addmm baddbmm grouped_mm scaled_mm".split()},
    **{f"bicompile.{name}": _of_factors for name in ("mm_windows", "mm_windows_transposed")},
    **{
        f"bicompile.{name}": _over_dims
        for name in (
            "sum mean prod amax amin var vector_norm logsumexp sum_square mean_square softmax "
            "softmax_backward softmax_statistics log_probability cumsum cumprod logcumsumexp"
        ).split()
    },
    "bicompile.linear_log_probability": _inner_and_classes,
    "bicompile.linear_log_probability_backward": _inner_classes_and_rows,
    "bicompile.rms_norm": lambda args: [_shape(args["x"])[-1]],
    "bicompile.layer_norm": _normalised_dims,
    "bicompile.layer_norm_backward": _normalised_dims,
    "bicompile.layer_norm_backward_params": _rows_of_norm,
    "bicompile.group_norm": _group,
    "bicompile.group_norm_backward": _group,
    "bicompile.group_norm_backward_params": _all_but_channels,
    **{f"bicompile.{name}": _matrices(dims) for name, dims in SAMPLE_DIMS.items()},
    **{f"bicompile.{name}": _transformed for name in TRANSFORMS},
    "bicompile.mask_rows": lambda args: [_shape(args["mask"])[-1]],
    "bicompile.sdpa": _keys,
    "bicompile.sdpa_backward": _keys_and_queries,
    **dict.fromkeys(["bicompile.index_add", "bicompile.scatter_add", "bicompile.scatter_reduce"], _scattered),
    "bicompile.index_put_accumulate": _indexed,
    "bicompile.embedding_dense_backward": _embedded,
    # Exact, but a choice among rows of the batch depends on the batch all the same.
    **{
        f"aten.{name}": _over_dims
        for name in (
            "all any argmax argmin max min median nanmedian amax amin cummax cummin equal sum prod cumsum"
        ).split()
    },
    **dict.fromkeys(["aten.sort", "aten.topk", "bicompile.topk", "aten.kthvalue", "aten.mode"], _last_dim),
}
