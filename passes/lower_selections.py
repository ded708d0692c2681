"""Break ties by place: of equal elements the first, where PyTorch's GPU kernels take any.

Before::

    topk = torch.ops.aten.topk.default(x, 5)    # x: "f32[s0, 64]", on a GPU

After::

    topk = torch.ops.bicompile.topk.default(x, 5, -1, True)

Sorting becomes stable by decomposition (``bicompile.decompositions``): its order is an argument of the op.
Left alone: tensors on the CPU, whose kernels treat each row alone.
Numerics: exact, before and after.  Shape, dtype and strides: unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from .rewriting import Replacement, lower_by_rules, value

aten = torch.ops.aten
bicompile = torch.ops.bicompile


def _topk(op: OpOverload, args: dict[str, Any]) -> Replacement | None:
    x = value(args["self"])
    if x.device.type == "cpu":
        return None
    dim = args["dim"] % max(x.dim(), 1)
    return Replacement(bicompile.topk.default, (args["self"], args["k"], dim, bool(args["largest"])))


RULES = {aten.topk.default: _topk}


def lower_selections_pass(gm: GraphModule) -> PassResult:
    """Replace every ``topk`` on a GPU in ``gm``, in place; say whether there was one."""
    return lower_by_rules(gm, RULES)
