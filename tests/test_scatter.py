"""Scatters: a destination's contributions in the order of the source, whatever else is scattered."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import bicompile.lowering.scatter.op  # noqa: F401 (registers the ops)
from bicompile.lowering.scatter import reference
from bicompile.lowering.scatter.order import order_for
from bicompile.testing import same_bits

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
REDUCTIONS = ("sum", "prod", "mean", "amax", "amin")
SIZES = st.sampled_from([0, 1, 2, 3, 5, 17, 40])
ops = torch.ops.bicompile


def spread(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Normal values over 16 binades."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    return (x * torch.exp2(torch.randint(-8, 8, shape, generator=g).double())).to(dtype)


def indices(shape: tuple[int, ...], count: int, seed: int, least: int = 0) -> Tensor:
    return torch.randint(least, max(count, 1), shape, generator=torch.Generator().manual_seed(seed))


def strided(x: Tensor, layout: str) -> Tensor:
    """``x`` with other strides, the same values."""
    if layout == "transposed" and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced" and x.dim():
        return torch.cat([x, x], -1)[..., x.shape[-1] :]
    return x


LAYOUTS = st.sampled_from(["contiguous", "transposed", "sliced"])


@st.composite
def scatters(draw: st.DrawFn) -> tuple[Tensor, int, Tensor, Tensor]:
    """``self``, ``dim``, ``index`` and ``src`` as ``scatter_add`` takes them."""
    shape = draw(st.lists(SIZES, max_size=3), label="shape")
    dim = draw(st.integers(-max(len(shape), 1), max(len(shape), 1) - 1), label="dim")
    dtype, seed = draw(st.sampled_from(DTYPES), label="dtype"), draw(st.integers(0, 2**31), label="seed")
    destinations = shape[dim] if shape else 1
    index_shape = [draw(st.integers(0, size)) if draw(st.booleans()) else size for size in shape]
    if shape:
        index_shape[dim] = draw(st.sampled_from([0, 1, 2, 9, 20])) if destinations else 0
    if shape and draw(st.booleans(), label="one index for whole slices"):
        row = [1] * len(shape)
        row[dim] = index_shape[dim]
        index = indices(tuple(row), destinations, seed).expand(index_shape)
    else:
        index = strided(indices(tuple(index_shape), destinations, seed), draw(LAYOUTS))
    src = spread(tuple(size + draw(st.integers(0, 2)) for size in index_shape), dtype, seed)
    self = spread(tuple(shape), dtype, seed + 1)
    return strided(self, draw(LAYOUTS)), dim, index, strided(src, draw(LAYOUTS))


@st.composite
def index_adds(draw: st.DrawFn) -> tuple[Tensor, int, Tensor, Tensor]:
    """``self``, ``dim``, ``index`` and ``source`` as ``index_add`` takes them."""
    shape = draw(st.lists(SIZES, max_size=3), label="shape")
    dim = draw(st.integers(0, max(len(shape), 1) - 1), label="dim")
    dtype, seed = draw(st.sampled_from(DTYPES), label="dtype"), draw(st.integers(0, 2**31), label="seed")
    destinations = shape[dim] if shape else 1
    n = draw(st.sampled_from([0, 1, 2, 9, 33])) if shape and destinations else len(shape) == 0
    index = indices((int(n),), destinations, seed)
    if draw(st.booleans(), label="int32"):
        index = index.int()
    source = spread(tuple(int(n) if d == dim else size for d, size in enumerate(shape)), dtype, seed)
    self = spread(tuple(shape), dtype, seed + 1)
    return strided(self, draw(LAYOUTS)), dim, index, strided(source, draw(LAYOUTS))


every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def test_order_sees_the_dtype_only():
    assert list(inspect.signature(order_for).parameters) == ["dtype"]


@given(case=index_adds(), alpha=st.sampled_from([1.0, -2.5, 0.3]))
def test_index_add_is_that_of_the_reference(case: tuple[Tensor, int, Tensor, Tensor], alpha: float):
    assert same_bits(ops.index_add(*case, alpha), reference.index_add(*case, alpha))


@given(case=scatters())
def test_scatter_add_is_that_of_the_reference(case: tuple[Tensor, int, Tensor, Tensor]):
    assert same_bits(ops.scatter_add(*case), reference.scatter_add(*case))


@given(case=scatters(), reduce=st.sampled_from(REDUCTIONS), include_self=st.booleans())
def test_scatter_reduce_is_that_of_the_reference(
    case: tuple[Tensor, int, Tensor, Tensor], reduce: str, include_self: bool
):
    result = ops.scatter_reduce(*case, reduce, include_self)
    assert same_bits(result, reference.scatter_reduce(*case, reduce, include_self))
    self, dim, index, src = (t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in case)
    stock = torch.scatter_reduce(self, dim, index, src, reduce, include_self=include_self).to(result.dtype)
    if reduce in ("amax", "amin"):  # exact, so the semantics are ATen's to the bit
        assert torch.equal(result, stock)


INDEXINGS: dict[str, tuple[tuple[int, ...], tuple[Any, ...]]] = {
    "first dim": ((5, 4), (indices((7,), 5, 0, -5),)),
    "middle dim": ((3, 5, 4), (None, indices((2, 6), 5, 1, -5))),
    "two dims": ((4, 5, 3), (indices((8,), 4, 2, -4), indices((8,), 5, 3))),
    "broadcast": ((4, 5), (indices((3, 1), 4, 4), indices((6,), 5, 5))),
    "apart": ((4, 5, 3), (indices((8,), 4, 6), None, indices((8,), 3, 7))),
    "last dim": ((2, 3, 4), (None, None, indices((9,), 4, 8).int())),
    "mask": ((4, 5), (torch.arange(20).reshape(4, 5) % 3 == 0,)),
    "mask and index": ((4, 5), (torch.tensor([True, False, True, True]), torch.tensor([1, 1, 0]))),
    "scalar index": ((4, 5), (torch.tensor(-1),)),
    "empty": ((4, 5), (torch.zeros(0, dtype=torch.int64),)),
    "no columns": ((4, 0), (torch.tensor([1, 1]),)),
}


@every_dtype
@pytest.mark.parametrize("name", INDEXINGS)
def test_index_put_is_that_of_the_reference(name: str, dtype: torch.dtype):
    shape, at = INDEXINGS[name]
    self = spread(shape, dtype, 0)
    place = self[tuple(slice(None) if i is None else i for i in at)].shape
    for values in (spread(place, dtype, 1), spread((1,), dtype, 2), spread(place[-1:], dtype, 3)):
        if values.dim() > len(place):
            continue
        for given_self in (self, strided(self, "transposed")):
            result = ops.index_put_accumulate(given_self, at, values)
            assert same_bits(result, reference.index_put_accumulate(self, at, values))
            assert result.is_contiguous()


@every_dtype
@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("width", [1, 5, 130])
def test_embedding_backward_is_that_of_the_reference(dtype: torch.dtype, scale: bool, width: int):
    for shape, padding in (((30,), -1), ((4, 9), 2), ((0,), -1), ((), 0)):
        grad, at = spread((*shape, width), dtype, 0), indices(shape, 6, 1)
        result = ops.embedding_dense_backward(grad, at, 6, padding, scale)
        assert same_bits(result, reference.embedding_dense_backward(grad, at, 6, padding, scale))
        assert padding < 0 or not result[padding].any()


@given(case=scatters(), data=st.data())
def test_row_has_same_bits_in_any_batch(case: tuple[Tensor, int, Tensor, Tensor], data: st.DataObject):
    """Trap 30: what is scattered in one row knows nothing of the rows before it."""
    self, dim, index, src = case
    if self.dim() < 2 or index.numel() == 0:
        return
    rows = 0 if dim % self.dim() else 1  # a dim that is not scattered along
    count = index.shape[rows]
    row = data.draw(st.integers(0, count - 1), label="row")
    order = torch.tensor(data.draw(st.permutations(range(count)), label="order"))

    def call(self: Tensor, index: Tensor, src: Tensor) -> tuple[Tensor, ...]:
        everything = [ops.scatter_reduce(self, dim, index, src, reduce, True) for reduce in REDUCTIONS]
        return (ops.scatter_add(self, dim, index, src), *everything)

    self, src = self.narrow(rows, 0, count), src.narrow(rows, 0, count)
    whole = call(self, index, src)
    alone = call(*(t.narrow(rows, row, 1) for t in (self, index, src)))
    assert same_bits(alone, tuple(t.narrow(rows, row, 1) for t in whole))
    moved = call(*(t.index_select(rows, order) for t in (self, index, src)))
    assert same_bits(moved, tuple(t.index_select(rows, order) for t in whole))
    poisoned = torch.full_like(src, math.nan)
    poisoned.narrow(rows, row, 1).copy_(src.narrow(rows, row, 1))
    assert same_bits(tuple(t.narrow(rows, row, 1) for t in call(self, index, poisoned)), alone)


@every_dtype
def test_segment_has_same_bits_whatever_goes_elsewhere(dtype: torch.dtype):
    """Trap 30, in one index: another destination's contributions, between or before, do not enter a sum."""
    source, at = spread((60, 20), dtype, 0), indices((60,), 4, 1)
    zeros = torch.zeros(4, 20, dtype=dtype)
    mine = at == 2
    for whole, alone in (
        (ops.index_add(zeros, 0, at, source, 1.0), ops.index_add(zeros, 0, at[mine], source[mine], 1.0)),
        (
            ops.embedding_dense_backward(source, at, 4, -1, False),
            ops.embedding_dense_backward(source[mine], at[mine], 4, -1, False),
        ),
        (
            ops.scatter_add(zeros, 0, at[:, None].expand(60, 20), source),
            ops.scatter_add(zeros, 0, at[mine][:, None].expand(-1, 20).contiguous(), source[mine]),
        ),
    ):
        assert same_bits(whole[2], alone[2])


