"""The GPU's softmax and its gradient, under Triton's interpreter."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

from bicompile.lowering.gpu import plans
from bicompile.lowering.softmax import gpu

SHAPES = [((3, 1), 1), ((3, 33), 1), ((1, 2049), -1), ((1, 9000), 1), ((1, 7, 5), 1), ((2, 2, 1, 5), 0), ((), 0)]


def drawn(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 5).to(dtype)


@pytest.mark.parametrize(("shape", "dim"), SHAPES)
@pytest.mark.parametrize("log", [False, True])
def test_softmax_and_its_gradient_are_right(shape: tuple[int, ...], dim: int, log: bool):
    stock = torch.log_softmax if log else torch.softmax
    for dtype, out in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        x, grad = drawn(shape, dtype), drawn(shape, dtype, 1)
        wide = x.double().requires_grad_()
        expected = stock(wide, dim)
        expected.backward(grad.double())
        ours = gpu.softmax(x, dim, log, out)
        assert ours.is_contiguous() and torch.allclose(ours.double(), expected, rtol=1e-5, atol=1e-6)
        gradient = gpu.softmax_backward(grad, ours, dim, log, out)
        assert gradient.is_contiguous() and torch.allclose(gradient.double(), wide.grad, rtol=1e-4, atol=1e-5)


def test_layouts_do_not_show():
    x = drawn((4, 300), torch.bfloat16)
    expected = gpu.softmax(x, 1, False, torch.bfloat16)
    for y in (torch.stack([x, x], -1)[..., 0], x.T.contiguous().T, torch.cat([x, x], 1)[:, 300:]):
        assert torch.equal(gpu.softmax(y, 1, False, torch.bfloat16), expected)
    assert torch.equal(gpu.softmax(x.T, 0, False, torch.bfloat16), expected.T)
    expanded = x[:1].expand(4, 300)
    assert torch.equal(gpu.softmax(expanded, 1, False, torch.bfloat16)[3], expected[0])


@pytest.mark.parametrize("n", [20, 9000])
def test_special_rows_come_out_as_in_torch(n: int):
    x = drawn((3, n), torch.float32)
    x[0] = -math.inf
    x[1, 3], x[2, n - 1] = math.inf, math.nan
    for log, stock in ((False, torch.softmax), (True, torch.log_softmax)):
        ours = gpu.softmax(x, 1, log, torch.float32)
        assert torch.allclose(ours, stock(x, 1), rtol=1e-5, atol=1e-6, equal_nan=True)
    safe = gpu.softmax(x, 1, False, torch.float32, True)
    assert (safe[0] == 0).all() and safe[1].isnan().all()


def test_nothing_gives_nothing():
    for shape in ((0, 4), (4, 0)):
        x = torch.empty(shape)
        assert gpu.softmax(x, 1, False, torch.float32).shape == shape
        assert gpu.softmax_backward(x, x, 1, False, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(("shape", "dim"), [((3, 33), 1), ((1, 9000), 1), ((2, 7, 5), 1), ((), 0), ((2, 0), 1)])
def test_statistics_are_what_a_log_softmax_subtracts(shape: tuple[int, ...], dim: int):
    x = drawn(shape, torch.bfloat16)
    shift, log_total = gpu.softmax_statistics(x, dim)
    whole = gpu.softmax(x, dim, True, torch.float32)
    if x.dim():
        x, shift, log_total = x.float(), shift.unsqueeze(dim), log_total.unsqueeze(dim)
    assert torch.equal((x - shift) - log_total, whole)


@pytest.mark.parametrize("log", [False, True])
def test_many_long_rows_have_the_bits_of_few(log: bool, monkeypatch: pytest.MonkeyPatch):
    x, grad = drawn((3, 9000), torch.bfloat16), drawn((3, 9000), torch.float32, 1)
    x[0, :8192], x[1] = -math.inf, -math.inf  # a section and a row of nothing
    expected = gpu.softmax(x, 1, log, torch.float32)
    expected_grad = gpu.softmax_backward(grad, expected, 1, log, torch.float32)
    launched = []
    for name in ("_long_softmax", "_long_backward"):
        plan = getattr(gpu, name)
        monkeypatch.setattr(gpu, name, lambda *args, plan=plan, name=name: launched.append(name) or plan(*args))
    monkeypatch.setattr(gpu, "long_row_warps_for", lambda *_: 8)
    plans._PLANS.clear()
    same = functools.partial(torch.allclose, rtol=0, atol=0, equal_nan=True)
    assert same(gpu.softmax(x, 1, log, torch.float32), expected)
    assert same(gpu.softmax_backward(grad, expected, 1, log, torch.float32), expected_grad)
    assert launched == ["_long_softmax", "_long_backward"]
    plans._PLANS.clear()
