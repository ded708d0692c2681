"""Grouped products and products of 8-bit floats on a device: the bits of ``mm``, and one order for every batch."""

from __future__ import annotations

import itertools

import pytest
import torch
from matmul_cases import DEVICE, spread
from torch import Tensor

from bicompile.lowering.matmul import gpu, gpu_scaled
from bicompile.lowering.matmul.problem import problem_of
from bicompile.testing import same_bits

ops = torch.ops.bicompile


def _ends(*ends: int) -> Tensor:
    return torch.tensor(ends, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize(
    ("cuts", "dtype"),
    [
        *((cuts, torch.bfloat16) for cuts in ((3, 3, 10, 24), (300, 1400, 1401, 2000), (0, 0, 0, 0))),
        *(((0, 200, 201, 700), dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)),
    ],
    ids=str,
)
def test_each_group_has_the_bits_of_mm(cuts, dtype):
    rows = max(cuts[-1], 1) + 5
    bounds = [slice(start, end) for start, end in itertools.pairwise((0, *cuts))]
    x, weights = spread(rows, 520, dtype=dtype), spread(4, 328, 520, dtype=dtype, seed=1).transpose(1, 2)
    for w in (weights, weights.contiguous()):
        out = ops.grouped_mm(x, w, _ends(*cuts))
        for g, group in enumerate(bounds):
            assert same_bits(out[group], ops.mm(x[group], w[g]))
        assert not out[cuts[-1] :].any()
    left, right = spread(rows, 72, dtype=dtype).t(), spread(rows, 136, dtype=dtype, seed=1)
    out = ops.grouped_mm(left, right, _ends(*cuts))
    for g, group in enumerate(bounds):
        assert same_bits(out[g], ops.mm(left[:, group], right[group]))
    stack = spread(4, 72, 136, dtype=dtype)
    out = ops.grouped_mm(stack, right.t(), _ends(*cuts))
    for g, group in enumerate(bounds):
        assert same_bits(out[:, group], ops.mm(stack[g], right.t()[:, group]))


def test_many_experts_with_a_token_each():
    x, weights = spread(128, 256), spread(128, 256, 64, seed=1)
    out = ops.grouped_mm(x, weights, torch.arange(1, 129, dtype=torch.int64, device=DEVICE))
    assert same_bits(out, ops.bmm(x[:, None], weights)[:, 0])


def test_offsets_that_lie_are_not_followed_out_of_the_tensors():
    x, weights = spread(40, 64), spread(3, 64, 32, seed=1)
    out = ops.grouped_mm(x, weights, _ends(10, 5, 10_000))
    assert same_bits(out[:10], ops.mm(x[:10], weights[0]))
    assert same_bits(out[10:], ops.mm(x[10:], weights[2]))


def test_grouped_mm_is_like_torchs():
    x, weights = torch.randn(700, 512, device=DEVICE).bfloat16(), torch.randn(4, 512, 256, device=DEVICE).bfloat16()
    ends = _ends(100, 100, 400, 700)
    wanted = torch._grouped_mm(x, weights, offs=ends)
    torch.testing.assert_close(ops.grouped_mm(x, weights, ends), wanted, rtol=2e-2, atol=0.2)


EIGHT = torch.cuda.get_device_capability() >= (8, 9) if torch.cuda.is_available() else False
needs_eight_bits = pytest.mark.skipif(not EIGHT, reason="no 8-bit tensor cores")


def _eight(x: Tensor) -> Tensor:
    return x.clamp(-448, 448).to(torch.float8_e4m3fn)


@needs_eight_bits
@pytest.mark.parametrize("k, n", [(4096, 512), (1040, 208), (256, 64)])
def test_a_row_of_8_bit_floats_has_the_same_bits_in_any_batch(k, n):
    a, b = _eight(spread(300, k)), _eight(spread(n, k, seed=1)).t()
    rows, columns = torch.linspace(0.5, 2, 300, device=DEVICE)[:, None], torch.linspace(0.1, 1, n, device=DEVICE)[None]
    whole = ops.scaled_mm(a, b, rows, columns, None, torch.bfloat16)
    for m in (1, 2, 8, 9, 16, 30, 64, 65, 200):
        assert same_bits(ops.scaled_mm(a[:m], b, rows[:m], columns, None, torch.bfloat16), whole[:m]), m
        assert same_bits(ops.scaled_mm(a[-m:], b, rows[-m:], columns, None, torch.bfloat16), whole[-m:]), m
    one, bias = torch.ones((), device=DEVICE), spread(n, seed=2)
    plain = ops.scaled_mm(a, b, one, one, None, torch.bfloat16)
    assert same_bits(ops.scaled_mm(a, b, one, one, bias, torch.bfloat16), plain + bias)


@needs_eight_bits
def test_the_error_of_8_bit_products_is_like_torchs():
    a, b = _eight(torch.randn(256, 8192, device=DEVICE)), _eight(torch.randn(512, 8192, device=DEVICE)).t()
    wanted, one = a.double() @ b.double(), torch.ones((), device=DEVICE)
    ours = ops.scaled_mm(a, b, one, one, None, torch.float32).double()
    stock = torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.float32, use_fast_accum=False).double()
    assert (ours - wanted).norm() <= 2 * (stock - wanted).norm() + 1e-6 * wanted.norm()


@needs_eight_bits
def test_8_bit_schedules_are_admitted():
    a, b = _eight(spread(300, 1024)), _eight(spread(512, 1024, seed=1)).t()
    dropped = []
    for rows, schedule in (*gpu_scaled.BY_ROWS, (300, gpu_scaled.MANY)):
        problem = problem_of(a[:rows], b, torch.bfloat16, tf32=False, add=False)
        if schedule != gpu_scaled.REFERENCE and not gpu_scaled.is_admitted(schedule, problem, DEVICE):
            dropped.append(str(schedule))
    assert not dropped, [verdict for verdict in gpu.ADMISSION.verdicts(0) if not verdict.admitted]
