"""Softmax, log-softmax and their gradients over any dim."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_reduction import DTYPES, poison, spread, tensors, worst_error
from torch import Tensor

import bicompile.lowering.softmax.op  # noqa: F401 (registers the ops)
from bicompile.lowering.softmax import reference
from bicompile.lowering.softmax.order import order_for
from bicompile.testing import same_bits
from bicompile.testing.layouts import LAYOUTS, lay_out

ops = torch.ops.bicompile


def all_results(x: Tensor) -> list[Tensor]:
    """Every op over every dim of ``x``."""
    results = []
    for dim in range(x.dim()):
        for log in (False, True):
            y = ops.softmax(x, dim, log, x.dtype)
            results += [y, ops.softmax_backward(x, y, dim, log, x.dtype)]
    return results


def results_on_any_processor() -> list[Tensor]:
    """For tests/test_instruction_sets.py."""
    return [result for dtype in DTYPES for result in all_results(spread((7, 5, 133), dtype, 3))]


def test_order_sees_one_row_only():
    assert list(inspect.signature(order_for).parameters) == ["n", "dtype"]


@given(x=tensors(), dtype=st.sampled_from(DTYPES), data=st.data())
def test_softmax_has_the_bits_of_its_reference(x: Tensor, dtype: torch.dtype, data: st.DataObject):
    """Trap 23, softmax's dtype; trap 29, a dim other than the last."""
    dim = data.draw(st.integers(-max(x.dim(), 1), max(x.dim() - 1, 0)), label="dim")
    log, safe = data.draw(st.sampled_from([(False, False), (True, False), (False, True)]), label="log, safe")
    ours = ops.softmax(x, dim, log, dtype, safe)
    assert same_bits(ours, reference.softmax(x, dim, log, dtype, safe))
    assert ours.is_contiguous()


@given(y=tensors(), dtype=st.sampled_from(DTYPES), log=st.booleans(), data=st.data())
def test_gradient_has_the_bits_of_its_reference(y: Tensor, dtype: torch.dtype, log: bool, data: st.DataObject):
    dim = data.draw(st.integers(-max(y.dim(), 1), max(y.dim() - 1, 0)), label="dim")
    grad = spread(tuple(y.shape), data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(0, 2**31)))
    grad = lay_out(grad, data.draw(st.sampled_from(LAYOUTS)))
    ours = ops.softmax_backward(grad, y, dim, log, dtype)
    if y.numel():
        assert same_bits(ours, reference.softmax_backward(grad, y, dim, log, dtype))


@given(
    rows=st.integers(1, 40), n=st.sampled_from([1, 3, 32, 33, 64, 300]), dtype=st.sampled_from(DTYPES), data=st.data()
)
def test_row_has_the_same_bits_in_any_batch(rows: int, n: int, dtype: torch.dtype, data: st.DataObject):
    """Trap 9 and trap 20; along the last dim and across it."""
    x = spread((rows, n), dtype, data.draw(st.integers(0, 2**31)))
    row, order = data.draw(st.integers(0, rows - 1)), torch.tensor(data.draw(st.permutations(range(rows))))
    poisoned = torch.full_like(x, math.nan)
    poisoned[row] = x[row]
    for log in (False, True):
        whole = ops.softmax(x, 1, log, dtype)
        for part, expected in ((x[row : row + 1], whole[row : row + 1]), (x[order], whole[order])):
            assert same_bits(ops.softmax(part, 1, log, dtype), expected)
            assert same_bits(ops.softmax(part.t(), 0, log, dtype).t(), expected)
        assert same_bits(ops.softmax(poisoned, 1, log, dtype)[row], whole[row])


