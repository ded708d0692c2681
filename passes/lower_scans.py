"""Send cumulative sums, products and log-sum-exps to the scan lowerings.

Before::

    cumsum: "f32[s0, 9]" = torch.ops.aten.cumsum.default(x, 1)

After::

    cumsum: "f32[s0, 9]" = torch.ops.bicompile.cumsum.default(x, 1, torch.float32)

Left alone: scans of integers, which are exact, and cummax and cummin, which only choose.  A scan of numbers into an
integer dtype becomes one of integers.
Numerics: changed (ascending, one by one, see ``lowering.scan.order``).  Shape, dtype and strides: unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from .rewriting import Replacement, converted, into_integers, is_real, lower_by_rules, value

aten = torch.ops.aten
bicompile = torch.ops.bicompile


def _scan(op: OpOverload, args: dict[str, Any]) -> Replacement | None:
    dtype = args["dtype"] or value(args["self"]).dtype
    if not dtype.is_floating_point:
        return into_integers(op, args)
    x = args["self"] if is_real(args["self"]) else converted(args["self"], dtype)
    target = bicompile.cumsum.default if op is aten.cumsum.default else bicompile.cumprod.default
    return Replacement(target, (x, args["dim"], dtype))


def _logcumsumexp(op: OpOverload, args: dict[str, Any]) -> Replacement | None:
    if not is_real(args["self"]):
        return None
    return Replacement(bicompile.logcumsumexp.default, (args["self"], args["dim"]))


RULES = {
    aten.cumsum.default: _scan,
    aten.cumprod.default: _scan,
    aten.logcumsumexp.default: _logcumsumexp,
}


def lower_scans_pass(gm: GraphModule) -> PassResult:
    """Replace every floating-point scan in ``gm``, in place; say whether there was one."""
    return lower_by_rules(gm, RULES)
