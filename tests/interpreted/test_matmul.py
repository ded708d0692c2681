"""The matrix product kernels compute matrix products: every kind of schedule, any sizes, strides and addends."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from bicompile.lowering.matmul import gpu, gpu_grouped, probes
from bicompile.lowering.matmul.problem import Problem, can_stream, problem_of
from bicompile.lowering.matmul.schedule import StreamSchedule, TileSchedule

SCHEDULES = (
    TileSchedule(16, 16, 32, warps=1, stages=1),
    TileSchedule(8, 16, 64, warps=1, stages=1, swap=True),
    StreamSchedule(16, 32, 32, warps=1, stages=1, parts=2, flatten=True),
    StreamSchedule(16, 32, 32, warps=1, stages=1, swap=True),
)


def _check(schedule: TileSchedule | StreamSchedule, a: Tensor, b: Tensor, c: Tensor | None) -> None:
    problem = problem_of(a, b, a.dtype, tf32=False, add=c is not None)
    out = torch.full((*a.shape[:-1], b.shape[-1]), torch.nan, dtype=a.dtype)
    gpu.runner_of(schedule, problem, 0)(a, b, None if c is None else c.expand(out.shape), out)
    wanted = (a.double() @ b.double()).to(a.dtype)
    wanted = wanted if c is None else wanted + c
    torch.testing.assert_close(out, wanted, rtol=2e-2 if a.dtype.itemsize < 4 else 1e-5, atol=1e-2)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("m, n, k", [(1, 1, 1), (17, 40, 96), (20, 35, 37)])
def test_product_is_right_in_every_layout(schedule, m, n, k):
    addends = (None, torch.randn(n).half(), torch.randn(n, m).half().t(), torch.randn(m, 1).half())
    for by_k, c in zip(itertools.product((True, False), repeat=2), addends, strict=True):
        a = (torch.randn(m, k) if by_k[0] else torch.randn(k, m).t()).half()
        b = (torch.randn(n, k).t() if by_k[1] else torch.randn(k, n)).half()
        problem = problem_of(a, b, a.dtype, tf32=False, add=False)
        if isinstance(schedule, StreamSchedule) and not can_stream(problem):
            continue
        _check(schedule, a, b, c)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)  # numpy has no bfloat16
def test_entry_points_take_any_strides_and_empty_dims(dtype):
    wide = torch.randn(2, 7, 90).to(dtype)
    for a, b in (
        (wide[0, :, 1::3], wide[1, :2, 60:].t()),
        (wide[0, :1].expand(5, 90), wide[1].t()),
        (wide[0, :, :0], wide[1, :, :0].t()),
        (wide[0, :0], wide[1].t()),
    ):
        wanted = a.double() @ b.double()
        torch.testing.assert_close(gpu.mm(a, b).double(), wanted, rtol=2e-2, atol=1e-2)
    a, b, c = wide[:, :3, :32], wide[:, 2:, 32:64].transpose(1, 2), wide[:, :3, 85:]
    product = gpu.bmm(a, b)
    torch.testing.assert_close(product.double(), a.double() @ b.double(), rtol=2e-2, atol=1e-2)
    assert torch.equal(gpu.bmm(a, b)[1], gpu.mm(a[1], b[1]))
    assert torch.equal(gpu.baddbmm(c, a, b, 1.0, 1.0), product + c)
    assert torch.equal(gpu.addmm(c[0, 0], a[0], b[0], 0.5, 3.0), product[0] * 3.0 + c[0, 0] * 0.5)
    assert torch.equal(gpu.addmm(torch.full_like(c[0], torch.nan), a[0], b[0], 0.0, 1.0), product[0])


def test_probes_lie_in_memory_like_the_problem():
    whole = torch.randn(3, 40, 96).bfloat16()
    for a, b in (
        (whole[0], whole[1].t()),
        (whole[0, :, 1:].t(), whole[1, :, 3:]),
        (whole[0, :, ::2], whole[1, :, 1::2].t()),
        (whole, whole.transpose(1, 2)),
        (whole[:1].expand(3, 40, 96), whole.transpose(1, 2)),
    ):
        problem = problem_of(a, b, a.dtype, tf32=False, add=True)
        for probe in (*probes.small_probes(problem, 16, 32), *probes.full_probes(problem, 4096)):
            assert _kind(probe) == _kind(problem)
            for left, right, c in probes.factors(probe, torch.device("cpu")):
                assert c is not None and c.shape == (*left.shape[:-1], right.shape[-1])
                if probe.m > 1:  # the stride between the rows of one row means nothing
                    assert problem_of(left, right, left.dtype, tf32=False, add=True) == probe


def _kind(problem: Problem) -> tuple[object, ...]:
    remainders = [s % 16 for f in (problem.a, problem.b) for s in (f.row, f.column, f.step)]
    return problem.layout, problem.is_aligned, problem.is_dense, can_stream(problem), *remainders


@pytest.mark.parametrize("cuts", [(0, 0, 0), (3, 3, 20), (17, 18, 25)], ids=str)
def test_groups_get_their_own_weights(cuts):
    ends = torch.tensor(cuts)
    x, weights = torch.randn(25, 40), torch.randn(3, 40, 24)
    wanted = torch.zeros(25, 24)
    depths, stacked = torch.zeros(3, 40, 24), torch.zeros(24, 25)
    right, stack = torch.randn(25, 24), torch.randn(3, 24, 40)
    for g, (start, end) in enumerate(itertools.pairwise((0, *cuts))):
        wanted[start:end] = x[start:end] @ weights[g]
        depths[g] = x[start:end].t() @ right[start:end]
        stacked[:, start:end] = stack[g] @ x[start:end].t()
    torch.testing.assert_close(gpu_grouped.grouped_mm(x, weights, ends), wanted)
    torch.testing.assert_close(gpu_grouped.grouped_mm(x.t(), right, ends), depths)
    torch.testing.assert_close(gpu_grouped.grouped_mm(stack, x.t(), ends), stacked)


def test_no_row_of_a_grouped_product_belongs_to_two_groups():
    x, weights, ends = torch.randn(40, 16), torch.randn(3, 16, 24), torch.tensor([10, 5, 10_000], dtype=torch.int32)
    wanted = torch.cat([x[:10] @ weights[0], x[10:] @ weights[2]])
    torch.testing.assert_close(gpu_grouped.grouped_mm(x, weights, ends), wanted)
