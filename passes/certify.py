"""Classify every node of a finished graph, and refuse what is not proven.

Runs last, just before Inductor takes over.  Changes nothing.  Each node is

* ``exact``: it moves, compares or selects values, or computes on integers;
* ``elementwise``: Inductor generates its code, with pinned numerics;
* ``lowered``: one of our ops, with its order;
* ``cross-batch``: an op that is batch-invariant by itself but here combines rows of the batch, in one fixed order;
* ``allowed``: the user takes responsibility for it by name;
* ``refused``: nothing above.

Numerics, shapes, dtypes and strides: unchanged.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import sympy
import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from bicompile.errors import UnsupportedOpError
from bicompile.lowering.gpu.device import unsupported
from bicompile.lowering.loading import LIBRARY_OF

from .batch_symbols import mixes_batch, reduced_extent, symbols_of
from .op_classes import (
    breaks_ties_freely,
    compares_with_sizes,
    is_control_flow,
    is_elementwise,
    is_exact,
    is_random,
    op_name,
)
from .rewriting import arguments

_TORCH = str(Path(torch.__file__).parent)

Kind = Literal["exact", "elementwise", "lowered", "cross-batch", "allowed", "refused"]


@dataclass(frozen=True)
class CertifiedNode:
    """What one node of a graph is, and why.

    Attributes:
        name: the node's name in its graph.
        op: the op, as ``aten.add.Tensor``.
        kind: the class that the node falls into.
        shape: its result's shape, as text; empty where it has none.
        dtype: its result's dtype, as text.
        order: for ``lowered`` and ``cross-batch``, the extent reduced and the op whose order it follows.
        reason: for ``refused``, what is missing and what to do.
        source: the user's line, ``file:line, in function``, where the trace kept it.
        module: the innermost ``nn.Module`` that it belongs to, as ``layers.0.norm (LayerNorm)``, where there is one.
        extent: for ``lowered`` and ``cross-batch``, the sizes over which one output element combines input elements.
        symbols: the symbols in ``extent``.  An order is made of op, dtype and extent: it can follow nothing else.
        operand: the dtype of what the node combines: as a rule, of the first tensor that it takes.
        device: where the result is.
    """

    name: str
    op: str
    kind: Kind
    shape: str
    dtype: str
    order: str = ""
    reason: str = ""
    source: str = ""
    module: str = ""
    extent: tuple[str, ...] = ()
    symbols: tuple[str, ...] = ()
    operand: str = ""
    device: str = ""


@dataclass
class Certification:
    """How to certify: what the user allows, and what to do with a refusal.

    Attributes:
        allow: op names, with or without overload, that the user takes responsibility for.
        on_refused: ``error`` raises, ``warn`` warns once for each graph, ``collect`` does neither.
        batch: the sympy symbols of the batch size; empty where the graph was traced with a fixed batch.
        nodes: every node certified so far, over all graphs.
    """

    allow: frozenset[str] = frozenset()
    on_refused: Literal["error", "warn", "collect"] = "error"
    batch: frozenset[sympy.Symbol] = frozenset()
    nodes: list[CertifiedNode] = field(default_factory=list)


def certify_pass(gm: GraphModule, certification: Certification) -> None:
    """Classify the nodes of ``gm`` into ``certification.nodes``.

    Raises:
        UnsupportedOpError: a node is refused and ``on_refused`` is ``error``.
    """
    nodes = [
        certify_node(node, certification) for node in gm.graph.nodes if node.op in ("call_function", "call_method")
    ]
    certification.nodes.extend(nodes)
    refused = [node for node in nodes if node.kind == "refused"]
    if not refused or certification.on_refused == "collect":
        return
    if certification.on_refused == "error":
        raise UnsupportedOpError(refusal(refused))
    warnings.warn(f"left as it is, and possibly batch-variant: {refusal(refused)}", stacklevel=2)


def certify_node(node: Node, certification: Certification) -> CertifiedNode:
    """Classify one node."""
    name = op_name(node.target)
    full = str(node.target) if isinstance(node.target, OpOverload) else name
    kind: Kind
    reason = ""
    if certification.allow & {name, full}:
        kind = "allowed"
    elif device := _unproven_device(node):
        kind, reason = "refused", device
    elif missing := _without_kernel(node):
        kind, reason = "refused", missing
    elif name.startswith("bicompile."):
        kind = "cross-batch" if mixes_batch(node, certification.batch) else "lowered"
    elif breaks_ties_freely(node):
        kind, reason = "refused", "which of equal elements it names may follow the batch; use torch.sort or torch.topk"
    elif compares_with_sizes(node):
        kind, reason = "refused", "static shapes would round that number to the tensor's dtype; compare in float32"
    elif is_exact(node):
        kind = "cross-batch" if mixes_batch(node, certification.batch) else "exact"
    elif is_elementwise(node):
        kind = "elementwise"
    elif is_control_flow(node):
        kind = "exact"
    else:
        kind, reason = "refused", _reason(node)
    val = next(_tensors(node), None)
    operand = _operand(node)
    extent = (reduced_extent(node) or []) if kind in ("lowered", "cross-batch") else []
    return CertifiedNode(
        name=node.name,
        op=full,
        kind=kind,
        shape="" if val is None else _sizes(val.shape),
        dtype="" if val is None else _dtype(val),
        order=_order(name, extent) if kind in ("lowered", "cross-batch") else "",
        reason=reason,
        source=source_line(node),
        module=module_path(node),
        extent=tuple(map(str, extent)),
        symbols=tuple(sorted({str(symbol) for size in extent for symbol in symbols_of(size)})),
        operand="" if operand is None else _dtype(operand),
        device="" if val is None else val.device.type,
    )


def refusal(refused: list[CertifiedNode]) -> str:
    """One message for all refusals of a graph: the op, its shape, where it is, and what to do."""
    lines = []
    for node in refused:
        where = f" at {node.source}" if node.source else ""
        lines.append(f"  {node.op} -> {node.dtype}{node.shape}{where}: {node.reason}")
    names = sorted({node.op.rsplit(".", 1)[0] if node.op.count(".") > 1 else node.op for node in refused})
    return (
        "no batch-invariant lowering for\n"
        + "\n".join(lines)
        + f"\nRewrite it with supported ops, keep it out of the compiled function, or take responsibility for it with "
        f"options={{'allow': {names}}}."
    )


def source_line(node: Node) -> str:
    """The innermost line of the user's code that the node comes from, or an empty string."""
    trace = (node.meta.get("stack_trace") or "").strip().splitlines()
    frames = [line.strip() for line in trace if line.strip().startswith("File ")]
    frames = [frame for frame in frames if _TORCH not in frame] or frames
    if not frames:
        return ""
    file, line, *rest = frames[-1].removeprefix("File ").split(", ")
    return ", ".join([f"{file.strip(chr(34))}:{line.removeprefix('line ')}", *rest])


