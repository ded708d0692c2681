"""Softmax and its gradient on the GPU: the same bits whatever surrounds a row, under every schedule."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bicompile
import bicompile.lowering.softmax.op  # noqa: F401 (registers the ops)
from bicompile.lowering.gpu import plans
from bicompile.lowering.gpu.admission import equal_bits
from bicompile.lowering.reduction import gpu_statistics
from bicompile.lowering.reduction.schedule import RowSchedule
from bicompile.lowering.softmax import gpu
from bicompile.testing.layouts import LAYOUTS, lay_out

ops = torch.ops.bicompile


def drawn(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    g = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(shape, generator=g, dtype=torch.float64, device="cuda") * 5).to(dtype)


def both(x: Tensor, grad: Tensor, dim: int, log: bool) -> Tensor:
    """Result and gradient, stacked in front."""
    y = ops.softmax(x, dim, log, x.dtype)
    return torch.stack([y, ops.softmax_backward(grad, y, dim, log, x.dtype)])


@pytest.mark.parametrize(("dtype", "log"), [(torch.bfloat16, False), (torch.float32, True)])
@pytest.mark.parametrize(("rows", "n"), [(3000, 50), (700, 4096), (17, 50257), (1100, 20_001), (5, 600_000)])
def test_row_has_the_same_bits_in_any_batch(rows: int, n: int, dtype: torch.dtype, log: bool):
    x, grad = drawn((rows, n), dtype), drawn((rows, n), dtype, 1)
    whole = both(x, grad, 1, log)
    order = torch.randperm(rows, device="cuda")
    assert equal_bits(both(x[order], grad[order], 1, log), whole[:, order])
    assert equal_bits(both(x, grad, 1, log), whole)
    for row in (0, rows - 1):
        assert equal_bits(both(x[row : row + 1], grad[row : row + 1], 1, log), whole[:, row : row + 1])
        poisoned = torch.full_like(x, math.nan)
        poisoned[row] = x[row]
        assert equal_bits(both(poisoned, grad, 1, log)[:, row], whole[:, row])


@pytest.mark.parametrize("n", [50, 20_000])
def test_no_schedule_shows(n: int, monkeypatch: pytest.MonkeyPatch):
    x, grad = drawn((37, n), torch.bfloat16), drawn((37, n), torch.bfloat16, 1)
    expected = both(x, grad, 1, True)
    for schedule in (RowSchedule(1, 1), RowSchedule(1, 16), RowSchedule(4, 4)):
        if schedule.rows > 1 and n > 1024:
            continue
        plans._PLANS.clear()
        for module in (gpu, gpu_statistics):
            monkeypatch.setattr(module, "row_schedule_for", lambda *_, schedule=schedule: schedule)
        monkeypatch.setattr(gpu, "long_row_warps_for", lambda *_: None)
        assert equal_bits(both(x, grad, 1, True), expected), schedule
        monkeypatch.setattr(gpu, "long_row_warps_for", lambda *_, schedule=schedule: schedule.warps)
        plans._PLANS.clear()
        assert equal_bits(both(x, grad, 1, True), expected), f"{schedule.warps} warps, rows whole"
    plans._PLANS.clear()


def test_layouts_and_dims_do_not_show():
    """Traps 13, 14 and 29."""
    x, grad = drawn((3, 40, 96), torch.bfloat16), drawn((3, 40, 96), torch.bfloat16, 1)
    for dim in range(3):
        expected = both(x, grad, dim, False)
        for layout in LAYOUTS:
            assert equal_bits(both(lay_out(x, layout), lay_out(grad, layout), dim, False), expected), (layout, dim)
        last = both(x.movedim(dim, -1).contiguous(), grad.movedim(dim, -1).contiguous(), -1, False)
        assert equal_bits(last.movedim(-1, dim + 1), expected)
    ones = torch.ones((), device="cuda", dtype=x.dtype).expand(x.shape)
    assert equal_bits(both(x, ones, 2, True), both(x, ones.contiguous(), 2, True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("n", [64, 4096, 50257])
def test_values_are_nearly_as_good_as_torchs(n: int, dtype: torch.dtype):
    x, grad = drawn((50, n), dtype), drawn((50, n), dtype, 1)
    for log, stock in ((False, torch.softmax), (True, torch.log_softmax)):
        y, dx = both(x, grad, 1, log)
        found = []
        for wide in (x.double(), x):
            leaf = wide.clone().requires_grad_()
            result = stock(leaf, 1)
            result.backward(grad.to(wide.dtype))
            found.append((result.detach(), leaf.grad))
        (exact_y, exact_dx), (stock_y, stock_dx) = found
        # In float64 stock has the very bits of what is taken for exact.
        eps = 1e-14 if dtype == torch.float64 else torch.finfo(dtype).eps
        for ours, theirs, exact, scale in (
            (y, stock_y, exact_y, exact_y.abs()),
            (dx, stock_dx, exact_dx, gradient_terms(exact_y, grad.double(), log)),
        ):
            scale = scale.amax(1, keepdim=True)
            error, theirs_error = (((t.double() - exact).abs() / scale).max().item() for t in (ours, theirs))
            assert error <= 2 * theirs_error + 2 * eps, log


def gradient_terms(y: Tensor, grad: Tensor, log: bool) -> Tensor:
    """The size of what is subtracted for the gradient.

    Where one probability of a row is close to 1, the gradient itself is far smaller, and its error, in any program, is
    that of the terms that cancel.
    """
    if log:
        return grad.abs() + y.exp() * grad.sum(1, keepdim=True).abs()
    return y * (grad.abs() + (y * grad.abs()).sum(1, keepdim=True))


def test_small_probabilities_are_accurate():
    """Relative to themselves: the exponential's error must not grow with the distance from the largest element."""
    x = torch.linspace(-80, 0, 4096, device="cuda").view(1, -1)
    exact = torch.softmax(x.double(), 1)
    error = ((ops.softmax(x, 1, False, x.dtype).double() - exact).abs() / exact).max().item()
    assert error < 6e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("n", [50, 9000, 600_000])
