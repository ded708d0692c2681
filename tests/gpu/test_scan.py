"""Scans on the GPU: the bits of their references, whatever surrounds a row."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import bicompile.lowering.scan.op  # noqa: F401 (registers the ops)
from bicompile.lowering.gpu import plans
from bicompile.lowering.gpu.admission import equal_bits
from bicompile.lowering.scan import gpu, reference
from bicompile.lowering.scan.schedule import ScanSchedule
from bicompile.testing.layouts import LAYOUTS, lay_out

ops = torch.ops.bicompile


def drawn(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    g = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64, device="cuda").to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "dim"), [((300, 20), 1), ((5, 5000), 1), ((5000, 5), 0), ((3, 150, 40), 1), ((), 0)])
def test_sums_and_products_have_the_bits_of_their_references(shape: tuple[int, ...], dim: int, dtype: torch.dtype):
    x = drawn(shape, dtype)
    assert equal_bits(ops.cumsum(x, dim, dtype).cpu(), reference.gpu_cumsum(x.cpu(), dim, dtype))
    near_one = 1 + x / 1000
    assert equal_bits(ops.cumprod(near_one, dim, dtype).cpu(), reference.gpu_cumprod(near_one.cpu(), dim, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "n"), [(2000, 50), (40, 4096), (3, 152_064)])
def test_row_has_the_same_bits_in_any_batch(rows: int, n: int, dtype: torch.dtype):
    x = drawn((rows, n), dtype)

    def results(x: Tensor) -> Tensor:
        return torch.stack([ops.cumsum(x, 1, dtype), ops.cumprod(x, 1, dtype), ops.logcumsumexp(x, 1)], 1)

    whole = results(x)
    order = torch.randperm(rows, device="cuda")
    assert equal_bits(results(x[order]), whole[order])
    for row in (0, rows - 1):
        poisoned = torch.full_like(x, math.nan)
        poisoned[row] = x[row]
        assert equal_bits(results(x[row : row + 1])[0], whole[row])
        assert equal_bits(results(poisoned)[row], whole[row])
    assert equal_bits(results(x[:, : n // 3])[1], whole[1, :, : n // 3])  # a result does not see what follows


def test_memory_layout_does_not_show():
    x = drawn((3, 40, 96), torch.bfloat16)
    for dim in range(3):
        expected = ops.cumsum(x, dim, x.dtype), ops.logcumsumexp(x, dim)
        for layout in LAYOUTS:
            y = lay_out(x, layout)
            assert equal_bits(ops.cumsum(y, dim, x.dtype), expected[0])
            assert equal_bits(ops.logcumsumexp(y, dim), expected[1])


def test_no_schedule_shows(monkeypatch: pytest.MonkeyPatch):
    x = drawn((7, 5000), torch.float32)
    expected = ops.logcumsumexp(x, 1)
    for schedule in (ScanSchedule(32, 1, 4), ScanSchedule(256, 8, 16), ScanSchedule(64, 4, 1)):
        plans._PLANS.clear()
        monkeypatch.setattr(gpu, "schedule_for", lambda _, schedule=schedule: schedule)
        assert equal_bits(ops.logcumsumexp(x, 1), expected), schedule
    plans._PLANS.clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_nearly_as_good_as_torchs(dtype: torch.dtype):
    x = drawn((20, 30_000), dtype)
    for ours, stock, exact in (
        (ops.cumsum(x, 1, dtype), x.cumsum(1), x.double().cumsum(1)),
        (ops.logcumsumexp(x, 1), x.logcumsumexp(1), x.double().logcumsumexp(1)),
    ):
        error, theirs = (((t.double() - exact).abs() / exact.abs().amax()).max().item() for t in (ours, stock))
        assert error <= 2 * theirs + torch.finfo(dtype).eps


def test_ops_pass_opcheck():
    x = drawn((3, 40), torch.bfloat16)
    torch.library.opcheck(ops.cumsum.default, (x, 1, torch.float32))
    torch.library.opcheck(ops.logcumsumexp.default, (x, 0))