def module_path(node: Node) -> str:
    """The innermost module that the node comes from and its class, or an empty string."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    if not stack:
        return ""
    path, kind = list(stack.values())[-1]
    path = path.partition(".")[2]  # its first part is the name that Dynamo has for what was compiled
    name = kind if isinstance(kind, str) else kind.__name__
    return f"{path} ({name})" if path else name


def _operand(node: Node) -> Tensor | None:
    """The first tensor that the node takes; of the gradients of a loss, that which its products are made of."""
    sources = list(node.all_input_nodes)
    if isinstance(node.target, OpOverload) and isinstance(hidden := arguments(node).get("hidden"), Node):
        sources.insert(0, hidden)
    return next((leaf for source in sources for leaf in _tensors(source)), None)


def _tensors(node: Node) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor))


def _unproven_device(node: Node) -> str:
    """Why nothing is proven on the device of the node's result; empty where something is."""
    for leaf in tree_leaves(node.meta.get("val")):
        if isinstance(leaf, Tensor) and (reason := _unsupported(leaf.device)):
            return f"it runs on {leaf.device}: {reason}"
    return ""


_unsupported = functools.cache(unsupported)


def _without_kernel(node: Node) -> str:
    """For an op of ours that has no kernel for a GPU where it is to run, which one; empty for every other node."""
    target = node.target
    if not isinstance(target, OpOverload) or target.namespace != "bicompile":
        return ""
    devices = {leaf.device.type for leaf in tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor)}
    keys = [DispatchKey.CUDA]
    if target.name() not in LIBRARY_OF:  # whose kernel under the alias key is a stub for the CPU
        keys.append(DispatchKey.CompositeExplicitAutograd)
    if "cuda" in devices and not any(target.has_kernel_for_dispatch_key(key) for key in keys):
        return f"{target} has no GPU kernel yet; compute it on the CPU"
    return ""


def _dtype(val: Tensor) -> str:
    return str(val.dtype).removeprefix("torch.")


def _order(name: str, extent: Sequence[object]) -> str:
    if not extent:
        return name
    return f"{name.split('.')[1]} over {_sizes(extent)}"


def _sizes(sizes: object) -> str:
    return "[" + ", ".join(str(size) for size in sizes) + "]"  # type: ignore[attr-defined]


def _reason(node: Node) -> str:
    if is_random(node):
        return "random numbers follow an element's place in the batch"
    if not isinstance(node.target, OpOverload):
        return "an op that runs code of its own, which no pass has seen"
    tensors = [leaf for n in node.all_input_nodes for leaf in tree_leaves(n.meta.get("val"))]
    if any(isinstance(v, Tensor) and v.is_complex() for v in tensors):
        return "complex arithmetic runs in kernels of PyTorch's own"
    if torch.Tag.pointwise in node.target.tags:
        return "elementwise, but computed by a kernel of PyTorch's own, which differs between vector and scalar code"
    return "its order is not known"


__all__ = ["Certification", "CertifiedNode", "certify_node", "certify_pass", "symbols_of"]
