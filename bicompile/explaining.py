"""``explain``: run the pipeline over a function and report, without generating code."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._guards import detect_fake_mode
from torch._inductor import compile_fx as inductor
from torch._inductor.virtualized import V
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves, tree_map

from .backend import compile_graph
from .certificate import Certificate, CertifiedGraph
from .config import parse_options
from .passes.batch_symbols import symbols_of
from .passes.certify import Certification, CertifiedNode
from .testing.structure import leaves, path_name


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Certificate:
    """Trace ``fn(*args, **kwargs)``, forward and, where its result requires a gradient, backward, and certify it.

    The batch is dim 0 of the first tensor argument; every tensor argument of that size is taken to be batched, and its
    batch size becomes a symbol, so that sums over the batch are told from sums inside a row.  ``fn`` runs, on a
    batch of at least two rows; no gradient is stored.

    Args:
        fn: a function or ``nn.Module``, compiled or not.
        args: what it is called with.
        kwargs: the same, by name.

    Returns:
        The certificate; refusals are listed in it, not raised.  What ``fn`` itself raises is raised.
    """
    fn = uncompiled(fn)
    args, kwargs = _with_symbolic_batch((args, kwargs))
    recording = _Recording(_num_rows((args, kwargs)))
    certification = recording.certification

    def backend(gm: GraphModule, example_inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        certification.batch |= _symbols(example_inputs, recording.num_rows)
        return compile_graph(gm, example_inputs, parse_options(None, None), certification, recording.inner_compile)

    breaks = dict(counters["graph_break"])
    with (
        torch._dynamo.config.patch(recompile_limit=1 << 16, accumulated_recompile_limit=1 << 16),
        torch._functorch.config.patch(enable_autograd_cache=False),
        torch._inductor.config.patch(fx_graph_cache=False),
    ):
        result = torch.compile(fn, backend=backend, dynamic=False)(*args, **kwargs)
        _run_backward(fn, result, (args, kwargs))
    new_breaks = [reason for reason, count in counters["graph_break"].items() if count > breaks.get(reason, 0)]
    return Certificate(
        graphs=recording.graphs(),
        graph_breaks=tuple(new_breaks),
        batch_symbols=tuple(sorted(map(str, certification.batch))),
        subject=getattr(fn, "__qualname__", type(fn).__name__),
        inputs=tuple(_described(args, kwargs)),
    )


def uncompiled(fn: Any) -> Callable[..., Any]:
    """The function or module that ``torch.compile`` was given."""
    return getattr(fn, "_orig_mod", None) or getattr(fn, "_torchdynamo_orig_callable", fn)


def _with_symbolic_batch(arguments: Any) -> Any:
    """Copies of the arguments whose batch has at least two rows and is marked dynamic."""
    rows = _num_rows(arguments)

    def mark(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim() or leaf.shape[0] != rows or rows == 0:
            return leaf
        copy = leaf.detach()
        if rows == 1:
            copy = copy.expand(2, *leaf.shape[1:]).clone()
        elif copy.is_contiguous():
            copy = copy.view_as(copy)
        copy.requires_grad_(leaf.requires_grad)
        torch._dynamo.maybe_mark_dynamic(copy, 0)
        return copy

    return tree_map(mark, arguments)


def _num_rows(arguments: Any) -> int:
    """The batch size; 0 where there is none."""
    return next((leaf.shape[0] for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor) and leaf.dim()), 0)


def _symbols(inputs: Sequence[Any], num_rows: int) -> frozenset[sympy.Symbol]:
    """The symbols in the inputs' shapes that stand for the batch size.

    Others are there where something was compiled with ``dynamic=True`` before: Dynamo marks the tensors that it meets.
    """
    sizes = [size for leaf in inputs for size in (leaf.shape if isinstance(leaf, Tensor) else [leaf])]
    of_batch = [size for size in sizes if isinstance(size, torch.SymInt) and size.node.hint == num_rows]
    return frozenset(symbol for size in of_batch for symbol in symbols_of(size))


@dataclass
class _Recorded:
    """A graph that was traced: which, its nodes, and its turn among those that ran."""

    kind: str
    nodes: tuple[CertifiedNode, ...]
    turn: int | None = None


@dataclass
class _Recording:
    """Lowers and certifies graphs, interprets them, and keeps what was certified, graph by graph."""

    num_rows: int
    certification: Certification = field(default_factory=lambda: Certification(on_refused="collect"))
    recorded: list[_Recorded] = field(default_factory=list)

    def inner_compile(self, gm: GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
        """In the place of Inductor's."""
        placeholders = [node.meta.get("val") for node in gm.graph.find_nodes(op="placeholder")]
        self.certification.batch |= _symbols(placeholders, self.num_rows)
        known = len(self.certification.nodes)
        with V.set_fake_mode(detect_fake_mode(placeholders)):  # as compile_fx_inner does; some of its passes ask for it
            inductor._recursive_post_grad_passes(gm, is_inference=kwargs.get("is_inference", False))
        kind = "backward" if kwargs.get("is_backward") else "inference" if kwargs.get("is_inference") else "forward"
        recorded = _Recorded(kind, tuple(self.certification.nodes[known:]))
        self.recorded.append(recorded)

        def run(inputs: list[Any]) -> Any:
            if recorded.turn is None:
                recorded.turn = sum(other.turn is not None for other in self.recorded)
            values = list(inputs)
            inputs.clear()
            return torch.fx.Interpreter(gm).run(*values)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    def graphs(self) -> tuple[CertifiedGraph, ...]:
        """In the order in which they ran; AOTAutograd traces some backwards before their forwards run."""
        kinds = [recorded.kind for recorded in self.recorded]
        found: list[CertifiedGraph] = []
        for recorded in sorted(self.recorded, key=lambda r: len(kinds) if r.turn is None else r.turn):
            number = 1 + sum(graph.name.startswith(recorded.kind) for graph in found)
            name = recorded.kind if kinds.count(recorded.kind) == 1 else f"{recorded.kind} {number}"
            found.append(CertifiedGraph(name, recorded.nodes))
        return tuple(found)


def _described(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[str]:
    """Each argument in a few words; tensors nested in one, one by one."""
    for name, value in [*((f"args[{i}]", value) for i, value in enumerate(args)), *kwargs.items()]:
        for path, leaf in leaves(value):
            shown = f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}" if isinstance(leaf, Tensor) else None
            yield f"{path_name(name, path)}: {shown or reprlib.repr(leaf)}"


def _run_backward(fn: Any, result: Any, arguments: Any) -> None:
    """Let the backward graphs be traced too, without touching anybody's ``.grad``."""
    outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.requires_grad]
    leaves = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if isinstance(fn, torch.nn.Module):
        leaves += [parameter for parameter in fn.parameters() if parameter.requires_grad]
    if outputs and leaves:
        torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs], allow_unused=True)
