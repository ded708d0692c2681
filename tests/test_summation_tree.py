"""The order in which a function adds, read off its results: known functions, the lowerings, and stock PyTorch."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import random
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bicompile.lowering.attention.op
import bicompile.lowering.matmul.op
import bicompile.lowering.norm.op
import bicompile.lowering.reduction.op
import bicompile.lowering.scan.op
import bicompile.lowering.scatter.op
import bicompile.lowering.softmax.op  # noqa: F401 (registers the ops)
from bicompile.lowering.attention import reference as attention_reference
from bicompile.lowering.matmul import reference as matmul_reference
from bicompile.lowering.reduction import reference as reduction_reference
from bicompile.lowering.scan import reference as scan_reference
from bicompile.lowering.scatter import reference as scatter_reference
from bicompile.testing import SummationTree, summation_tree, tree_difference
from bicompile.testing.declared import Child, add, blocks, chain, declared_order, declared_trees, laned_sections

ops = torch.ops.bicompile
Tree = Callable[[int, torch.dtype], SummationTree]

# Rows and their number, around the blocks and past two of them.
SIZES = ((5, 3), (191, 1), (192, 17), (193, 3), (400, 1), (400, 17))


# --- trees by hand -------------------------------------------------------------------------------------------------


def balanced(start: int, stop: int) -> Child:
    if stop - start == 1:
        return start
    middle = (start + stop + 1) // 2
    return SummationTree((balanced(start, middle), balanced(middle, stop)))


# --- the declared orders -------------------------------------------------------------------------------------------


def tree_of(order: Any, n: int, what: int = 0) -> SummationTree:
    """The tree of one of an order's sums, the first unless it is told otherwise."""
    return list(declared_trees(order, n).values())[what]


def reduction_tree(n: int, dtype: torch.dtype) -> SummationTree:
    return tree_of(declared_order("sum", n, dtype), n)


def matmul_tree(n: int, dtype: torch.dtype) -> SummationTree:
    return tree_of(declared_order("mm", n, dtype), n)


def attention_tree(n: int, dtype: torch.dtype) -> SummationTree:
    return tree_of(declared_order("sdpa", n, dtype), n)


def weights_tree(n: int, dtype: torch.dtype) -> SummationTree:
    return tree_of(declared_order("sdpa", n, dtype), n, 1)


def running_tree(n: int, dtype: torch.dtype) -> SummationTree:
    """A scan's last element, or a scatter's one destination."""
    scan, scatter = (tree_of(declared_order(op, n, dtype), n) for op in ("cumsum", "index_add"))
    assert scan == scatter
    return scan


# --- known functions -----------------------------------------------------------------------------------------------


def left_to_right(x: Tensor) -> Tensor:
    return functools.reduce(torch.add, x.unbind())


def right_to_left(x: Tensor) -> Tensor:
    return left_to_right(x.flip(0))


def pairwise(x: Tensor) -> Tensor:
    if len(x) == 1:
        return x[0]
    middle = (len(x) + 1) // 2
    return pairwise(x[:middle]) + pairwise(x[middle:])


def blocked(x: Tensor) -> Tensor:
    return left_to_right(torch.stack([left_to_right(part) for part in x.split(4)]))


