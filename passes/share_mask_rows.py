"""Read a mask once where several attentions on a GPU share it.

Before, in every layer::

    sdpa = torch.ops.bicompile.sdpa.default(q, k, v, mask, False, 0.125)    # mask: "b8[s0, 1, s1, s2]"

After::

    rows: "i32[3, s0, 1, s1]" = torch.ops.bicompile.mask_rows.default(mask, False)
    sdpa = torch.ops.bicompile.sdpa.default(q, k, v, mask, False, 0.125, rows, None, 0.0)
    sdpa_1 = torch.ops.bicompile.sdpa.default(q_1, k_1, v_1, mask, False, 0.125, rows, None, 0.0)

Left alone: other devices, masks that one attention uses, and those that are broadcast over queries or keys.
Numerics, shapes, dtypes and strides: unchanged; the rows are integers that ``sdpa`` would find itself.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.passes.infra.pass_base import PassResult

from .rewriting import arguments, call, value

bicompile = torch.ops.bicompile


def share_mask_rows_pass(gm: GraphModule) -> PassResult:
    """Read every mask that several attentions in ``gm`` use once, in place; say whether there was one."""
    attentions: dict[tuple[Node, bool], list[Node]] = {}
    for node in gm.graph.find_nodes(op="call_function", target=bicompile.sdpa.default):
        args = arguments(node)
        mask = args["mask"]
        if mask is not None and value(mask).is_cuda and _is_whole(mask, args["q"], args["k"]):
            attentions.setdefault((mask, args["is_causal"]), []).append(node)
    shared = {key: nodes for key, nodes in attentions.items() if len(nodes) > 1}
    for (mask, is_causal), nodes in shared.items():
        with gm.graph.inserting_before(nodes[0]):
            rows = call(nodes[0], bicompile.mask_rows.default, mask, is_causal)
        for node in nodes:
            node.args, node.kwargs = tuple({**arguments(node), "rows": rows}.values()), {}
    if shared:
        gm.graph.lint()
        gm.recompile()
    return PassResult(gm, modified=bool(shared))


def _is_whole(mask: Node, q: Node, k: Node) -> bool:
    """Has the mask a row for every query and a column for every key?"""
    shape, whole = value(mask).shape[-2:], (value(q).shape[2], value(k).shape[2])
    return len(shape) == 2 and all(statically_known_true(a == b) for a, b in zip(shape, whole, strict=True))
