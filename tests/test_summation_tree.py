"""The order in which a function adds, read off its results: functions whose order is known, and what is no sum."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from summing import declared_tree
from torch import Tensor

from bicompile.testing import SummationTree, summation_tree, tree_difference
from bicompile.testing.declared import Child, add, blocks, chain, laned_sections

ops = torch.ops.bicompile


# --- trees by hand -------------------------------------------------------------------------------------------------


def balanced(start: int, stop: int) -> Child:
    if stop - start == 1:
        return start
    middle = (start + stop + 1) // 2
    return SummationTree((balanced(start, middle), balanced(middle, stop)))


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
    assert found == declared_tree("sum", n, dtype)


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
        (declared_tree("mm", 193, torch.bfloat16), "chain(0..1, 95 x (3, 2) by 2, 192)"),
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
