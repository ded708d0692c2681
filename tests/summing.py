"""The sums inside our ops, each as a function of its summands, and the trees that are declared for them.

What ``tests/test_trees_of_lowerings.py`` asks on a CPU, ``tests/gpu/test_summation_tree.py`` asks on a GPU, and
``tests/interpreted/test_summation_tree.py`` asks the GPU's kernels under Triton's interpreter.  A sum is a function of
the ops, ``torch.ops.bicompile`` or what stands for it, and of rows, [M, n], on any device; it gives [M].
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import bicompile.lowering.attention.op
import bicompile.lowering.matmul.op
import bicompile.lowering.norm.op
import bicompile.lowering.reduction.op
import bicompile.lowering.scan.op
import bicompile.lowering.scatter.op
import bicompile.lowering.softmax.op  # noqa: F401 (registers the ops)
from bicompile.testing import SummationTree, summation_tree, tree_difference
from bicompile.testing.declared import Child, declared_order, declared_trees

Sum = Callable[[Any, Tensor], Tensor]


def tree_of(order: Any, n: int, what: int = 0) -> SummationTree:
    """The tree of one of an order's sums, the first unless it is told otherwise."""
    return list(declared_trees(order, n).values())[what]


def ones(x: Tensor, *shape: int) -> Tensor:
    return x.new_ones(shape)


def counted(share: Tensor, n: int) -> Tensor:
    """A sum that was divided by ``n``."""
    return (share * n).round()


def _softmax_backward(ops: Any, x: Tensor, log: bool) -> Tensor:
    """``g - sum`` where ``g`` is smallest: there it is exact."""
    y = torch.zeros_like(x) if log else torch.ones_like(x)
    at = x.abs().argmin(1, keepdim=True)
    return (x.gather(1, at) - ops.softmax_backward(x, y, 1, log, x.dtype).gather(1, at))[:, 0]


def _norm_bias(ops: Any, x: Tensor) -> Tensor:
    """The gradient of a layer norm's bias: a sum over what the batch was."""
    grad = x.t().contiguous()
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    statistics = x.new_zeros(x.shape[1], 1, dtype=wide)
    return ops.layer_norm_backward_params(grad, torch.zeros_like(grad), 1, statistics, statistics, x.dtype)[1]


def _grouped_mm(ops: Any, x: Tensor) -> Tensor:
    """Two groups, the rows in the second."""
    ends = torch.tensor([2, 2 + len(x)], dtype=torch.int32, device=x.device)
    return ops.grouped_mm(torch.cat([ones(x, 2, x.shape[1]), x]), ones(x, 2, x.shape[1], 8), ends)[2:, 1]


def _index(x: Tensor) -> Tensor:
    return torch.ones(x.shape[1], dtype=torch.int64, device=x.device)


def _attention_values(ops: Any, x: Tensor) -> Tensor:
    """Equal weights: an output is a sum, divided by the number of keys."""
    q, k = ones(x, len(x), 1, 2, 1) * 0, ones(x, len(x), 1, x.shape[1], 1)
    return counted(ops.sdpa(q, k, x[:, None, :, None], None, False, 1.0)[0][:, 0, 1, 0], x.shape[1])


def _attention_scores(ops: Any, x: Tensor) -> Tensor:
    """One key: the logarithm of the sum of exponentials is its score, a sum over the depth."""
    found = ops.sdpa(x[None, None], ones(x, 1, 1, 1, x.shape[1]), ones(x, 1, 1, 1, 1), None, False, 1.0)[1][0, 0]
    return found.round()