def test_every_way_to_name_the_places_gives_the_same_bits():
    for dtype in DTYPES:
        self, source, at = spread((9, 70), dtype, 0), spread((50, 70), dtype, 1), indices((50,), 9, 2)
        whole = ops.index_add(self, 0, at, source, 1.0)
        spread_out = at[:, None].expand(50, 70)
        assert same_bits(ops.scatter_add(self, 0, spread_out, source), whole)
        assert same_bits(ops.scatter_add(self, 0, spread_out.contiguous(), source), whole)
        assert same_bits(ops.index_put_accumulate(self, [at], source), whole)
        assert same_bits(ops.index_add(self.t(), 1, at, source.t(), 1.0).t(), whole)


def test_threads_change_nothing(set_threads: Callable[[int], None]):
    """Trap 17: no atomics, and nothing to see of who added."""
    results = []
    self, source, at = spread((40, 600), torch.float32, 0), spread((500, 600), torch.float32, 1), indices((500,), 40, 2)
    for threads in (1, 2, 4):
        set_threads(threads)
        results.append(
            (
                ops.index_add(self, 0, at, source, 0.5),
                ops.index_add(self.t(), 1, at, source.t(), 1.0),
                ops.scatter_add(self, 0, at[:, None].repeat(1, 600), source),
                ops.scatter_reduce(self.t(), 1, at.repeat(600, 1), source.t(), "mean", False),
                ops.index_put_accumulate(self, [at, at.flip(0)], source[:, 0]),
                ops.embedding_dense_backward(source, at, 40, 3, True),
            )
        )
    assert same_bits(results[1], results[0])
    assert same_bits(results[2], results[0])


