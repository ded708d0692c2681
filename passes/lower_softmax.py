"""Send softmax, log_softmax and their backward to the softmax lowerings.

Before::

    _softmax: "f32[s0, 9]" = torch.ops.aten._softmax.default(x, -1, False)

After::

    softmax: "f32[s0, 9]" = torch.ops.bicompile.softmax.default(x, -1, False, torch.float32)

Numerics: changed (one order, any dim, see ``lowering.softmax.order``).  Shape, dtype and strides: unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from .rewriting import Replacement, is_real, lower_by_rules, value

aten = torch.ops.aten
prims = torch.ops.prims
bicompile = torch.ops.bicompile


def _softmax(op: OpOverload, args: dict[str, Any]) -> Replacement | None:
    if not is_real(args["self"]):
        return None
    log = op is aten._log_softmax.default
    dtype = torch.float32 if args["half_to_float"] else value(args["self"]).dtype
    return Replacement(bicompile.softmax.default, (args["self"], args["dim"], log, dtype))


def _safe_softmax(op: OpOverload, args: dict[str, Any]) -> Replacement | None:
    """Like softmax, with zeros where every entry of a row is -inf."""
    if not is_real(args["self"]):
        return None
    dtype = args["dtype"] or value(args["self"]).dtype
    return Replacement(bicompile.softmax.default, (args["self"], args["dim"], False, dtype, True))


def _softmax_backward(op: OpOverload, args: dict[str, Any]) -> Replacement | None:
    if not is_real(args["grad_output"]):
        return None
    log = op is aten._log_softmax_backward_data.default
    return Replacement(
        bicompile.softmax_backward.default,
        (args["grad_output"], args["output"], args["dim"], log, args["input_dtype"]),
    )


RULES = {
    aten._softmax.default: _softmax,
    aten._log_softmax.default: _softmax,
    aten._safe_softmax.default: _safe_softmax,
    aten._softmax_backward_data.default: _softmax_backward,
    aten._log_softmax_backward_data.default: _softmax_backward,
}


def _of_narrow(op: OpOverload, args: dict[str, Any]) -> Replacement | None:
    """Statistics of scores that were only widened for them: of the narrow ones, the same bits and half the memory."""
    x = args["x"]
    if not isinstance(x, Node) or x.target is not prims.convert_element_type.default:
        return None
    narrow = x.args[0]
    if value(x).dtype != torch.float32 or value(narrow).dtype not in (torch.bfloat16, torch.float16):
        return None
    return Replacement(op, (narrow, args["dim"]))


def lower_softmax_pass(gm: GraphModule) -> PassResult:
    """Replace every softmax in ``gm``, in place; say whether there was one."""
    return lower_by_rules(gm, {**RULES, bicompile.softmax_statistics.default: _of_narrow})
