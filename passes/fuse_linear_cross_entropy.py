"""Compute the cross entropy of a linear layer in chunks, where nothing else asks for the scores.

Before, in Dynamo's graph, above autograd::

    scores = torch._C._nn.linear(hidden, weight, None)                    # hidden: "bf16[4, 4096, 2048]"
    wide = scores.float()
    flat = wide.view(-1, 151936)
    loss = torch.nn.functional.cross_entropy(flat, target, None, None, -100, None, "mean", 0.0)

After::

    flat = hidden.flatten(0, -2)
    loss = torch.ops.bicompile.linear_cross_entropy.default(flat, weight, target, None, None, 1, -100, torch.float32)

So too with a bias and class weights.
Left alone: scores that are used otherwise, or fit in one chunk; other computations on them; a part of their rows, since
the sums for ``weight`` run over all; smoothed labels and targets that are no classes; and whatever may have changed a
tensor, or how gradients and dtypes go, between layer and loss.
Numerics, shape, dtype: unchanged, bit for bit, also of the gradients.  So it may follow the size of the batch.
"""

from __future__ import annotations

import inspect
import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch._subclasses import FakeTensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.passes.infra.pass_base import PassResult

from bicompile.lowering.matmul.op import FLOATS
from bicompile.lowering.softmax import linear_cross_entropy
from bicompile.lowering.softmax.op import statistics_dtype

_LINEAR = torch._C._nn.linear
_LOSS = inspect.signature(F.cross_entropy)
_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
_CONVERSIONS = ("float", "to", "type", "contiguous")
_RESHAPES = ("view", "reshape", "flatten")


@dataclass(frozen=True)
class _Match:
    """A linear layer, what moves or converts its scores, first to last, and the arguments of the loss."""

    linear: Node
    moves: list[Node]
    loss: Node
    arguments: dict[str, Any]


def fuse_linear_cross_entropy_pass(gm: GraphModule) -> PassResult:
    """Replace every match in ``gm``, a graph of Dynamo's, and in the graphs within, in place; say if there was one."""
    fused = 0
    for module in gm.modules():
        if not isinstance(module, GraphModule):
            continue
        losses = module.graph.find_nodes(op="call_function", target=F.cross_entropy)
        matches = [match for node in losses if (match := _match(node)) is not None]
        for match in matches:
            _fuse(match)
        if matches:
            module.graph.lint()
            module.recompile()
        fused += len(matches)
    return PassResult(gm, modified=fused > 0)


def _match(loss: Node) -> _Match | None:
    bound = _LOSS.bind(*loss.args, **loss.kwargs)
    bound.apply_defaults()
    arguments = bound.arguments
    moves: list[Node] = []
    node = arguments["input"]
    while isinstance(node, Node) and len(node.users) == 1 and node.target is not _LINEAR and _keeps_scores(node):
        moves.insert(0, node)
        node = node.args[0]
    if not isinstance(node, Node) or len(node.users) != 1 or node.target is not _LINEAR:
        return None
    match = _Match(node, moves, loss, arguments)
    return match if _can_fuse(match) and _should_fuse(match) else None


def _can_fuse(match: _Match) -> bool:
    """Whether the op computes this loss, to the bit."""
    given = match.arguments
    plain = given["size_average"] is given["reduce"] is None and _is_zero(given["label_smoothing"])
    if not plain or given["reduction"] not in _REDUCTIONS or not isinstance(given["ignore_index"], int):
        return False
    hidden, weight, bias = _layer(match.linear)
    nodes = [
        n for n in (hidden, weight, bias, match.linear, *match.moves, given["target"], match.loss) if n is not None
    ]
    values = [_example(n) for n in nodes]
    if any(v is None for v in values) or len({v.device for v in values if v is not None}) != 1:
        return False
    scores, last, target = _value(match.linear), _value((match.moves or [match.linear])[-1]), _value(given["target"])
    allowed = {scores.dtype, statistics_dtype(scores.dtype)}
    return (
        scores.dtype in FLOATS
        and scores.dim() >= 2
        and all(_value(n).dtype in allowed for n in match.moves)
        and _value(match.loss).dtype in allowed
        and last.dim() == 2
        and target.dim() == 1
        and not any(map(_may_interfere, _between(match.linear, match.loss)))
    )