@every_dtype
def test_sums_are_no_worse_than_stock(dtype: torch.dtype):
    self, source, at = spread((5, 30), dtype, 0), spread((400, 30), dtype, 1), indices((400,), 5, 2)
    exact = torch.index_add(self.double(), 0, at, source.double())
    stock = torch.index_add(self, 0, at, source).double()
    ours = ops.index_add(self, 0, at, source, 1.0).double()
    floor = torch.finfo(torch.float64).eps * 80 * exact.abs().max()
    assert (ours - exact).abs().max() <= 1.01 * (stock - exact).abs().max() + floor


@every_dtype
def test_nan_is_the_canonical_one(dtype: torch.dtype):
    self = torch.full((3, 40), math.nan, dtype=dtype).neg()
    expected = torch.full((3, 40), math.nan, dtype=dtype)
    assert same_bits(ops.index_add(self, 0, torch.tensor([1]), self[:1], 1.0), expected)
    assert same_bits(ops.scatter_add(self, 1, torch.zeros(3, 1, dtype=torch.int64), self), expected)


def calls() -> dict[str, tuple[Any, ...]]:
    x, at = spread((4, 5, 6), torch.float32, 0), torch.tensor([1, 1, 0])
    return {
        "index_add": (x, 1, at, x[:, :3], 2.0),
        "scatter_add": (x, 1, indices((4, 7, 6), 5, 1), spread((4, 7, 6), torch.float32, 2)),
        "scatter_reduce": (x, -1, indices((4, 5, 9), 6, 1), spread((4, 5, 9), torch.float32, 2), "mean", False),
        "segment_add": (x, at, x[:, :3].clone()),
        "index_put_accumulate": (x.transpose(0, 2), [None, at], torch.ones(3, 4)),
        "embedding_dense_backward": (x[0, :3], at, 4, -1, True),
    }


