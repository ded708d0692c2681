"""The orders that the lowerings declare, as trees: what ``summation_tree`` must find, and what a report draws."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from ..lowering.attention.order import AttentionOrder, GpuAttentionOrder
from ..lowering.attention.order import gpu_order_for as gpu_attention
from ..lowering.attention.order import order_for as attention
from ..lowering.matmul.order import GpuMatmulOrder, MatmulOrder
from ..lowering.matmul.order import gpu_order_for as gpu_matmul
from ..lowering.matmul.order import order_for as matmul
from ..lowering.norm.order import group_parameters_order_for as group_parameters
from ..lowering.reduction.order import GpuReductionOrder, ReductionOrder
from ..lowering.reduction.order import gpu_order_for as gpu_reduction
from ..lowering.reduction.order import order_for as reduction
from ..lowering.scan.order import GpuScanOrder, ScanOrder
from ..lowering.scan.order import gpu_order_for as gpu_scan
from ..lowering.scan.order import order_for as scan
from ..lowering.scatter.order import ScatterOrder
from ..lowering.scatter.order import order_for as scatter
from .trees import SummationTree

Child = int | SummationTree

_MATMULS = ("mm", "mm_windows", "mm_windows_transposed", "bmm", "addmm", "baddbmm", "grouped_mm", "scaled_mm")
_ATTENTION = ("sdpa", "sdpa_backward")
_SCANS = ("cumsum", "cumprod", "logcumsumexp")
_SCATTERS = ("index_add", "scatter_add", "scatter_reduce", "index_put_accumulate", "embedding_dense_backward")
_REDUCTIONS = (
    *("sum", "mean", "prod", "var", "vector_norm", "logsumexp", "sum_square", "mean_square", "softmax"),
    *("softmax_backward", "softmax_statistics", "log_probability", "rms_norm"),
    *(f"{kind}_norm{part}" for kind in ("layer", "group") for part in ("", "_backward", "_backward_params")),
)


def declared_order(op: str, length: int, dtype: torch.dtype, device: str = "cpu") -> Any:
    """The order dataclass that ``op`` follows, such as ``MatmulOrder`` for ``mm``; None for an op that adds nothing.

    Args:
        op: the name of an op of ours, without ``bicompile.`` and overload.
        length: how many elements are combined; of attention the depth of a head.
        dtype: of what is combined.
        device: ``cpu`` or ``cuda``.
    """
    gpu = device == "cuda"
    if op in _MATMULS:
        return (gpu_matmul if gpu else matmul)(length, dtype)
    if op in _ATTENTION:
        return gpu_attention(length, dtype) if gpu else attention(dtype)
    if op == "group_norm_backward_params" and not gpu:
        return group_parameters(length, dtype)
    if op in _REDUCTIONS:
        return (gpu_reduction if gpu else reduction)(length, dtype)
    if op in _SCANS:
        return (gpu_scan if gpu else scan)(dtype)
    return scatter(dtype) if op in _SCATTERS else None


@functools.singledispatch
def declared_trees(order: Any, n: int) -> dict[str, SummationTree]:
    """How ``n`` summands are added in ``order``: a tree for each of its sums, by what is summed."""
    raise TypeError(f"declared_trees: expected an order of a lowering, got {type(order).__name__}")


@declared_trees.register
def _(order: MatmulOrder, n: int) -> dict[str, SummationTree]:
    ks: Sequence[int] = range(n)
    if order.odd_first:
        ks = [k for pair in range(0, n, 2) for k in (pair + 1, pair) if k < n]
    return {"products": blocks(ks, order.block)}


@declared_trees.register
def _(order: GpuMatmulOrder, n: int) -> dict[str, SummationTree]:
    return {"products": _tree(grouped(range(n), order.group))}


@declared_trees.register
def _(order: AttentionOrder, n: int) -> dict[str, SummationTree]:
    return {
        "products of a score, and weighted values": blocks(range(n), order.block),
        "weights": laned_sections(n, order.block, order.lanes),
    }


@declared_trees.register
def _(order: GpuAttentionOrder, n: int) -> dict[str, SummationTree]:
    splits = [[start // order.block for start in split[:: order.block]] for split in _splits(order, n * order.block)]
    return {"blocks of keys, in splits": chain(functools.reduce(add, split, None) for split in splits)}


@declared_trees.register
def _(order: ReductionOrder, n: int) -> dict[str, SummationTree]:
    return {"elements": laned_sections(n, order.section, order.lanes)}


@declared_trees.register
def _(order: GpuReductionOrder, n: int) -> dict[str, SummationTree]:
    row: list[Child | None] = list(range(n))
    while len(row) > 1:
        sections = [row[start : start + order.section] for start in range(0, len(row), order.section)]
        row = [
            neighbours([_running(section[lane :: order.lanes]) for lane in range(order.lanes)]) for section in sections
        ]
    return {"elements": _tree(row[0])}


@declared_trees.register
def _(order: ScanOrder, n: int) -> dict[str, SummationTree]:
    return {"elements up to the last": chain(range(n))}


@declared_trees.register
def _(order: GpuScanOrder, n: int) -> dict[str, SummationTree]:
    def last(row: Sequence[Child | None]) -> Child | None:
        segments = [row[start : start + order.segment] for start in range(0, len(row), order.segment)]
        before = last([_running(segment) for segment in segments[:-1]]) if len(segments) > 1 else None
        return _running([before, *segments[-1]])

    return {"elements up to the last": _tree(last(range(n)))}


@declared_trees.register
def _(order: ScatterOrder, n: int) -> dict[str, SummationTree]:
    return {"contributions to one destination": chain(range(n))}


def gpu_attention_trees(order: GpuAttentionOrder, group: int, n: int) -> dict[str, SummationTree]:
    """How a GPU adds over ``n`` keys that a row sees, where the tensor core takes ``group`` keys at a time.

    The keys' scores are the same, so that no sum is scaled on its way.
    """
    splits = _splits(order, n)
    return {
        "weighted values": chain(grouped(split, group) for split in splits),
        "weights": chain(_folded_blocks(split, order.block, order.lanes) for split in splits),
    }


def _splits(order: GpuAttentionOrder, keys: int) -> list[range]:
    starts = [*order.split_starts(keys), keys]
    return [range(*pair) for pair in itertools.pairwise(starts)]


def _folded_blocks(split: range, block: int, lanes: int) -> Child | None:
    """Each block folded to its lanes, these added to what the blocks before have, and the lanes folded at the end."""
    running: list[Child | None] = [None] * lanes
    for start in range(split.start, split.stop, block):
        folded: list[Child | None] = [k if k < split.stop else None for k in range(start, start + block)]
        while len(folded) > lanes:
            half = len(folded) // 2
            folded = [add(folded[i], folded[i + half]) for i in range(half)]
        running = [add(*pair) for pair in zip(running, folded, strict=True)]
    return halved(running)


# --- building blocks -----------------------------------------------------------------------------------------------


def add(*terms: Child | None) -> Child | None:
    """One addition of those terms that are there: a zero is no summand."""
    there = [term for term in terms if term is not None]
    return SummationTree(tuple(there)) if len(there) > 1 else there[0] if there else None


def chain(terms: Iterable[Child | None]) -> SummationTree:
    """Each term is added to the sum of those before it."""
    return _tree(_running(terms))


def grouped(ks: Sequence[int], group: int) -> Child | None:
    """Each group of neighbours is added to the sum of those before it, as one sum."""
    groups = [ks[at : at + group] for at in range(0, len(ks), group)]
    return functools.reduce(lambda total, group: add(total, *group), groups, None)


def blocks(ks: Sequence[int], block: int) -> SummationTree:
    """Chains in blocks, and the blocks' sums in ascending order."""
    return chain(_running(ks[at : at + block]) for at in range(0, len(ks), block))


