"""``summation_tree``: in which order does a function add?  Asked of the function, not read from its code.

The method is that of FPRev.  Among ones stand a huge number M and its negative.  A one that is added to either before
the two meet is lost; all others are counted by the result.  So it tells how many summands lie under the addition in
which the two meet, and enough such pairs tell the tree.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, repr=False)
class SummationTree:
    """One addition: what it adds, each a summand (its index) or another addition.

    Two children are an ordinary addition.  More are added as one, as tensor cores do: whichever is far smaller than the
    largest of them is lost.  Addition commutes, so children have no order; here they are sorted by their smallest
    index.  Trees are equal if they make the same additions.  ``str`` reads left to right: ``chain 0..191`` adds
    each number to the sum of those before it, ``{4..7}`` joins its members and the sum so far in one addition,
    ``[...]`` is a sum that is complete before it is added, and ``3 x [...] by 8`` repeats what it shows at indices
    that are 8, then 16 higher.

    Raises:
        ValueError: an index is there twice, or there are fewer than two children, other than one lone summand.
    """

    children: tuple[int | SummationTree, ...]
    _mask: int = field(init=False)
    """The summands, as bits: sets of thousands that are united and compared at once."""

    def __post_init__(self) -> None:
        mask = 0
        for child in self.children:
            if mask & _mask(child):
                raise ValueError(f"SummationTree: expected every summand once, got one twice in {self.children}")
            mask |= _mask(child)
        if len(self.children) < 2 and not (self.children and isinstance(self.children[0], int)):
            raise ValueError(f"SummationTree: expected two children or more, or one summand, got {self.children}")
        object.__setattr__(self, "children", tuple(sorted(self.children, key=_first)))
        object.__setattr__(self, "_mask", mask)

    @property
    def leaves(self) -> tuple[int, ...]:
        """The indices of the summands, ascending."""
        return tuple(_bits(self._mask))

    def __contains__(self, index: int) -> bool:
        """Whether the summand ``index`` has a part in this addition."""
        return bool(self._mask >> index & 1)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SummationTree):
            return NotImplemented
        # A tree is known by the sets under its nodes.  Not child by child: chains are deeper than Python's stack.
        return self._mask == other._mask and {t._mask for t in _nodes(self)} == {t._mask for t in _nodes(other)}

    def __hash__(self) -> int:
        return hash(self._mask)

    def __str__(self) -> str:
        return "".join(map(str, _text(self)))

    __repr__ = __str__


def summation_tree(
    fn: Callable[[Tensor], Tensor], n: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> SummationTree:
    """The order in which ``fn`` adds ``n`` summands.

    ``fn`` is called about ``n * log2(n)`` times, ``2 * n`` for one chain.  Where its result's dtype cannot count to
    ``n`` (256 in bfloat16), or the dtype of the summands has no number that makes so many others vanish (16384 in
    float16, in a float32 sum), the summands are counted in parts, which takes that many times as many calls.

    Args:
        fn: takes the summands, ``[n]`` in ``dtype`` on ``device``, and gives their sum: a tensor of one element, in any
            floating-point dtype.  To ask for a row of a matrix product: ``lambda x: torch.mm(x[None], ones)[0, 0]``.
        n: how many summands, 1 or more.
        dtype: of the summands.
        device: of the summands.

    Raises:
        ValueError: ``fn``'s results are not those of any tree: it is no plain sum of its inputs, it changes from call
            to call, its sum is too precise for ``dtype`` to make a number vanish in it, or too imprecise to count, or
            it adds three or more numbers exactly at once.

    Source:
        Xie et al., "FPRev: Revealing the Order of Floating-Point Summation".  Here the summand that the others are
        compared with is drawn at random, so that no tree takes many more calls than others.
    """
    if n < 1:
        raise ValueError(f"summation_tree: expected n to be 1 or more, got {n}")
    if not dtype.is_floating_point:
        raise ValueError(f"summation_tree: expected a floating-point dtype, got {dtype}")
    (tree,) = _Probe(fn, n, dtype, device).siblings(list(range(n)), n + 1)
    return tree if isinstance(tree, SummationTree) else SummationTree((tree,))


def tree_difference(expected: SummationTree, got: SummationTree) -> str | None:
    """Where two trees first differ, in words, from the last addition downwards; None if they are equal."""
    if expected._mask != got._mask:
        return f"the summands were expected to be [{_listed(expected._mask)}], and are [{_listed(got._mask)}]"
    others = {node._mask: node for node in _nodes(got)}
    for node in _nodes(expected):  # each before its children, so the parent was the same in both
        ours, theirs = ([_mask(child) for child in tree.children] for tree in (node, others[node._mask]))
        if ours != theirs:
            one, other = (" + ".join(f"[{_listed(mask)}]" for mask in masks) for masks in (ours, theirs))
            return f"the sum of [{_listed(node._mask)}] was expected to be {one}, and is {other}"
    return None


# Sums that are asked for before the first is looked at, and summands to whose multiple their lines are filled up.
_AT_ONCE, _LINE = 256, 64


class _Probe:
    """Asks ``fn`` how many summands lie under the addition in which two of them meet."""

    def __init__(self, fn: Callable[[Tensor], Tensor], n: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.fn, self.n, self.dtype, self.device = fn, n, dtype, device
        self.random = random.Random(0)
        # 1 vanishes beside the largest power of two, even in a float64 sum; else the smallest number, in a float32 sum.
        info = torch.finfo(dtype)
        self.huge = math.ldexp(0.5, math.frexp(info.max)[1])
        self.unit = 1.0 if self.huge > 2.0**100 else info.smallest_normal * info.eps
        vanishing = self.huge * 2.0**-25 / self.unit
        if vanishing < 1:
            raise ValueError(f"summation_tree: expected a dtype in which numbers vanish beside others, got {dtype}")
        countable = 2 / torch.finfo(self._call(torch.zeros(n, dtype=dtype, device=device)).dtype).eps
        self.parts = [*range(0, n, int(min(n, vanishing, countable))), n]
        (total,) = self._counts([()])
        if total != n:
            raise self._no_sum(f"of {n} ones it makes {total:g}")

    def siblings(self, leaves: list[int], parent: int) -> list[int | SummationTree]:
        """The subtrees made of ``leaves``, all of them children of a node with ``parent`` summands."""
        found: list[int | SummationTree] = []
        while leaves:
            i = self.random.choice(leaves)
            others = [j for j in leaves if j != i]
            groups: dict[int, list[int]] = {}
            for j, under in zip(others, self._summands_under(i, others), strict=True):
                groups.setdefault(under, []).append(j)
            leaves = groups.pop(parent, [])  # those outside the child that holds i
            # From i upwards: what joins it in its first addition, in its second, ...
            tree: int | SummationTree = i
            size = 1
            for under, group in sorted(groups.items()):
                size += len(group)
                if under != size or under > parent:
                    raise self._no_sum(f"{i} and {group[0]} seem to meet in a sum of {under}, with {size} in reach")
                tree = SummationTree((tree, *self.siblings(group, under)))
            found.append(tree)
        return found

    def _summands_under(self, i: int, others: list[int]) -> list[int]:
        """For each of ``others``, how many summands lie under the addition in which it meets ``i``."""
        found = []
        for j, count in zip(others, self._counts([(i, j) for j in others]), strict=True):
            lost = self.n - count
            if not 2 <= lost <= self.n or lost != int(lost):
                raise self._no_sum(
                    f"with {self.huge:g} at {i} and {-self.huge:g} at {j}, of {self.n - 2} ones {lost - 2:g} vanish"
                )
            found.append(int(lost))
        return found

    def _counts(self, masked: list[tuple[int, ...]]) -> list[float]:
        """How many ones each sum has, with ``huge`` and ``-huge`` for the two summands that are masked in it."""
        return [count for at in range(0, len(masked), _AT_ONCE) for count in self._few(masked[at : at + _AT_ONCE])]

    def _few(self, masked: list[tuple[int, ...]]) -> list[float]:
        """``_counts`` of few: their results are waited for together, which is what takes the time on a GPU."""
        totals = [0.0] * len(masked)
        # Lines begin at addresses that are equally divisible: some functions look at that.
        lines = torch.zeros(len(masked), -(-self.n // _LINE) * _LINE, dtype=self.dtype, device=self.device)
        x = lines[:, : self.n]
        rows = torch.arange(len(masked), device=self.device)
        for start, stop in itertools.pairwise(self.parts):
            x.zero_()
            x[:, start:stop] = self.unit
            for at, value in zip(zip(*masked, strict=True), (self.huge, -self.huge), strict=False):
                x[rows, torch.tensor(at, device=self.device)] = value
            sums = torch.stack([self._call(line).reshape(()).double() for line in x])
            totals = [total + found / self.unit for total, found in zip(totals, sums.tolist(), strict=True)]
        return totals

    def _call(self, x: Tensor) -> Tensor:
        result = self.fn(x)
        if not isinstance(result, Tensor) or result.numel() != 1 or not result.is_floating_point():
            shown = f"{result.dtype}{list(result.shape)}" if isinstance(result, Tensor) else repr(result)
            raise ValueError(
                f"summation_tree: expected fn to return a floating-point tensor of one element, got {shown}"
            )
        return result

    def _no_sum(self, seen: str) -> ValueError:
        return ValueError(
            f"summation_tree: expected a function that adds its {self.n} inputs in one fixed order, but {seen}; return "
            "the plain sum, neither scaled nor averaged, in the dtype of the accumulator"
        )


def _mask(child: int | SummationTree) -> int:
    return 1 << child if isinstance(child, int) else child._mask


def _size(child: int | SummationTree) -> int:
    return 1 if isinstance(child, int) else child._mask.bit_count()


def _first(child: int | SummationTree) -> int:
    mask = _mask(child)
    return (mask & -mask).bit_length() - 1


def _bits(mask: int) -> list[int]:
    return [i for i, bit in enumerate(reversed(f"{mask:b}")) if bit == "1"]


def _nodes(tree: SummationTree) -> Iterator[SummationTree]:
    """Every addition, each before those under it."""
    stack = [tree]
    while stack:
        node = stack.pop()
        yield node
        stack += [child for child in reversed(node.children) if isinstance(child, SummationTree)]


# What str() prints: words and, as numbers, indices, so that a text can be looked for at other indices.
_Text = list[str | int]


def _text(tree: SummationTree) -> _Text:
    """Down the largest children, listing what is added to them.  The others are small: recursion is never deep."""
    items: list[_Text] = []
    node: int | SummationTree = tree
    while isinstance(node, SummationTree):
        largest, *others = sorted(node.children, key=_size, reverse=True)
        parts = [_item(child) for child in others]
        first = _item(largest) if _size(largest) == min(map(_size, node.children)) else []
        alike = bool(first) and all(_distance(first, part) is not None for part in parts)
        if alike:  # no part is the sum so far, to which the others are added
            parts.insert(0, first)
        items += parts[::-1] if len(node.children) <= 2 else [["{", *_with_commas(_runs(parts)), "}"]]
        if alike:
            break
        node = largest
    else:
        items.append([node])
    runs = _runs(items[::-1])
    if len(runs) > 1:
        return ["chain(", *_with_commas(runs), ")"]
    return ["chain ", *runs[0]] if ".." in runs[0] and isinstance(runs[0][0], int) else runs[0]


def _item(child: int | SummationTree) -> _Text:
    return [child] if isinstance(child, int) else ["[", *_text(child), "]"]


def _runs(items: list[_Text]) -> list[_Text]:
    """``items`` with repetitions written short: of one item, or of a few in turn."""
    runs = []
    while items:
        period, times, step = max((_repeats(items, period) for period in range(1, 9)), key=lambda r: r[0] * r[1])
        is_index = period == 1 and len(items[0]) == 1
        if is_index and times == 2 and abs(step) > 1:
            times = 1
        block, last = items[:period], items[period * times - 1]
        items = items[period * times :]
        by = "" if is_index and abs(step) == 1 else f" by {step}"
        once = block[0] if period == 1 else ["(", *_with_commas(block), ")"]
        if times == 1:
            runs.append(once)
        elif is_index:
            runs.append([*once, "..", *last, by])
        else:
            runs.append([f"{times} x ", *once, by])
    return runs


def _repeats(items: list[_Text], period: int) -> tuple[int, int, int]:
    """How often the first ``period`` items come in a row, each time so far from the last: period, times, distance."""
    step = _distance(items[0], items[period]) if period < len(items) else None
    end = period
    while step is not None and end < len(items) and _distance(items[end - period], items[end]) == step:
        end += 1
    times = end // period
    return (period, times, step or 0) if times > 1 else (1, 1, 0)


def _distance(a: _Text, b: _Text) -> int | None:
    """How far ``b`` is from ``a``, if it is the same at other indices."""
    if len(a) != len(b):
        return None
    steps = set()
    for x, y in zip(a, b, strict=True):
        if isinstance(x, int) and isinstance(y, int):
            steps.add(y - x)
        elif x != y:
            return None
    return steps.pop() if len(steps) == 1 else None


def _with_commas(texts: list[_Text]) -> _Text:
    return [part for text in texts for part in (", ", *text)][1:]


def _listed(mask: int) -> str:
    """A set of indices in words, cut after the first few."""
    runs = _runs([[i] for i in _bits(mask)])
    return "".join(map(str, _with_commas(runs[:4]))) + (", ..." if len(runs) > 4 else "")
