"""Send matrix products to the matmul lowerings.

Before::

    addmm: "bf16[s0, 64]" = torch.ops.aten.addmm.default(bias, x, weight)    # x: "bf16[s0, 576]"

After::

    addmm: "bf16[s0, 64]" = torch.ops.bicompile.addmm.default(bias, x, weight, 1.0, 1.0)

The same for ``mm``, ``bmm`` and ``baddbmm``; everything else that contracts (``linear``, ``matmul``, ``einsum``,
``mv``, ``dot``) reaches this pass as one of the four.  ``_grouped_mm`` of mixture-of-experts layers, the op that
transformers puts in its place, and ``_scaled_mm`` of 8-bit floats have ops of their own.
Left alone: integer products, which are exact in any order; 8-bit products whose result is scaled, or whose scales
belong to blocks.
Numerics: changed (one order for all four, see ``lowering.matmul.order``).  Shape, dtype and strides: unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.passes.infra.pass_base import PassResult

from .rewriting import Replacement, Rule, is_real, lower_by_rules, value

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


def _grouped(op: OpOverload, args: dict[str, Any]) -> Replacement | None:
    a, b, ends = args["self"], args["mat2"], args["offs"]
    if args["bias"] is not None or args["out_dtype"] not in (None, value(a).dtype):
        return None
    if ends is None:
        return Replacement(bicompile.bmm.default, (a, b))
    return Replacement(bicompile.grouped_mm.default, (a, b, ends))


def _grouped_by_transformers(op: OpOverload, args: dict[str, Any]) -> Replacement | None:
    return Replacement(bicompile.grouped_mm.default, (args["input"], args["weight"], args["offs"]))


def _scaled(op: OpOverload, args: dict[str, Any]) -> Replacement | None:
    a, b, scales = args["self"], args["mat2"], (args["scale_a"], args["scale_b"])
    sizes = (value(a).shape[0], value(b).shape[1])
    for scale, size in zip(map(value, scales), sizes, strict=True):
        if scale.dtype != torch.float32 or not (scale.numel() == 1 or statically_known_true(scale.numel() == size)):
            return None
    if args["scale_result"] is not None or args["out_dtype"] not in _WIDE:
        return None
    return Replacement(bicompile.scaled_mm.default, (a, b, *scales, args["bias"], args["out_dtype"]))


_WIDE = (torch.bfloat16, torch.float16, torch.float32)

RULES: dict[OpOverload, Rule] = {
    aten.mm.default: _product,
    aten.bmm.default: _product,
    aten.addmm.default: _product_and_sum,
    aten.baddbmm.default: _product_and_sum,
    aten._grouped_mm.default: _grouped,
    aten._scaled_mm.default: _scaled,
}


def lower_matmuls_pass(gm: GraphModule) -> PassResult:
    """Replace every floating-point matrix product in ``gm``, in place; say whether there was one."""
    return lower_by_rules(gm, {**RULES, **_rules_of_transformers()})


def _rules_of_transformers() -> dict[OpOverload, Rule]:
    """The rule for the op that transformers registers, once it is imported."""
    packet = getattr(torch.ops.transformers, "grouped_mm_fallback", None)
    return {} if packet is None else {packet.default: _grouped_by_transformers}