@pytest.mark.parametrize("name", calls())
def test_opcheck(name: str):
    torch.library.opcheck(getattr(ops, name).default, calls()[name])


def test_compiled_call_has_the_bits_of_a_plain_one():
    def everything(given: dict[str, tuple[Any, ...]]) -> list[Tensor]:
        return [getattr(ops, name)(*arguments) for name, arguments in given.items()]

    compiled = torch.compile(everything, backend="aot_eager", fullgraph=True, dynamic=True)
    assert same_bits(compiled(calls()), everything(calls()))


def test_wrong_arguments_are_named():
    x, at = torch.ones(3, 4), torch.tensor([0, 1])
    out_of_range = torch.tensor([0, 3])
    for message, call in {
        r"index_add: expected indices in \[0, 3\), got 3": lambda: ops.index_add(x, 0, out_of_range, x[:2], 1.0),
        r"index_add: expected indices in \[0, 3\), got -1": lambda: ops.index_add(x, 0, at - 1, x[:2], 1.0),
        "index_add: expected size 2 in dim 0 of source, got 3": lambda: ops.index_add(x, 0, at, x, 1.0),
        "index_add: expected a source of dtype float32": lambda: ops.index_add(x, 0, at, x[:2].double(), 1.0),
        "index_add: expected int64 or int32 indices": lambda: ops.index_add(x, 0, at.float(), x[:2], 1.0),
        r"index_add: expected a dim in \[-2, 2\), got 2": lambda: ops.index_add(x, 2, at, x[:2], 1.0),
        "scatter_add: expected an index no larger": lambda: ops.scatter_add(x, 0, at.expand(5, 2), x),
        "scatter_add: expected index and src of 2 dims": lambda: ops.scatter_add(x, 0, at, x),
        "scatter_add: expected float32, float64": lambda: ops.scatter_add(x.long(), 0, at[None], x.long()),
        "expected reduce to be": lambda: ops.scatter_reduce(x, 0, at[None], x, "median", True),
        "expected a grad of the shape": lambda: ops.embedding_dense_backward(x, at, 3, -1, False),
        r"backward: expected indices in \[0, 1\), got 1": lambda: ops.embedding_dense_backward(x[:2], at, 1, -1, False),
        "expected values that broadcast": lambda: ops.index_put_accumulate(x, [at], torch.ones(3)),
        r"expected indices in \[-3, 3\) for dim 0": lambda: ops.index_put_accumulate(x, [at + 2], x[:2]),
        "expected a mask of shape": lambda: ops.index_put_accumulate(x, [torch.ones(2, dtype=torch.bool)], x[:2]),
        "expected indices for 1 to 2 dims": lambda: ops.index_put_accumulate(x, [at, at, at], x[:2]),
        "segment_add: expected self": lambda: ops.segment_add(x, at, x[:2]),
    }.items():
        with pytest.raises((RuntimeError, ValueError, IndexError), match=message):
            call()


def results_on_any_processor() -> list[Tensor]:
    """For tests/test_instruction_sets.py."""
    cases: list[tuple[str, tuple[Any, ...]]] = []
    for dtype in DTYPES:
        x, source, at = spread((9, 75), dtype, 0), spread((30, 75), dtype, 1), indices((30,), 9, 2)
        everywhere = indices((30, 75), 9, 3)
        cases += [("index_add", (x, 0, at, source, 0.3)), ("embedding_dense_backward", (source, at, 9, 1, True))]
        cases += [("scatter_reduce", (x, 0, everywhere, source, reduce, True)) for reduce in REDUCTIONS]
    return [getattr(ops, name)(*arguments) for name, arguments in cases]
