"""Compute an RMS norm on a GPU in one kernel, where the graph has it as a mean square and what follows pointwise.

Before::

    mean_square: "f32[s0, 1]" = torch.ops.bicompile.mean_square.default(x, [-1], True, torch.float32)
    add: "f32[s0, 1]" = torch.ops.aten.add.Tensor(mean_square, 1e-06)
    rsqrt: "f32[s0, 1]" = torch.ops.aten.rsqrt.default(add)
    wide: "f32[s0, 4096]" = torch.ops.prims.convert_element_type.default(x, torch.float32)    # x: "bf16[s0, 4096]"
    mul: "f32[s0, 4096]" = torch.ops.aten.mul.Tensor(wide, rsqrt)
    narrow: "bf16[s0, 4096]" = torch.ops.prims.convert_element_type.default(mul, torch.bfloat16)
    mul_1: "bf16[s0, 4096]" = torch.ops.aten.mul.Tensor(weight, narrow)

After::

    rms_norm: "bf16[s0, 4096]" = torch.ops.bicompile.rms_norm.default(x, weight, 1e-06, True)

So too where the weight is applied before the rounding, and where there is no weight or no rounding.
Left alone: other devices, rows longer than one program holds, and norms whose intermediate results have other users,
as they have where a backward pass needs them.
Numerics, shape, dtype: unchanged, bit for bit.  Strides: contiguous, as of the product of a contiguous ``x``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from bicompile.lowering.reduction.order import gpu_order_for

from .rewriting import call, is_real, like_before, prims, value

aten = torch.ops.aten
bicompile = torch.ops.bicompile

_ADD = (aten.add.Tensor, aten.add.Scalar)


def fuse_rms_norms_pass(gm: GraphModule) -> PassResult:
    """Replace every RMS norm in ``gm`` that one kernel can do, in place; say whether there was one."""
    fused = 0
    for mean in gm.graph.find_nodes(op="call_function", target=bicompile.mean_square.default):
        if not _is_over_rows(mean):
            continue
        if (scaled := _scaled(mean)) is None:
            continue
        last, weight, round_first = _to_the_end(scaled, mean.args[0])
        if value(last).dtype != value(mean.args[0]).dtype:
            continue
        eps = next(iter(mean.users)).args[1]
        with gm.graph.inserting_before(last):
            new = call(last, bicompile.rms_norm.default, mean.args[0], weight, eps, round_first)
            last.replace_all_uses_with(like_before(last, new, value(last)))
        gm.graph.erase_node(last)
        fused += 1
    if fused:
        gm.graph.eliminate_dead_code()
        gm.graph.lint()
        gm.recompile()
    return PassResult(gm, modified=fused > 0)


def _is_over_rows(mean: Node) -> bool:
    """Is it over the last dim, of a length that one program holds, on a GPU?"""
    x, dims, keepdim, dtype = mean.args
    if not is_real(x):
        return False
    val = value(x)
    n = val.shape[-1] if val.dim() else 0
    return (
        val.device.type == "cuda"
        and keepdim is True
        and dtype == torch.float32
        and val.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and list(dims) in ([-1], [val.dim() - 1])
        and isinstance(n, int)
        and 0 < n <= gpu_order_for(n, val.dtype).section
    )


def _scaled(mean: Node) -> Node | None:
    """The product ``x * rsqrt(mean + eps)`` in float32, if that is all that becomes of ``mean``."""
    add = _only_user(
        mean, lambda user: user.target in _ADD and user.args[0] is mean and isinstance(user.args[1], float)
    )
    root = add and _only_user(add, lambda user: user.target is aten.rsqrt.default)
    product = root and _only_user(root, lambda user: user.target is aten.mul.Tensor)
    if not root or not product or add is None or add.kwargs:
        return None
    wide = product.args[1] if product.args[0] is root else product.args[0]
    return product if isinstance(wide, Node) and _is_widened(wide, mean.args[0]) else None


def _is_widened(wide: Node, x: object) -> bool:
    """Is ``wide`` the node ``x``, in float32?"""
    if value(wide).dtype != torch.float32:
        return False
    return wide is x or (wide.target is prims.convert_element_type.default and wide.args[0] is x)


def _to_the_end(scaled: Node, x: object) -> tuple[Node, Node | None, bool]:
    """The last node of the norm, its weight, and whether the product is rounded before the weight comes in."""
    last, weight, round_first = scaled, None, False
    dtype = value(x).dtype
    if (rounded := _rounding(scaled, dtype)) is not None:
        last, round_first = rounded, True
    if (found := _weighting(last, round_first, dtype)) is not None:
        last, weight = found
        if not round_first and (rounded := _rounding(last, dtype)) is not None:
            last = rounded
    return last, weight, round_first


def _rounding(node: Node, dtype: torch.dtype) -> Node | None:
    """The conversion of ``node`` to ``dtype``, if that is all that becomes of it."""
    return _only_user(node, lambda user: user.target is prims.convert_element_type.default and user.args[1] == dtype)


def _weighting(node: Node, rounded: bool, dtype: torch.dtype) -> tuple[Node, Node] | None:
    """The product of ``node`` and a weight, one number for each element of a row, if that is all that becomes of it."""
    product = _only_user(node, lambda user: user.target is aten.mul.Tensor)
    if product is None:
        return None
    other = product.args[1] if product.args[0] is node else product.args[0]
    if not is_real(other) or other is node:
        return None
    weight = value(other)
    same_row = weight.dim() == 1 and weight.shape[0] == value(node).shape[-1] and weight.device == value(node).device
    exact = weight.dtype == dtype if rounded else weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return (product, other) if same_row and exact else None


def _only_user(node: Node, wanted: Callable[[Node], bool]) -> Node | None:
    """The node's one user, if it has one and that is ``wanted``."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].op == "call_function" and wanted(users[0]) else None
