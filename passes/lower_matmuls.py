"""Send matrix products to the matmul lowerings.

Before::

    addmm: "bf16[s0, 64]" = torch.ops.aten.addmm.default(bias, x, weight)    # x: "bf16[s0, 576]"

After::

    addmm: "bf16[s0, 64]" = torch.ops.bicompile.addmm.default(bias, x, weight, 1.0, 1.0)

The same for ``mm``, ``bmm`` and ``baddbmm``; everything else that contracts (``linear``, ``matmul``, ``einsum``,
``mv``, ``dot``) reaches this pass as one of the four.
Left alone: integer products, which are exact in any order.
Numerics: changed (one order for all four, see ``lowering.matmul.order``).  Shape, dtype and strides: unchanged.
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


def _product(op: OpOverload, args: dict[str, Any]) -> Replacement | None:
    if not is_real(args["self"]):
        return None
    target = bicompile.mm.default if op is aten.mm.default else bicompile.bmm.default
    return Replacement(target, (args["self"], args["mat2"]))


def _product_and_sum(op: OpOverload, args: dict[str, Any]) -> Replacement | None:
    if not is_real(args["self"]):
        return None
    if op is aten.addmm.default:
        target, factors = bicompile.addmm.default, (args["mat1"], args["mat2"])
    else:
        target, factors = bicompile.baddbmm.default, (args["batch1"], args["batch2"])
    return Replacement(target, (args["self"], *factors, float(args["beta"]), float(args["alpha"])))


RULES = {
    aten.mm.default: _product,
    aten.bmm.default: _product,
    aten.addmm.default: _product_and_sum,
    aten.baddbmm.default: _product_and_sum,
}


def lower_matmuls_pass(gm: GraphModule) -> PassResult:
    """Replace every floating-point matrix product in ``gm``, in place; say whether there was one."""
    return lower_by_rules(gm, RULES)