def test_statistics_are_what_a_log_softmax_subtracts(n: int, dtype: torch.dtype):
    x = drawn((5, n), dtype)
    for y, dim in ((x, 1), (x.T, 0), (x.T.contiguous(), 0)):
        shift, log_total = (t.unsqueeze(dim) for t in ops.softmax_statistics(y, dim))
        assert equal_bits((y.to(shift.dtype) - shift) - log_total, ops.softmax(y, dim, True, shift.dtype))


def test_cross_entropy_has_the_same_bits_compiled_and_not_and_rows_keep_theirs():
    x, target = drawn((9, 5000), torch.bfloat16), torch.arange(9, device="cuda") * 500
    target[3] = -100

    def loss(x: Tensor) -> Tensor:
        return F.cross_entropy(x.float(), target[: len(x)], reduction="none")

    def gradient(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(fn(x).sum(), x)[0]

    compiled = torch.compile(loss, backend="batch_invariant", dynamic=True)
    with bicompile.eager():
        values, gradients = loss(x), gradient(loss, x)
    assert equal_bits(compiled(x), values) and equal_bits(gradient(compiled, x), gradients)
    assert equal_bits(compiled(x[:4]), values[:4]) and equal_bits(gradient(compiled, x[:4]), gradients[:4])
    torch.testing.assert_close(gradients, gradient(loss, x))


@pytest.mark.parametrize("n", [20, 9000])
def test_special_rows_come_out_as_in_torch(n: int):
    x = drawn((5, n), torch.float32)
    x[0] = -math.inf
    x[1, 3], x[2, n - 1], x[3, 0] = math.inf, math.nan, -math.inf
    for log, stock in ((False, torch.softmax), (True, torch.log_softmax)):
        ours = ops.softmax(x, 1, log, x.dtype)
        assert torch.allclose(ours, stock(x, 1), rtol=1e-5, atol=1e-6, equal_nan=True)
    assert (ops.softmax(x, 1, False, x.dtype, True)[0] == 0).all()


def test_ops_pass_opcheck():
    x = drawn((3, 40), torch.bfloat16)
    torch.library.opcheck(ops.softmax.default, (x, 1, False, torch.float32))
    torch.library.opcheck(ops.softmax_backward.default, (x, x, 0, True, torch.bfloat16))
