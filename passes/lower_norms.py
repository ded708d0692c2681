"""Send layer and group normalisation, forward and backward, to the norm lowerings.

Before::

    native_layer_norm = torch.ops.aten.native_layer_norm.default(x, [576], weight, bias, 1e-05)
    getitem: "f32[s0, 7, 576]" = native_layer_norm[0]

After::

    layer_norm = torch.ops.bicompile.layer_norm.default(x, 1, weight, bias, 1e-05)
    getitem: "f32[s0, 7, 576]" = layer_norm[0]

The backward splits into the gradient of the row, which is batch-invariant, and the gradients of weight and bias, which
sum over the rows in one fixed order; those that nobody asked for are not computed.
Numerics: changed (see ``lowering.norm.order``).  Shape, dtype and strides: unchanged.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from .rewriting import Replacement, arguments, call, is_real, lower_by_rules, replace_outputs, value

aten = torch.ops.aten
bicompile = torch.ops.bicompile


def _layer_norm(op: OpOverload, args: dict[str, Any]) -> Replacement | None:
    if not is_real(args["input"]):
        return None
    dims = len(args["normalized_shape"])
    return Replacement(bicompile.layer_norm.default, (args["input"], dims, args["weight"], args["bias"], args["eps"]))


def _group_norm(op: OpOverload, args: dict[str, Any]) -> Replacement | None:
    if not is_real(args["input"]):
        return None
    return Replacement(
        bicompile.group_norm.default, (args["input"], args["group"], args["weight"], args["bias"], args["eps"])
    )


RULES = {
    aten.native_layer_norm.default: _layer_norm,
    aten.native_group_norm.default: _group_norm,
}


def backward_rule(op: OpOverload, args: dict[str, Any]) -> list[Replacement | None]:
    """The gradients of input, weight and bias; None for those that ``output_mask`` does not ask for."""
    if op is aten.native_layer_norm_backward.default:
        split = len(args["normalized_shape"])
        rows, params = bicompile.layer_norm_backward.default, bicompile.layer_norm_backward_params.default
    else:
        split = args["group"]
        rows, params = bicompile.group_norm_backward.default, bicompile.group_norm_backward_params.default
    shared = (args["grad_out"], args["input"], split, args["mean"], args["rstd"])
    wanted, weight = args["output_mask"], args["weight"]
    parameter = next((p for p in (weight, args.get("bias")) if p is not None), args["input"])
    dtype = value(parameter).dtype
    return [
        Replacement(rows, (*shared, weight)) if wanted[0] else None,
        Replacement(params, (*shared, dtype), output=0) if wanted[1] else None,
        Replacement(params, (*shared, dtype), output=1) if wanted[2] else None,
    ]


BACKWARD_RULES = {
    aten.native_layer_norm_backward.default: backward_rule,
    aten.native_group_norm_backward.default: backward_rule,
}


def _lower_backward(node: Node, rule: Callable[..., list[Replacement | None]]) -> None:
    """Replace one backward node; two gradients of one op share its call."""
    outputs: list[Node | None] = []
    calls: dict[OpOverload, Node] = {}
    with node.graph.inserting_before(node):
        for replacement in rule(node.target, arguments(node)):
            if replacement is None:
                outputs.append(None)
                continue
            target = replacement.target
            new = calls[target] if target in calls else call(node, target, *replacement.args)
            calls[target] = new
            if replacement.output is not None:
                new = call(node, operator.getitem, new, replacement.output)
            outputs.append(new)
    replace_outputs(node, outputs)


def lower_norms_pass(gm: GraphModule) -> PassResult:
    """Replace every layer and group norm in ``gm``, in place; say whether there was one."""
    modified = lower_by_rules(gm, RULES).modified
    for target, rule in BACKWARD_RULES.items():
        for node in gm.graph.find_nodes(op="call_function", target=target):
            if is_real(node.args[0]):
                _lower_backward(node, rule)
                modified = True
    if modified:
        gm.graph.lint()
        gm.recompile()
    return PassResult(gm, modified)
