"""Send linear algebra and Fourier transforms to PyTorch's own kernels, one sample at a time.

Before::

    inverse: "f32[s0, 3, 3]" = torch.ops.aten.linalg_inv_ex.default(x)[0]

After::

    inverse: "f32[s0, 3, 3]" = torch.ops.bicompile.linalg_inv_ex.default(x)[0]

Left alone: tensors on a GPU, where nobody knows the kernels' orders.
Numerics: those of PyTorch's kernels for one sample (see ``lowering.samples.op``).  Shape, dtype and strides: unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from bicompile.lowering.samples.op import OPS

from .rewriting import Replacement, Rule, lower_by_rules, value

aten = torch.ops.aten
bicompile = torch.ops.bicompile


def _one_by_one(op: OpOverload, args: dict[str, Any]) -> Replacement | None:
    if any(value(x).is_cuda for x in args.values() if isinstance(x, (Tensor, Node))):
        return None
    names = [argument.name for argument in op._schema.arguments if not argument.kwarg_only]
    keywords = {name: given for name, given in args.items() if name not in names}
    target = getattr(bicompile, op._opname).default
    return Replacement(target, tuple(args[name] for name in names), kwargs=keywords)


RULES: dict[OpOverload, Rule] = {getattr(aten, name).default: _one_by_one for name in OPS}


def lower_samples_pass(gm: GraphModule) -> PassResult:
    """Replace every such op in ``gm``, in place; say whether there was one."""
    return lower_by_rules(gm, RULES)