def attention_gradients(ops: Any, x: Tensor, which: str) -> Tensor:
    """With scores of 0 and an output of 0, so that ``dS`` is the weight: 1 for each key."""
    rows, n = x.shape
    one, many = ones(x, rows, 1, 1, 1), x[:, None, :, None]
    if which == "dq":  # over keys; each has the weight 1 / n, exact for the n that are tried
        q, k, v, grad = one * 0, many, torch.ones_like(many), one
    elif which == "dk":  # over queries, of which each sees one key
        q, k, v, grad = many, one * 0, one, torch.ones_like(many)
    else:
        q, k, v, grad = torch.ones_like(many), one * 0, one, many
    _, lse = ops.sdpa(q, k, v, None, False, 1.0)
    found = ops.sdpa_backward(grad, q, k, v, None, torch.zeros_like(grad), lse, False, 1.0, False)
    result = found[("dq", "dk", "dv").index(which)][:, 0, 0, 0]
    return counted(result, n) if which == "dq" else result


REDUCTIONS: dict[str, Sum] = {
    "sum": lambda ops, x: ops.sum(x, [1], False, x.dtype),
    "sum over dim 0": lambda ops, x: ops.sum(x.t().contiguous(), [0], False, x.dtype),
    "mean": lambda ops, x: counted(ops.mean(x, [1], False, x.dtype), x.shape[1]),
    "var": lambda ops, x: counted(ops.var(x, [1], 1.0, False, False)[1], x.shape[1]),
    "layer_norm": lambda ops, x: counted(ops.layer_norm(x, 1, None, None, 1e-5)[1][:, 0], x.shape[1]),
    "layer_norm_backward_params": _norm_bias,
    "softmax_backward": lambda ops, x: _softmax_backward(ops, x, False),
    "log_softmax_backward": lambda ops, x: _softmax_backward(ops, x, True),
}
PRODUCTS: dict[str, Sum] = {
    "mm": lambda ops, x: ops.mm(x, ones(x, x.shape[1], 3))[:, 1],
    "mm from the right": lambda ops, x: ops.mm(ones(x, 3, x.shape[1]), x.t())[1],
    "addmm": lambda ops, x: ops.addmm(ones(x, 20) * 0, x, ones(x, 20, x.shape[1]).t(), 1.0, 1.0)[:, 19],
    "bmm": lambda ops, x: ops.bmm(x[:, None], ones(x, len(x), x.shape[1], 2))[:, 0, 1],
    "baddbmm": lambda ops, x: ops.baddbmm(ones(x, 1, 1) * 0, x[:, None], ones(x, len(x), x.shape[1], 2), 1.0, 1.0)[
        :, 0, 1
    ],
    "grouped_mm": _grouped_mm,
}
SCANS: dict[str, Sum] = {"cumsum": lambda ops, x: ops.cumsum(x, 1, x.dtype)[:, -1]}
SCATTERS: dict[str, Sum] = {
    "index_add": lambda ops, x: ops.index_add(ones(x, 2, len(x)) * 0, 0, _index(x), x.t(), 1.0)[1],
    "scatter_add": lambda ops, x: ops.scatter_add(ones(x, len(x), 2) * 0, 1, _index(x).expand(x.shape), x)[:, 1],
    "index_put_accumulate": lambda ops, x: ops.index_put_accumulate(ones(x, 2, len(x)) * 0, [_index(x)], x.t())[1],
    "embedding_dense_backward": lambda ops, x: ops.embedding_dense_backward(
        x.t().contiguous(), _index(x), 2, -1, False
    )[1],
}
ATTENTION: dict[str, Sum] = {"sdpa's values": _attention_values, "sdpa's scores": _attention_scores}