def _should_fuse(match: _Match) -> bool:
    """Whether the scores are more than one chunk, in the call that is compiled for."""
    scores = _value(match.linear)
    size = scores.numel()
    hint = size if isinstance(size, int) else size.node.hint
    return hint is None or hint * scores.itemsize > linear_cross_entropy.CHUNK_BYTES


def _fuse(match: _Match) -> None:
    graph, given = match.loss.graph, match.arguments
    hidden, weight, bias = _layer(match.linear)
    dtype = _value(match.linear).dtype
    with graph.inserting_before(match.loss):
        rows = hidden
        if _value(hidden).dim() > 2:
            rows = graph.call_method("flatten", (hidden, 0, -2))
        # Autocast converts what it gives to a linear layer.
        layer = [
            now if n is None or _value(n).dtype == dtype else graph.call_method("to", (now, dtype))
            for n, now in ((hidden, rows), (weight, weight), (bias, bias))
        ]
        new = graph.call_function(
            torch.ops.bicompile.linear_cross_entropy.default,
            (layer[0], layer[1], given["target"], layer[2], given["weight"]),
            {
                "reduction": _REDUCTIONS[given["reduction"]],
                "ignore_index": given["ignore_index"],
                "dtype": _value(match.loss).dtype,
            },
        )
    new.meta = dict(match.loss.meta)
    match.loss.replace_all_uses_with(new)
    for node in (match.loss, *reversed(match.moves), match.linear):
        graph.erase_node(node)


def _layer(linear: Node) -> tuple[Node, Node, Node | None]:
    """Input, weight and bias."""
    names = ("input", "weight", "bias")
    given = dict(zip(names, linear.args, strict=False)) | dict(linear.kwargs)
    return given["input"], given["weight"], given.get("bias")


def _keeps_scores(node: Node) -> bool:
    """Whether the node converts scores, or writes their rows into one matrix."""
    if not node.args or not isinstance(node.args[0], Node):
        return False
    old, new = _example(node.args[0]), _example(node)
    if old is None or new is None or old.dim() < 2:
        return False
    if node.op == "call_method" and node.target in _CONVERSIONS:
        return True
    flattens = node.op == "call_method" and node.target in _RESHAPES and new.dim() == 2
    return flattens and statically_known_true(new.shape[1] == old.shape[-1])


def _is_zero(number: Any) -> bool:
    """Whether a number is 0; one that Dynamo took for dynamic is held to that by a guard."""
    if isinstance(number, Node):
        number = number.meta.get("example_value")
        if not isinstance(number, torch.SymFloat) or number.node.hint is None:
            return False
    return bool(number == 0.0)


def _between(first: Node, last: Node) -> list[Node]:
    nodes = list(first.graph.nodes)
    return nodes[nodes.index(first) + 1 : nodes.index(last)]


def _may_interfere(node: Node) -> bool:
    """Whether the node may write to a tensor, or switch autograd or autocast: the layer must then stay before it."""
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    if node.op == "call_method":
        return str(node.target).endswith("_")
    target: Any = node.target
    if isinstance(target, (OpOverload, OpOverloadPacket)):
        overloads = [target] if isinstance(target, OpOverload) else [getattr(target, o) for o in target.overloads()]
        return any(overload._schema.is_mutable for overload in overloads)
    if node.op != "call_function" or isinstance(target, HigherOrderOperator):
        return True
    name, module = target.__name__, target.__module__ or ""
    if module == "_operator":
        return name in ("setitem", "delitem") or (name.startswith("i") and hasattr(operator, name[1:]))
    known = module.split(".")[0] in ("torch", "_operator", "builtins", "math")
    writes = name.endswith("_") or "out" in node.kwargs or bool(node.kwargs.get("inplace"))
    # Private names are the switches; a True may be an inplace that has no name here.
    return not known or writes or name.startswith("_") or any(argument is True for argument in node.args)


def _example(node: Any) -> Tensor | None:
    """The fake tensor that Dynamo knows the node by; None for anything else, such as a tensor inside of vmap."""
    value = node.meta.get("example_value") if isinstance(node, Node) else None
    return value if type(value) is FakeTensor else None


def _value(node: Node) -> Tensor:
    value = node.meta["example_value"]
    assert isinstance(value, Tensor)
    return value