@given(
    shape=st.lists(st.sampled_from([1, 2, 7, 40, 65]), min_size=1, max_size=3),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_memory_layout_does_not_show(shape: list[int], dtype: torch.dtype, data: st.DataObject):
    """Trap 13."""
    x = spread(tuple(shape), dtype, data.draw(st.integers(0, 2**31)))
    expected = all_results(x)
    for layout in LAYOUTS:
        assert same_bits(all_results(lay_out(x, layout)), expected), layout


def test_threads_do_not_show(set_threads: Callable[[int], None]):
    """Trap 20, one wide row among them."""
    found = []
    for threads in (1, 2, 4):
        set_threads(threads)
        found.append([all_results(spread(shape, torch.float32, 0)) for shape in ((1, 20_000), (65, 513))])
    assert same_bits(found[0], found[1])
    assert same_bits(found[0], found[2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("log", [False, True])
def test_values_are_as_good_as_torchs(dtype: torch.dtype, dim: int, log: bool):
    x = torch.randn(200, 1000, generator=torch.Generator().manual_seed(1)).mul(4).to(dtype)
    function = torch.log_softmax if log else torch.softmax
    exact, ours = function(x.double(), dim), ops.softmax(x, dim, log, dtype)
    scale, eps = exact.abs() + (1 if log else 0), torch.finfo(dtype).eps
    stock = 4 * eps if dtype == torch.float64 else worst_error(function(x, dim), exact, scale)
    assert worst_error(ours, exact, scale) <= 3 * stock + eps


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_gradient_is_that_of_the_torch_function(log: bool, dim: int):
    x = spread((3, 40, 5), torch.float64, 2).requires_grad_()
    grad = spread((3, 40, 5), torch.float64, 3)
    y = (torch.log_softmax if log else torch.softmax)(x, dim)
    (expected,) = torch.autograd.grad(y, x, grad)
    ours = ops.softmax_backward(grad, ops.softmax(x.detach(), dim, log, x.dtype), dim, log, x.dtype)
    assert torch.allclose(ours, expected, rtol=1e-11, atol=1e-10)


def test_masked_rows_come_out_as_in_torch():
    x = torch.randn(6, 50)
    x[0] = -math.inf
    x[1, ::2] = -math.inf
    x[2, 3] = math.nan
    x[3, 3] = math.inf
    x[4, :] = -math.inf
    x[4, 7] = math.nan
    for dim in (0, 1):
        y = x.t() if dim == 0 else x
        assert torch.equal(ops.softmax(y, dim, False, x.dtype).isnan(), y.softmax(dim).isnan())
        assert torch.equal(ops.softmax(y, dim, True, x.dtype).isnan(), y.log_softmax(dim).isnan())
        safe, stock = ops.softmax(y, dim, False, x.dtype, True), torch.ops.aten._safe_softmax(y, dim)
        assert torch.equal(safe.isnan(), stock.isnan())
        assert torch.equal(safe.select(1 - dim, 0), torch.zeros(50))


def test_poisoned_rows_stay_alone():
    x = spread((40, 70), torch.float32, 7)
    y = poison(x, 7)
    untouched = (x.view(torch.int32) == y.view(torch.int32)).all(1)
    assert 0 < untouched.sum() < 40
    assert same_bits(ops.softmax(y, 1, False, y.dtype)[untouched], ops.softmax(x, 1, False, x.dtype)[untouched])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: ops.softmax(x, 2, False, x.dtype), r"softmax: expected a dim in \[-2, 1\], got 2"),
        (lambda x: ops.softmax(x.long(), 1, False, torch.float32), "softmax: expected x in float32"),
        (lambda x: ops.softmax(x, 1, False, torch.int32), "softmax: expected dtype in float32"),
        (lambda x: ops.softmax(x, 1, True, x.dtype, True), "softmax: expected log or safe, got both"),
        (lambda x: ops.softmax_backward(x[0], x, 1, False, x.dtype), "softmax_backward: expected grad and y of one"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bad_arguments_are_named(call: Callable[[Tensor], object], message: str, device: str):
    with pytest.raises((RuntimeError, ValueError, TypeError, IndexError), match=message):
        call(torch.ones(2, 3, device=device))


def test_ops_pass_opcheck():
    x = spread((3, 40), torch.bfloat16, 6)
    torch.library.opcheck(ops.softmax.default, (x, 0, True, torch.float32))
    torch.library.opcheck(ops.softmax.default, (x, -1, False, torch.bfloat16, True))
    torch.library.opcheck(ops.softmax_backward.default, (x, x, 1, False, torch.bfloat16))