def tree_in_batch(
    fn: Callable[[Tensor], Tensor],
    n: int,
    num_rows: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> SummationTree:
    """How ``fn`` adds the last of ``num_rows`` rows, the others being random."""
    rows = torch.randn(num_rows, n, generator=torch.Generator().manual_seed(n)).to(device, dtype)

    def last_row(x: Tensor) -> Tensor:
        rows[-1] = x
        return fn(rows)[-1]

    return summation_tree(last_row, n, dtype=dtype, device=device)


def assert_same_tree(expected: SummationTree, got: SummationTree, what: str) -> None:
    """Fails with where two trees first differ, and with both in full."""
    different = tree_difference(expected, got)
    assert different is None, f"{what}: {different}\n  declared: {expected}\n  found:    {got}"


# --- sums of positive numbers --------------------------------------------------------------------------------------
# Exponentials have no negatives, so nothing huge can leave again.  But of three summands, two meet first: beside 1,
# two numbers of 0.75 * 2**-24 each vanish, unless they were added to each other before.

SMALL = math.log(0.75 * 2.0**-24)
NEXT_TO_NOTHING = -80.0  # not -inf: a key of weight zero would move the blocks of attention


def _attend_to_first(ops: Any, x: Tensor) -> Tensor:
    """The logarithms of the weights' sums."""
    rows, n = x.shape
    q, v = ones(x, rows, 1, 1, 1), ones(x, rows, 1, n, 1)
    return ops.sdpa(q, x[:, None, :, None], v, None, False, 1.0)[1][:, 0, 0]


# From the logarithms of the summands, [M, n], to [M]: whether the sum is above 1.
POSITIVE: dict[str, Sum] = {
    "softmax": lambda ops, x: ops.softmax(x, 1, False, x.dtype).amax(1) < 1,
    "log_softmax": lambda ops, x: ops.softmax(x, 1, True, x.dtype).amax(1) < 0,
    "logsumexp": lambda ops, x: ops.logsumexp(x, [1], False) > 0,
    "sum_square": lambda ops, x: ops.sum_square((x / 2).exp(), [1], False, x.dtype) > 1,
    "vector_norm": lambda ops, x: ops.vector_norm(x.exp(), 1.0, [1], False, x.dtype) > 1,
}
POSITIVE_ATTENTION: dict[str, Sum] = {"sdpa's weights": lambda ops, x: _attend_to_first(ops, x) > 0}


def meet_first(tree: SummationTree, i: int, j: int, k: int) -> bool:
    """Whether ``j`` and ``k`` are added up before ``i`` is."""
    node: Child = tree
    while isinstance(node, SummationTree) and k in node:
        if i not in node:
            return True
        (node,) = [child for child in node.children if child == j or isinstance(child, SummationTree) and j in child]
    return False


def telling_triples(n: int, count: int) -> list[list[int]]:
    """Triples in one lane or in several, two of which may be neighbours there."""
    chosen = random.Random(n)
    triples = []
    while len(triples) < count:
        step = chosen.choice([step for step in (1, 2, 4, 8, 16, 32) if step * 3 <= n])
        lane = range(chosen.randrange(step), n, step)
        at = chosen.randrange(len(lane) - 1)
        i, j, k = chosen.choice([chosen.choices(lane, k=3), [chosen.choice(lane), lane[at], lane[at + 1]]])
        if i != j != k != i:
            triples.append([i, j, k])
    return triples


def check_triples(
    fn: Callable[[Tensor], Tensor],
    tree: SummationTree,
    num_rows: tuple[int, ...],
    device: str,
    what: str,
    count: int = 300,
) -> None:
    """Whether of three positive summands those two meet first that do in ``tree``, in batches of each size."""
    n = len(tree.leaves)
    triples = telling_triples(n, count)
    expected = [meet_first(tree, *triple) for triple in triples]
    assert 0 < sum(expected) < len(expected)
    x = torch.full((len(triples), n), NEXT_TO_NOTHING)
    for row, (i, j, k) in zip(x, triples, strict=True):
        row[i], row[j], row[k] = 0.0, SMALL, SMALL
    for size in num_rows:
        found = torch.cat([fn(part) for part in x.to(device).split(size)]).tolist()
        wrong = [triple for triple, a, b in zip(triples, expected, found, strict=True) if a != b]
        assert not wrong, f"{what}, {size} rows of {n}: {len(wrong)} are not as declared, {wrong[:5]}, in {tree}"


def declared_tree(op: str, n: int, dtype: torch.dtype, device: str = "cpu", what: int = 0) -> SummationTree:
    """The tree that is declared for ``n`` summands of ``op``."""
    return tree_of(declared_order(op, n, dtype, device), n, what)
