"""Replace nodes by rules: what every lowering pass has in common.

A rule is a function from an op and its arguments to the ``Replacement`` that computes the same value, or ``None`` to
leave the op alone.  The arguments hold nodes where a graph is rewritten and tensors where ``bicompile.eager()`` runs
the op at once; a rule asks ``value`` for what it needs of either, and so serves both.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.passes.infra.pass_base import PassResult
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten
prims = torch.ops.prims


@dataclass(frozen=True)
class Replacement:
    """``target(*args, **kwargs)``, whose value stands for the replaced op's.

    ``output`` picks one of several results; None where the replaced op returns as many as the target.
    """

    target: OpOverload
    args: tuple[Any, ...]
    output: int | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)


Rule = Callable[[OpOverload, dict[str, Any]], Replacement | None]


def lower_by_rules(gm: GraphModule, rules: Mapping[OpOverload, Rule]) -> PassResult:
    """Apply ``rules`` to every matching node of ``gm``, in place; say whether there was one."""
    replaced = 0
    for target, rule in rules.items():
        for node in gm.graph.find_nodes(op="call_function", target=target):
            with gm.graph.inserting_before(node):
                if (replacement := rule(target, arguments(node))) is None:
                    continue
                new = call(node, replacement.target, *replacement.args, **replacement.kwargs)
                _put_in_place(node, new, replacement.output)
            replaced += 1
    if replaced:
        gm.graph.lint()
        gm.recompile()
    return PassResult(gm, modified=replaced > 0)


def _put_in_place(node: Node, new: Node, output: int | None) -> None:
    """Let ``new``, or one of its results, stand for ``node``."""
    if output is None and not isinstance(node.meta["val"], Tensor):
        count = len(node.meta["val"])
        _replace_outputs(node, [call(node, operator.getitem, new, index) for index in range(count)])
        return
    if output is not None:
        new = call(node, operator.getitem, new, output)
    node.replace_all_uses_with(like_before(node, new, value(node)))
    node.graph.erase_node(node)


def call(like: Node, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
    """Insert ``target(*args, **kwargs)`` at the graph's insertion point, with source and fake value filled in.

    Args:
        like: the node whose stack trace the new one inherits, so that messages name the user's line.
    """
    graph = like.graph
    new = graph.call_function(target, args, kwargs)
    new.meta = {key: value for key, value in like.meta.items() if key in _INHERITED}
    fake_args, fake_kwargs = tree_map_only(Node, lambda n: n.meta["val"], (args, kwargs))
    with fake_mode_of(like):
        new.meta["val"] = target(*fake_args, **fake_kwargs)
    return new


# Which line of the user's a node comes from; and that Inductor must round this node's half-precision result.
_INHERITED = (
    *("stack_trace", "nn_module_stack", "source_fn_stack", "fwd_nn_module_stack", "fwd_source_fn_stack"),
    *("original_aten", "low_precision_pointwise_barrier"),
)


def fake_mode_of(node: Node) -> Any:
    """The fake tensor mode that the graph was traced in."""
    for candidate in (node, *node.all_input_nodes):
        for leaf in torch.utils._pytree.tree_leaves(candidate.meta.get("val")):
            if isinstance(leaf, torch._subclasses.FakeTensor):
                return leaf.fake_mode
    raise AssertionError(f"no fake tensor around node {node.format_node()}")


def arguments(node: Node) -> dict[str, Any]:
    """The node's arguments by the names of its schema, defaults filled in."""
    assert isinstance(node.target, OpOverload)
    return bind(node.target, node.args, node.kwargs)


def bind(target: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """``args`` and ``kwargs`` by the names of the op's schema, defaults filled in."""
    bound = {}
    for index, argument in enumerate(target._schema.arguments):
        if index < len(args):
            bound[argument.name] = args[index]
        else:
            bound[argument.name] = kwargs.get(argument.name, argument.default_value)
    return bound


def value(x: Node | Tensor) -> Tensor:
    """The tensor itself, or the fake one that stands for the node's result."""
    val = x.meta["val"] if isinstance(x, Node) else x
    assert isinstance(val, Tensor), f"{x} is not one tensor"
    return val


def is_real(x: Any) -> bool:
    """Whether ``x`` is a real floating-point tensor, the kind whose sums depend on their order."""
    val = x.meta.get("val") if isinstance(x, Node) else x
    return isinstance(val, Tensor) and val.is_floating_point()


def converted(x: Any, dtype: torch.dtype) -> Any:
    """``x`` in ``dtype``, through a conversion if it has another; a node's goes to the graph's insertion point."""
    if value(x).dtype == dtype:
        return x
    if isinstance(x, Node):
        return call(x, prims.convert_element_type.default, x, dtype)
    return x.to(dtype)


def into_integers(op: OpOverload, args: Mapping[str, Any]) -> Replacement | None:
    """``op`` with an integer ``dtype``, which is exact: of integers, as torch makes numbers integers before it adds."""
    if not is_real(args["self"]):
        return None
    positional = [converted(args["self"], args["dtype"])]
    keywords = {}
    for argument in op._schema.arguments[1:]:  # Inductor has other names for what torch does not call by name
        if argument.kwarg_only:
            keywords[argument.name] = args[argument.name]
        else:
            positional.append(args[argument.name])
    return Replacement(op, tuple(positional), kwargs=keywords)


def _replace_outputs(node: Node, outputs: Sequence[Node]) -> None:
    """Put ``outputs[i]`` in place of the i-th result of ``node`` and erase it."""
    for user in list(node.users):
        assert user.target is operator.getitem, f"{user.format_node()} takes all results of {node.format_node()}"
        new = outputs[user.args[1]]
        with node.graph.inserting_before(user):
            user.replace_all_uses_with(like_before(user, new, value(user)))
        node.graph.erase_node(user)
    node.graph.erase_node(node)
    for new in outputs:
        if not new.users:
            new.graph.erase_node(new)


def like_before(like: Node, new: Node, old: Tensor) -> Node:
    """``new`` laid out in memory as ``old`` was: later views and the graph's outputs were traced against that."""
    new = converted(new, old.dtype)
    val = value(new)
    assert val.dim() == old.dim(), f"{new.format_node()} is {tuple(val.shape)}, was {tuple(old.shape)}"
    if all(
        statically_known_true(size < 2) or statically_known_true(a == b)
        for size, a, b in zip(old.shape, val.stride(), old.stride(), strict=True)
    ):
        return new
    by_stride = sorted(range(old.dim()), key=lambda dim: _size_hint(old.stride(dim)), reverse=True)
    moved = call(like, aten.permute.default, new, by_stride)
    dense = call(like, aten.clone.default, moved)
    # clone keeps a permuted input's strides unless it is told the format
    dense.kwargs = {"memory_format": torch.contiguous_format}
    with fake_mode_of(like):
        dense.meta["val"] = value(moved).contiguous()
    return call(like, aten.permute.default, dense, [by_stride.index(dim) for dim in range(old.dim())])


def _size_hint(size: Any) -> int:
    """An integer to sort strides by: any hint will do, since the strides' order cannot follow the hint's value."""
    return size if isinstance(size, int) else int(size.node.hint if size.node.hint is not None else 1 << 62)
