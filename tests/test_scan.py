"""cumsum, cumprod and logcumsumexp: one running value per row, whatever surrounds the row."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import bicompile.lowering.scan.op  # noqa: F401 (registers the ops)
from bicompile.lowering.scan import reference
from bicompile.lowering.scan.order import order_for
from bicompile.testing import same_bits

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ops = torch.ops.bicompile


def spread(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Normal values over 16 binades."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    return (x * torch.exp2(torch.randint(-8, 8, shape, generator=g).double())).to(dtype)


def log_add_exp(a: Tensor, b: Tensor) -> Tensor:
    """One step in double, by the op itself on rows of two: the tests of values look at the step."""
    return ops.logcumsumexp(torch.stack([a, b], -1), -1)[..., 1]


@st.composite
def tensors(draw: st.DrawFn) -> tuple[Tensor, int]:
    """A tensor of any rank, dtype and layout, and one of its dims."""
    shape = tuple(draw(st.lists(st.sampled_from([0, 1, 2, 3, 5, 17, 40, 70]), max_size=3), label="shape"))
    x = spread(shape, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 2**31)))
    layout = draw(st.sampled_from(["contiguous", "transposed", "sliced", "expanded"]), label="layout")
    if layout == "transposed" and x.dim() > 1:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    elif layout == "sliced" and x.dim():
        x = torch.cat([x, x], -1)[..., 1 : x.shape[-1] + 1]
    elif layout == "expanded" and x.dim() > 1 and x.shape[0]:
        x = x[:1].expand(shape)
    rank = max(x.dim(), 1)
    return x, draw(st.integers(-rank, rank - 1), label="dim")


OPS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "cumsum": lambda x, dim: ops.cumsum(x, dim, x.dtype),
    "cumprod": lambda x, dim: ops.cumprod(x, dim, x.dtype),
    "logcumsumexp": lambda x, dim: ops.logcumsumexp(x, dim),
}
every_op = pytest.mark.parametrize("name", OPS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def test_order_sees_the_dtype_only():
    assert list(inspect.signature(order_for).parameters) == ["dtype"]


@given(case=tensors(), data=st.data())
def test_sums_and_products_are_those_of_the_reference(case: tuple[Tensor, int], data: st.DataObject):
    x, dim = case
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    for name in ("cumsum", "cumprod"):
        result = getattr(ops, name)(x, dim, dtype)
        assert same_bits(result, getattr(reference, name)(x, dim, dtype))
        assert result.is_contiguous()


@given(case=tensors())
def test_log_sums_are_those_of_the_reference(case: tuple[Tensor, int]):
    x, dim = case
    if x.element_size() == 2:  # their running value is a float, and log_add_exp() steps in double
        x = x.float()
    assert same_bits(ops.logcumsumexp(x, dim), reference.logcumsumexp(x, dim, log_add_exp))


@every_op
@given(case=tensors(), data=st.data())
def test_row_has_same_bits_in_any_batch(name: str, case: tuple[Tensor, int], data: st.DataObject):
    x, dim = case
    if x.dim() < 2 or 0 in x.shape:
        return
    rows = 0 if dim % x.dim() else 1  # a dim that is not scanned
    row = data.draw(st.integers(0, x.shape[rows] - 1), label="row")
    order = torch.tensor(data.draw(st.permutations(range(x.shape[rows])), label="order"))
    whole = OPS[name](x, dim)
    alone = OPS[name](x.narrow(rows, row, 1), dim)
    assert same_bits(alone, whole.narrow(rows, row, 1))
    assert same_bits(OPS[name](x.index_select(rows, order), dim), whole.index_select(rows, order))
    poisoned = torch.full_like(x, math.nan, memory_format=torch.contiguous_format)
    poisoned.narrow(rows, row, 1).copy_(x.narrow(rows, row, 1))
    assert same_bits(OPS[name](poisoned, dim).narrow(rows, row, 1), alone)


@every_op
@every_dtype
def test_prefix_has_same_bits_in_any_length(name: str, dtype: torch.dtype):
    x = spread((3, 200), dtype, 0)
    whole = OPS[name](x, 1)
    for length in (1, 2, 33, 199):
        assert same_bits(OPS[name](x[:, :length], 1), whole[:, :length])


@every_op
@pytest.mark.parametrize("shape", [(1, 30_000), (300, 300), (3, 40, 700)], ids=str)
def test_threads_change_nothing(name: str, shape: tuple[int, ...], set_threads: Callable[[int], None]):
    x = spread(shape, torch.float32, 1)
    results = []
    for threads in (1, 2, 4):
        set_threads(threads)
        results.append([OPS[name](x, dim) for dim in range(len(shape))])
    assert same_bits(results[1], results[0])
    assert same_bits(results[2], results[0])


@every_dtype
@pytest.mark.parametrize("name", ["cumsum", "logcumsumexp"])
def test_values_are_no_worse_than_stock(name: str, dtype: torch.dtype):
    x = spread((20, 500), dtype, 2).abs() / 16
    wide = {"cumsum": torch.cumsum, "logcumsumexp": torch.logcumsumexp}[name]
    stock = wide(x, 1).double()
    # What is judged in float64 itself: a double is the best there is, and both are within its rounding.
    exact = wide(x.double(), 1)
    floor = torch.finfo(torch.float64).eps * 500 * exact.abs().max()
    ours = OPS[name](x, 1).double()
    assert (ours - exact).abs().max() <= 1.01 * (stock - exact).abs().max() + floor
    assert ((ours - exact).abs() / exact.abs()).max() <= torch.finfo(dtype).eps * (1 if dtype != torch.float64 else 500)


@every_dtype
def test_log_sum_of_two_is_right_to_the_last_places(dtype: torch.dtype):
    a, b = spread((1000,), dtype, 3), spread((1000,), dtype, 4)
    exact = torch.logaddexp(a.double(), b.double())
    ours = ops.logcumsumexp(torch.stack([a, b]), 0)[1].double()
    larger = torch.maximum(exact.abs(), torch.maximum(a, b).double().abs())
    assert ((ours - exact).abs() / larger).max() <= 2 * torch.finfo(dtype).eps


def test_infinities_and_nans_stay_in_their_row():
    inf, nan = math.inf, math.nan
    x = torch.tensor([[-inf, -inf, 1, inf, 3], [1, -inf, nan, 2, inf], [0, 1, 2, 3, 4]])
    for dtype in DTYPES:
        result = ops.logcumsumexp(x.to(dtype), 1)
        torch.testing.assert_close(result, torch.logcumsumexp(x.to(dtype), 1), equal_nan=True)
        assert same_bits(ops.cumsum(x, 1, dtype)[2], torch.tensor([0, 1, 3, 6, 10], dtype=dtype))


@every_dtype
def test_nan_is_the_canonical_one(dtype: torch.dtype):
    x = torch.full((3, 40), math.nan, dtype=dtype).neg()
    for op in OPS.values():
        for dim in (0, 1):
            assert same_bits(op(x, dim), torch.full((3, 40), math.nan, dtype=dtype))


@pytest.mark.parametrize("x", [torch.arange(6), torch.tensor([True, False, True])], ids=["int64", "bool"])
def test_integers_are_converted_first(x: Tensor):
    assert same_bits(ops.cumsum(x, 0, torch.float32), x.cumsum(0).float())


@every_op
@every_dtype
def test_opcheck(name: str, dtype: torch.dtype):
    x = spread((4, 5, 6), dtype, 5)
    for given_x, dim in ((x, 1), (x.transpose(0, 2), -1), (x[:0], 0), (x[0, 0, 0], 0)):
        args = (given_x, dim) if name == "logcumsumexp" else (given_x, dim, dtype)
        torch.library.opcheck(getattr(ops, name).default, args)


@every_op
def test_compiled_call_has_the_bits_of_a_plain_one(name: str):
    x = spread((3, 40), torch.float32, 6)
    compiled = torch.compile(lambda x: OPS[name](x, 1), backend="aot_eager", fullgraph=True, dynamic=True)
    assert same_bits(compiled(x), OPS[name](x, 1))


@pytest.mark.parametrize("fake", [False, True], ids=["real", "meta"])
def test_wrong_arguments_are_named(fake: bool):
    x = torch.ones(2, 3, device="meta" if fake else "cpu")
    with pytest.raises(RuntimeError, match=r"cumsum: expected a dim in \[-2, 2\)"):
        ops.cumsum(x, 2, torch.float32)
    with pytest.raises(RuntimeError, match="cumprod: expected float32, float64, bfloat16 or float16"):
        ops.cumprod(x, 1, torch.int64)
    with pytest.raises(RuntimeError, match="logcumsumexp: expected float32, float64, bfloat16 or float16"):
        ops.logcumsumexp(x.long(), 1)


def results_on_any_processor() -> list[Tensor]:
    """For tests/test_instruction_sets.py."""
    xs = [spread((7, 90), dtype, 7) for dtype in DTYPES]
    return [op(x, d) for x in xs for d in range(x.dim()) for op in OPS.values()]
