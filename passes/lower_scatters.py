"""Send sums into indexed destinations to the scatter lowerings: no atomics, one ascending order.

Before::

    index_put: "f32[100, 8]" = torch.ops.aten.index_put.default(zeros, [ids], grad, True)

After::

    index_put: "f32[100, 8]" = torch.ops.bicompile.index_put_accumulate.default(zeros, [ids], grad)

Left alone: writes that do not accumulate (``bicompile.writes``), and integer sums, which are exact.
Numerics: changed (see ``lowering.scatter.order``).  Shape, dtype and strides: unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from .rewriting import Replacement, is_real, lower_by_rules

aten = torch.ops.aten
bicompile = torch.ops.bicompile


def _index_put(op: OpOverload, args: dict[str, Any]) -> Replacement | None:
    if not args["accumulate"] or not is_real(args["self"]):
        return None
    return Replacement(bicompile.index_put_accumulate.default, (args["self"], args["indices"], args["values"]))


def _index_add(op: OpOverload, args: dict[str, Any]) -> Replacement | None:
    if not is_real(args["self"]):
        return None
    return Replacement(
        bicompile.index_add.default,
        (args["self"], args["dim"], args["index"], args["source"], float(args["alpha"])),
    )


def _scatter_add(op: OpOverload, args: dict[str, Any]) -> Replacement | None:
    if not is_real(args["self"]):
        return None
    return Replacement(bicompile.scatter_add.default, (args["self"], args["dim"], args["index"], args["src"]))


def _scatter_reduce(op: OpOverload, args: dict[str, Any]) -> Replacement | None:
    if not is_real(args["self"]):
        return None
    return Replacement(
        bicompile.scatter_reduce.default,
        (args["self"], args["dim"], args["index"], args["src"], args["reduce"], args["include_self"]),
    )


def _scatter_with_step(op: OpOverload, args: dict[str, Any]) -> Replacement | None:
    if not is_real(args["self"]):
        return None
    reduce = {"add": "sum", "multiply": "prod"}[args["reduce"]]
    target = bicompile.scatter_reduce.default
    return Replacement(target, (args["self"], args["dim"], args["index"], args["src"], reduce, True))


def _embedding_backward(op: OpOverload, args: dict[str, Any]) -> Replacement | None:
    return Replacement(bicompile.embedding_dense_backward.default, tuple(args.values()))


RULES = {
    aten.index_put.default: _index_put,
    aten._unsafe_index_put.default: _index_put,
    aten.index_add.default: _index_add,
    aten.scatter_add.default: _scatter_add,
    aten.scatter_reduce.two: _scatter_reduce,
    aten.scatter.reduce: _scatter_with_step,
    aten.embedding_dense_backward.default: _embedding_backward,
}


def lower_scatters_pass(gm: GraphModule) -> PassResult:
    """Replace every accumulating scatter in ``gm``, in place; say whether there was one."""
    return lower_by_rules(gm, RULES)