def laned_sections(n: int, section: int, lanes: int) -> SummationTree:
    """Lanes inside sections, sections added lane by lane, then halves of the lanes."""
    starts = range(0, n, section)
    cut = [[_running(range(start + lane, min(start + section, n), lanes)) for lane in range(lanes)] for start in starts]
    return _tree(halved([_running(parts) for parts in zip(*cut, strict=True)]))


def halved(lanes: list[Child | None]) -> Child | None:
    """Lane ``i`` takes lane ``i + half``, down to lane 0."""
    return _paired(lanes, lambda i, half: (i, i + half))


def neighbours(lanes: list[Child | None]) -> Child | None:
    """Neighbours, then neighbouring pairs, and so on."""
    return _paired(lanes, lambda i, half: (2 * i, 2 * i + 1))


def _paired(lanes: list[Child | None], pair: Callable[[int, int], tuple[int, int]]) -> Child | None:
    while len(lanes) > 1:
        half = len(lanes) // 2
        lanes = [add(*(lanes[at] for at in pair(i, half))) for i in range(half)]
    return lanes[0]


def _running(terms: Iterable[Child | None]) -> Child | None:
    return functools.reduce(add, terms, None)


def _tree(child: Child | None) -> SummationTree:
    assert child is not None
    return child if isinstance(child, SummationTree) else SummationTree((child,))