def from_outside(x: Tensor) -> Tensor:
    """0, then the last, then 1, ...: the middle comes last."""
    n = len(x)
    return left_to_right(torch.stack([x[i // 2 if i % 2 == 0 else n - 1 - i // 2] for i in range(n)]))


def fused(x: Tensor, width: int = 4) -> Tensor:
    """As a tensor core adds: terms are cut to the place of the largest one's last bit, then added exactly."""
    total = 0.0
    for group in x.split(width):
        terms = [total, *group.tolist()]
        unit = math.ldexp(1.0, math.frexp(max(map(abs, terms)))[1] - 24)
        total = float(torch.tensor(sum(math.trunc(term / unit) for term in terms) * unit, dtype=torch.float32))
    return torch.tensor(total)


def fused_tree(n: int, width: int = 4) -> SummationTree:
    groups = [range(start, min(start + width, n)) for start in range(0, n, width)]
    total = functools.reduce(lambda total, group: add(total, *group), groups, None)
    assert isinstance(total, SummationTree)
    return total


@pytest.mark.parametrize("n", [2, 3, 7, 16, 30])
def test_known_functions_have_their_trees(n: int):
    outside = [i // 2 if i % 2 == 0 else n - 1 - i // 2 for i in range(n)]
    known: list[tuple[Callable[[Tensor], Tensor], Child | None]] = [
        (left_to_right, chain(range(n))),
        (right_to_left, chain(reversed(range(n)))),
        (pairwise, balanced(0, n)),
        (blocked, blocks(list(range(n)), 4)),
        (from_outside, chain(outside)),
        (fused, fused_tree(n)),
    ]
    for (fn, tree), dtype in itertools.product(known, (torch.float32, torch.float64, torch.bfloat16, torch.float16)):
        if fn is not fused or dtype != torch.float64:  # its sum is a float32
            found = summation_tree(fn, n, dtype=dtype)
            assert found == tree, (fn.__name__, dtype, str(found))


def test_one_summand_is_a_tree():
    assert summation_tree(lambda x: x[0], 1) == SummationTree((0,))


@pytest.mark.parametrize("fn", [left_to_right, right_to_left, from_outside], ids=lambda fn: fn.__name__)
def test_few_calls_are_enough(fn: Callable[[Tensor], Tensor]):
    calls = 0

    def counted(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return fn(x)

    summation_tree(counted, 60)
    assert calls < 4 * 60


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_coarse_result_is_counted_in_parts(dtype: torch.dtype):
    n = 300 if dtype == torch.bfloat16 else 2100  # their ones count to 256 and to 2048
    found = summation_tree(lambda x: ops.sum(x, [0], False, torch.float32).to(dtype), n, dtype=dtype)
    assert found == reduction_tree(n, dtype)


# --- reading trees -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tree, text",
    [
        (SummationTree((0,)), "0"),
        (SummationTree((0, 1)), "chain 0..1"),
        (chain(range(4000)), "chain 0..3999"),
        (chain(reversed(range(4000))), "chain(3998..3999, 3997..0)"),
        (chain([3, 1, 0, 5]), "chain(1, 3, 0, 5)"),
        (balanced(0, 8), "2 x [2 x [chain 0..1] by 2] by 4"),
        (fused_tree(16), "4 x {0..3} by 4"),
        (SummationTree((chain(range(8)), 8, 9, 10)), "chain(0..7, {8..10})"),
        (SummationTree((balanced(0, 4), balanced(4, 8), balanced(8, 12))), "{3 x [2 x [chain 0..1] by 2] by 4}"),
        (blocks(list(range(400)), 192), "chain(2 x [chain 0..191] by 192, [chain 384..399])"),
        (laned_sections(256, 4096, 4), "2 x [2 x [chain 0..252 by 4] by 2] by 1"),
        (matmul_tree(193, torch.bfloat16), "chain(0..1, 95 x (3, 2) by 2, 192)"),
    ],
    ids=str,
)
def test_text_is_short(tree: SummationTree, text: str):
    assert str(tree) == text


def test_children_have_no_order_but_their_nesting_counts():
    assert SummationTree((1, 0, SummationTree((3, 2)))) == SummationTree((SummationTree((2, 3)), 0, 1))
    assert len({chain(range(5)), chain(range(5)), chain(reversed(range(5)))}) == 2
    assert chain(range(4)) != balanced(0, 4) != SummationTree((0, 1, 2, 3)) != fused_tree(5)
    assert chain(range(4)) != "chain 0..3"


@pytest.mark.parametrize("children", [(), (0, 0), (0, SummationTree((0, 1))), (SummationTree((0, 1)),)])
def test_what_is_no_tree_is_refused(children: tuple[Child, ...]):
    with pytest.raises(ValueError, match="SummationTree: expected"):
        SummationTree(children)


def test_difference_in_words():
    assert tree_difference(chain(range(3000)), chain(range(3000))) is None
    assert tree_difference(blocks(list(range(400)), 192), chain(range(400))) == (
        "the sum of [0..399] was expected to be [0..383] + [384..399], and is [0..398] + [399]"
    )
    assert tree_difference(chain([balanced(0, 4), *range(4, 3000)]), chain(range(3000))) == (
        "the sum of [0..3] was expected to be [0..1] + [2..3], and is [0..2] + [3]"
    )
    assert tree_difference(chain(range(9)), chain(range(4, 10))) == (
        "the summands were expected to be [0..8], and are [4..9]"
    )


# --- what is no sum ------------------------------------------------------------------------------------------------


def exactly_fused(x: Tensor) -> Tensor:
    """Nothing vanishes inside a step, so no masked pair tells what is added there."""
    total = torch.zeros(())
    for group in x.split(4):
        total = torch.tensor(math.fsum([total.item(), *group.tolist()]))
    return total


def forgetful() -> Callable[[Tensor], Tensor]:
    """From call to call another order."""
    order = itertools.cycle([left_to_right, right_to_left, pairwise])
    return lambda x: next(order)(x)


NO_SUMS: dict[str, Callable[[Tensor], Tensor]] = {
    "largest": lambda x: x.max(),
    "mean": lambda x: x.mean(),
    "product": lambda x: x.prod(),
    "of squares": lambda x: left_to_right(x * x),
    "of magnitudes": lambda x: left_to_right(x.abs()),
    "without its last": lambda x: left_to_right(x[:-1]),
    "with more added": lambda x: left_to_right(x) + 1,
    "exact": lambda x: torch.tensor(math.fsum(x.tolist())),
    "exactly fused": exactly_fused,
    "another each time": forgetful(),
}


@pytest.mark.parametrize("name", NO_SUMS)
def test_what_is_no_sum_in_one_order_is_refused(name: str):
    with pytest.raises(ValueError, match="summation_tree: expected a function that adds its 20 inputs"):
        summation_tree(NO_SUMS[name], 20)


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(ValueError, match="of 300 ones it makes 256"):
        summation_tree(lambda x: left_to_right(x).float(), 300, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="expected a function"):  # in float64, no float16 makes another vanish
        summation_tree(lambda x: left_to_right(x.double()), 20, dtype=torch.float16)
    with pytest.raises(ValueError, match="numbers vanish beside others, got torch.float8_e4m3fn"):
        summation_tree(lambda x: left_to_right(x.float()), 20, dtype=torch.float8_e4m3fn)


@pytest.mark.parametrize("result", [torch.ones(2), torch.tensor(20), 20.0], ids=repr)
def test_what_is_no_number_is_refused(result: Any):
    with pytest.raises(ValueError, match="floating-point tensor of one element"):
        summation_tree(lambda x: result, 20)


def test_no_summands_and_integers_are_refused():
    with pytest.raises(ValueError, match="n to be 1 or more, got 0"):
        summation_tree(left_to_right, 0)
    with pytest.raises(ValueError, match="floating-point dtype, got torch.int64"):
        summation_tree(left_to_right, 3, dtype=torch.int64)


# --- the lowerings -------------------------------------------------------------------------------------------------


def _ones(x: Tensor, *shape: int) -> Tensor:
    return torch.ones(shape, dtype=x.dtype)


def _counted(share: Tensor, n: int) -> Tensor:
    """A sum that was divided by ``n``."""
    return (share * n).round()


def _softmax_backward(x: Tensor, log: bool) -> Tensor:
    """``g - sum`` where ``g`` is smallest: there it is exact."""
    y = torch.zeros_like(x) if log else torch.ones_like(x)
    at = x.abs().argmin(1, keepdim=True)
    return (x.gather(1, at) - ops.softmax_backward(x, y, 1, log, x.dtype).gather(1, at))[:, 0]


def _grouped_mm(x: Tensor) -> Tensor:
    """Two groups, the rows in the second."""
    a, ends = torch.cat([_ones(x, 2, x.shape[1]), x]), torch.tensor([2, 2 + len(x)], dtype=torch.int32)
    return ops.grouped_mm(a, _ones(x, 2, x.shape[1], 8), ends)[2:, 1]


def _index(x: Tensor) -> Tensor:
    return torch.ones(x.shape[1], dtype=torch.int64)


def _attention_values(x: Tensor) -> Tensor:
    """Equal weights: an output is a sum, divided by the number of keys."""
    q, k = _ones(x, len(x), 1, 2, 1) * 0, _ones(x, len(x), 1, x.shape[1], 1)
    return _counted(ops.sdpa(q, k, x[:, None, :, None], None, False, 1.0)[0][:, 0, 1, 0], x.shape[1])


def _attention_scores(x: Tensor) -> Tensor:
    """One key: the logarithm of the sum of exponentials is its score, a sum over the depth."""
    return ops.sdpa(x[None, None], _ones(x, 1, 1, 1, x.shape[1]), _ones(x, 1, 1, 1, 1), None, False, 1.0)[1][0, 0]


def _attention_gradients(x: Tensor, which: str) -> Tensor:
    """With scores of 0 and an output of 0, so that ``dS`` is the weight: 1 for each key."""
    rows, n = x.shape
    one, many = _ones(x, rows, 1, 1, 1), x[:, None, :, None]
    ones = torch.ones_like(many)
    if which == "dq":  # over keys; each has the weight 1 / n, exact for the n that are tried
        q, k, v, grad = one * 0, many, ones, one
    elif which == "dk":  # over queries, of which each sees one key
        q, k, v, grad = many, one * 0, one, ones
    else:
        q, k, v, grad = ones, one * 0, one, many
    _, lse = ops.sdpa(q, k, v, None, False, 1.0)
    found = ops.sdpa_backward(grad, q, k, v, None, torch.zeros_like(grad), lse, False, 1.0, False)
    result = found[("dq", "dk", "dv").index(which)][:, 0, 0, 0]
    return _counted(result, n) if which == "dq" else result


def _norm_bias(x: Tensor) -> Tensor:
    """The gradient of a layer norm's bias: a sum over what the batch was."""
    grad = x.t().contiguous()
    statistics = torch.zeros(x.shape[1], 1, dtype=x.dtype)
    return ops.layer_norm_backward_params(grad, torch.zeros_like(grad), 1, statistics, statistics, x.dtype)[1]


# From the rows, [M, n], to their sums, [M].
REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: ops.sum(x, [1], False, x.dtype),
    "sum over dim 0": lambda x: ops.sum(x.t().contiguous(), [0], False, x.dtype),
    "mean": lambda x: _counted(ops.mean(x, [1], False, x.dtype), x.shape[1]),
    "var": lambda x: _counted(ops.var(x, [1], 1.0, False, False)[1], x.shape[1]),
    "layer_norm": lambda x: _counted(ops.layer_norm(x, 1, None, None, 1e-5)[1][:, 0], x.shape[1]),
    "layer_norm_backward_params": _norm_bias,
    "softmax_backward": lambda x: _softmax_backward(x, False),
    "log_softmax_backward": lambda x: _softmax_backward(x, True),
}
PRODUCTS: dict[str, Callable[[Tensor], Tensor]] = {
    "mm": lambda x: ops.mm(x, _ones(x, x.shape[1], 3))[:, 1],
    "mm from the right": lambda x: ops.mm(_ones(x, 3, x.shape[1]), x.t())[1],
    "addmm": lambda x: ops.addmm(_ones(x, 20) * 0, x, _ones(x, 20, x.shape[1]).t(), 1.0, 1.0)[:, 19],
    "bmm": lambda x: ops.bmm(x[:, None], _ones(x, len(x), x.shape[1], 2))[:, 0, 1],
    "baddbmm": lambda x: ops.baddbmm(_ones(x, 1, 1) * 0, x[:, None], _ones(x, len(x), x.shape[1], 2), 1.0, 1.0)[
        :, 0, 1
    ],
    "grouped_mm": _grouped_mm,
}
RUNNING: dict[str, Callable[[Tensor], Tensor]] = {
    "cumsum": lambda x: ops.cumsum(x, 1, x.dtype)[:, -1],
    "index_add": lambda x: ops.index_add(_ones(x, 2, len(x)) * 0, 0, _index(x), x.t(), 1.0)[1],
    "scatter_add": lambda x: ops.scatter_add(_ones(x, len(x), 2) * 0, 1, _index(x).expand(x.shape), x)[:, 1],
    "index_put_accumulate": lambda x: ops.index_put_accumulate(_ones(x, 2, len(x)) * 0, [_index(x)], x.t())[1],
    "embedding_dense_backward": lambda x: ops.embedding_dense_backward(x.t().contiguous(), _index(x), 2, -1, False)[1],
}
ATTENTION: dict[str, Callable[[Tensor], Tensor]] = {
    "sdpa's values": _attention_values,
    "sdpa's scores": _attention_scores,
}
LOWERINGS: dict[str, tuple[Callable[[Tensor], Tensor], Tree]] = {
    **{name: (fn, reduction_tree) for name, fn in REDUCTIONS.items()},
    **{name: (fn, matmul_tree) for name, fn in PRODUCTS.items()},
    **{name: (fn, running_tree) for name, fn in RUNNING.items()},
    **{name: (fn, attention_tree) for name, fn in ATTENTION.items()},
}


def tree_in_batch(
    fn: Callable[[Tensor], Tensor], n: int, num_rows: int, dtype: torch.dtype = torch.float32
) -> SummationTree:
    """How ``fn`` adds the last of ``num_rows`` rows, the others being random."""
    others = torch.randn(num_rows, n, generator=torch.Generator().manual_seed(n)).to(dtype)

    def last_row(x: Tensor) -> Tensor:
        rows = others.clone()
        rows[-1] = x
        return fn(rows)[-1]

    return summation_tree(last_row, n, dtype=dtype)


def check(name: str, n: int, num_rows: int, dtype: torch.dtype = torch.float32) -> None:
    fn, tree = LOWERINGS[name]
    different = tree_difference(tree(n, dtype), tree_in_batch(fn, n, num_rows, dtype))
    assert different is None, f"{name} of {num_rows} rows of {n} {dtype}: {different}"


@pytest.mark.parametrize("name", LOWERINGS)
def test_a_lowering_adds_as_its_order_says_in_every_batch(name: str):
    for n, num_rows in SIZES:
        check(name, n, num_rows)


@pytest.mark.parametrize("name", ["sum", "sum over dim 0", "softmax_backward", "mm", "cumsum", "index_add"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_lowering_adds_as_its_order_says_in_every_dtype(name: str, dtype: torch.dtype):
    for n, num_rows in ((5, 3), (193, 17), (400, 1)):
        check(name, n, num_rows, dtype)


@pytest.mark.parametrize("name", ["sum", "sum over dim 0", "mm"])
def test_long_rows_cross_sections(name: str):
    check(name, 4150, 3)


# A key's weight is 1 / n, exact for a power of two; a query's is 1.
@pytest.mark.parametrize("which, lengths", [("dq", (4, 512)), ("dk", (193, 400)), ("dv", (193, 400))])
def test_attention_adds_its_gradients_as_its_order_says(which: str, lengths: tuple[int, int]):
    for n, num_rows in zip(lengths, (17, 1), strict=True):
        found = tree_in_batch(lambda x: _attention_gradients(x, which), n, num_rows)
        assert tree_difference(attention_tree(n, torch.float32), found) is None


# --- sums of positive numbers --------------------------------------------------------------------------------------
# Exponentials have no negatives, so nothing huge can leave again.  But of three summands, two meet first: beside 1,
# two numbers of 0.75 * 2**-24 each vanish, unless they were added to each other before.

SMALL = math.log(0.75 * 2.0**-24)
NEXT_TO_NOTHING = -80.0  # not -inf: a key of weight zero would move the blocks of attention


def _attend_to_first(x: Tensor) -> Tensor:
    """The logarithms of the weights' sums."""
    rows, n = x.shape
    return ops.sdpa(_ones(x, rows, 1, 1, 1), x[:, None, :, None], _ones(x, rows, 1, n, 1), None, False, 1.0)[1][:, 0, 0]


# From the logarithms of the summands, [M, n], to [M]: whether the sum is above 1.
POSITIVE: dict[str, tuple[Callable[[Tensor], Tensor], Tree]] = {
    "softmax": (lambda x: ops.softmax(x, 1, False, x.dtype).amax(1) < 1, reduction_tree),
    "log_softmax": (lambda x: ops.softmax(x, 1, True, x.dtype).amax(1) < 0, reduction_tree),
    "logsumexp": (lambda x: ops.logsumexp(x, [1], False) > 0, reduction_tree),
    "sdpa's weights": (lambda x: _attend_to_first(x) > 0, weights_tree),
}


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


@pytest.mark.parametrize("n", [5, 191, 192, 193, 400, 4150])
@pytest.mark.parametrize("name", POSITIVE)
def test_of_three_positive_summands_those_two_meet_first_that_the_order_says(name: str, n: int):
    fn, tree_for = POSITIVE[name]
    tree, triples = tree_for(n, torch.float32), telling_triples(n, 300)
    expected = [meet_first(tree, *triple) for triple in triples]
    assert 0 < sum(expected) < len(expected)
    x = torch.full((len(triples), n), NEXT_TO_NOTHING)
    for row, (i, j, k) in zip(x, triples, strict=True):
        row[i], row[j], row[k] = 0.0, SMALL, SMALL
    for num_rows in (1, 3, 17, len(x)):
        found = torch.cat([fn(part) for part in x.split(num_rows)]).tolist()
        wrong = [triple for triple, a, b in zip(triples, expected, found, strict=True) if a != b]
        assert not wrong, f"{name} of {num_rows} rows of {n}: not as declared: {wrong[:5]}"


# --- the references ------------------------------------------------------------------------------------------------
# A step of theirs takes long: they are asked with shorter blocks, for which they need no change.


def _shortened(monkeypatch: pytest.MonkeyPatch, module: ModuleType, **sizes: int) -> Callable[..., Any]:
    """``module.order_for`` with other ``sizes``."""
    original = module.order_for

    def shorter(*args: Any) -> Any:
        return dataclasses.replace(original(*args), **sizes)

    monkeypatch.setattr(module, "order_for", shorter)
    return shorter


def test_references_of_reductions_have_the_trees_of_the_kernels():
    for n in (5, 400):
        found = summation_tree(lambda x: reduction_reference.sum(x, [0], False, x.dtype), n)
        assert found == reduction_tree(n, torch.float32)
    found = summation_tree(lambda x: scan_reference.cumsum(x, 0, x.dtype)[-1], 12)
    assert found == running_tree(12, torch.float32)
    index = torch.ones(12, dtype=torch.int64)
    assert summation_tree(lambda x: scatter_reference.index_add(torch.zeros(2), 0, index, x)[1], 12) == found


@pytest.mark.parametrize("n", [3, 8, 19, 70])
def test_references_of_the_gpus_orders_have_the_trees_that_are_declared(n: int, monkeypatch: pytest.MonkeyPatch):
    order = dataclasses.replace(declared_order("sum", n, torch.float32, "cuda"), lanes=4, section=8)
    monkeypatch.setattr(reduction_reference, "gpu_order_for", lambda *_: order)
    found = summation_tree(lambda x: reduction_reference.gpu_fold(x[None])[0, 0], n)
    assert tree_difference(tree_of(order, n), found) is None
    order = dataclasses.replace(declared_order("cumsum", n, torch.float32, "cuda"), segment=4)
    monkeypatch.setattr(scan_reference, "gpu_order_for", lambda *_: order)
    found = summation_tree(lambda x: scan_reference.gpu_cumsum(x, 0, x.dtype)[-1], n)
    assert tree_difference(tree_of(order, n), found) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", [7, 21])
def test_reference_of_matmul_has_the_tree_of_its_order(n: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    order_for = _shortened(monkeypatch, matmul_reference, block=8)
    found = summation_tree(lambda x: matmul_reference.mm(x[None], _ones(x, n, 1))[0, 0], n, dtype=dtype)
    assert found == tree_of(order_for(n, dtype), n)


def test_reference_of_attention_has_the_tree_of_its_order(monkeypatch: pytest.MonkeyPatch):
    order = _shortened(monkeypatch, attention_reference, block=8, lanes=4)(torch.float32)

    def values(x: Tensor) -> Tensor:
        q, k, v = torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, len(x), 1), x[None, None, :, None]
        return _counted(attention_reference.sdpa(q, k, v, None, False, 1.0)[0].flatten(), len(x))

    assert summation_tree(values, 21) == blocks(list(range(21)), order.block)
    weights = summation_tree(lambda x: attention_reference._sum_of_weights(x, order), 21)
    assert weights == laned_sections(21, order.block, order.lanes)


# --- control -------------------------------------------------------------------------------------------------------

# Which of them change depends on the processor and on torch's BLAS.
STOCK: dict[str, Callable[[Tensor], Tensor]] = {
    "mm": lambda x: torch.mm(x, torch.ones(x.shape[1], 1))[:, 0],
    "linear": lambda x: F.linear(x, torch.ones(8, x.shape[1]))[:, 0],
    "sum over dim 0": lambda x: x.t().contiguous().sum(0),
}


def test_stock_functions_change_their_tree_with_the_batch():
    changed = [name for name, fn in STOCK.items() if len({tree_in_batch(fn, 64, rows) for rows in (1, 2, 64)}) > 1]
    assert changed
