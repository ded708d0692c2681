"""Matrix products on a device: one order under every schedule, for every batch, layout and alignment."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
import triton
import triton.language as tl
from matmul_cases import (
    CASES,
    DEVICE,
    DTYPES,
    HALVES,
    ROWS,
    compile_beforehand,
    listed,
    listed_problem,
    situations,
    spread,
    tf32_allowed,
    weight,
)
from torch import Tensor
from workers import once

from bicompile.lowering.gpu import plans
from bicompile.lowering.gpu.admission import Admission, equal_bits
from bicompile.lowering.matmul import cublaslt, gpu, probes, reference
from bicompile.lowering.matmul.order import gpu_order_for
from bicompile.lowering.matmul.problem import Problem, can_stream, problem_of
from bicompile.lowering.matmul.runners import Runner
from bicompile.lowering.matmul.schedule import LIBRARY, REFERENCES, TileSchedule
from bicompile.testing import same_bits

ops = torch.ops.bicompile


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    once(compile_beforehand, "matmul")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_row_has_the_same_bits_in_any_batch(case):
    differing = [name for name, got, wanted in situations(case) if not same_bits(got, wanted)]
    assert not differing


def test_tf32_follows_torchs_setting_and_keeps_the_promise():
    x, w = spread(300, 1024, dtype=torch.float32), weight(1024, 512, True, torch.float32)
    with tf32_allowed(False):
        exact = ops.mm(x, w)
    with tf32_allowed(True):
        rounded = ops.mm(x, w)
        for m in ROWS:
            assert same_bits(ops.mm(x[:m], w), rounded[:m]), m
    assert not same_bits(exact, rounded)
    wanted = x.double() @ w.double()
    assert _error(exact, wanted) < 1e-5 < _error(rounded, wanted) < 1e-2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_four_ops_agree(dtype):
    a, b = spread(3, 70, 264, dtype=dtype), spread(3, 40, 264, dtype=dtype, seed=1).transpose(1, 2)
    c = spread(3, 70, 40, dtype=dtype, seed=2)
    product = ops.bmm(a, b)
    for i in range(3):
        assert same_bits(product[i], ops.mm(a[i], b[i]))
    assert same_bits(ops.baddbmm(c, a, b, 1.0, 1.0), product + c)
    for addend in (c[0], c[0, :1], c[0, 0], c[0, :, :1], c[0].t().contiguous().t()):
        assert same_bits(ops.addmm(addend, a[0], b[0], 1.0, 1.0), product[0] + addend)
        assert same_bits(ops.addmm(addend, a[0], b[0], 0.3, 1.7), product[0] * 1.7 + addend * 0.3)
    assert same_bits(ops.addmm(torch.full_like(c[0], torch.nan), a[0], b[0], 0.0, 1.0), product[0])
    assert same_bits(ops.bmm(a[:1].expand(3, 70, 264), b)[2], ops.mm(a[0], b[2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_ieee_types_have_the_bits_of_the_reference(dtype):
    x, w = spread(9, 150, dtype=dtype), weight(150, 11, True, dtype)
    with tf32_allowed(False):
        ours = ops.mm(x, w)
    assert same_bits(ours.cpu(), reference.gpu_mm(x.cpu(), w.cpu()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sum_has_one_accumulator_that_walks_up_k(dtype):
    """FPRev's probe: what is added while a huge element waits for its negative is lost, so counting the rest shows
    how far the chain had come when the second of the two arrived.
    """
    k, huge, small = 512, 2.0**15, 2.0**-24
    if dtype == torch.float64:
        huge, small = 2.0**40, 2.0**-30
    pairs = [(i, j) for j in (1, 15, 16, 17, 40, 255, 256, 300, 511) for i in (0, j // 2) if i < j]
    x = torch.full((len(pairs), k), small, dtype=dtype, device=DEVICE)
    for row, (i, j) in enumerate(pairs):
        x[row, i], x[row, j] = huge, -huge
    w = torch.ones(64, k, dtype=dtype, device=DEVICE).t()
    with tf32_allowed(False):
        sums = {m: ops.mm(x.repeat(-(-m // len(pairs)), 1)[:m], w)[: len(pairs), 0] for m in (len(pairs), 64, 300)}
    counts = [round(float(total) / small) for total in sums[64].double()]
    for m, total in sums.items():
        assert same_bits(total, sums[64]), m
    group = gpu_order_for(k, dtype).group
    for (i, j), count in zip(pairs, counts, strict=True):
        left = k - (j // group + 1) * group
        inside = group - 2 if i // group == j // group else 0
        rounding = 1 if dtype == torch.bfloat16 else 0
        assert left - rounding <= count <= left + inside + rounding, (i, j, count, counts)


@pytest.mark.parametrize("m, n, k", [(0, 8, 16), (8, 0, 16), (8, 16, 0), (0, 0, 0)])
def test_empty_dims(m, n, k):
    a, b = torch.zeros(m, k, device=DEVICE).bfloat16(), torch.zeros(k, n, device=DEVICE).bfloat16()
    c = torch.ones(n, device=DEVICE).bfloat16()
    assert same_bits(ops.mm(a, b), torch.zeros(m, n, device=DEVICE).bfloat16())
    assert same_bits(ops.addmm(c, a, b, 1.0, 1.0), torch.ones(m, n, device=DEVICE).bfloat16())


def _error(x: Tensor, wanted: Tensor) -> float:
    return float((x.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_like_torchs(dtype):
    x, w = torch.randn(200, 4096, device=DEVICE).to(dtype), torch.randn(512, 4096, device=DEVICE).to(dtype).t()
    wanted = x.double() @ w.double() if dtype != torch.float64 else x.cpu() @ w.cpu()
    ours, stock = ops.mm(x, w).to(wanted.device), torch.mm(x, w).to(wanted.device)
    assert _error(ours, wanted) <= 3 * _error(stock, wanted) + 1e-15


def test_opcheck():
    a, b = torch.randn(5, 32, device=DEVICE).bfloat16(), torch.randn(24, 32, device=DEVICE).bfloat16().t()
    c = torch.randn(24, device=DEVICE).bfloat16()
    torch.library.opcheck(ops.mm.default, (a, b))
    torch.library.opcheck(ops.addmm.default, (c, a, b, 1.0, 1.0))
    torch.library.opcheck(ops.bmm.default, (a[None], b[None]))
    torch.library.opcheck(ops.baddbmm.default, (c, a[None], b[None], 1.0, 1.0))


# -- Schedules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_listed_schedule_is_admitted_and_has_the_references_bits(dtype):
    """So whatever the table says, and whatever a tuner makes of it, no bit can follow it."""
    x, w, problem = listed_problem(dtype)
    wanted = torch.empty(150, 416, dtype=dtype, device=DEVICE)
    gpu.runner_of(REFERENCES[dtype], problem, 0)(x, w, None, wanted)
    assert can_stream(problem)
    dropped = []
    for schedule in listed():
        runner = gpu.admitted_runner(schedule, problem, DEVICE)
        if runner is None:
            dropped.append(str(schedule))
            continue
        out = torch.empty_like(wanted)
        runner(x, w, None, out)
        assert same_bits(out, wanted), str(schedule)
    assert not dropped, dropped


@pytest.mark.parametrize("m", [64, 200, 1024])
def test_cublaslts_admitted_algorithms_have_the_references_bits(m):
    x, w = spread(m, 2048, dtype=torch.bfloat16), weight(2048, 416, True, torch.bfloat16)
    problem = problem_of(x, w, x.dtype, tf32=False, add=False)
    wanted = torch.empty(m, 416, dtype=x.dtype, device=DEVICE)
    gpu.runner_of(REFERENCES[x.dtype], problem, 0)(x, w, None, wanted)
    for runner in gpu.library_runners(LIBRARY, problem, DEVICE):
        out = torch.empty_like(wanted)
        runner(x, w, None, out)
        assert same_bits(out, wanted)


def test_any_choice_of_schedules_gives_the_same_bits(monkeypatch):
    x, w = spread(300, 1024, dtype=torch.bfloat16), weight(1024, 512, True, torch.bfloat16)
    whole = ops.mm(x, w)
    draw = random.Random(0)

    def shuffled(problem: Problem, table: object, num_sms: int) -> list[object]:
        wanted = [LIBRARY, *(s for s in listed() if can_stream(problem) or isinstance(s, TileSchedule))]
        return [*draw.sample(wanted, len(wanted)), REFERENCES[problem.dtype]]

    monkeypatch.setattr(gpu, "preferences", shuffled)
    monkeypatch.setattr(plans, "is_capturing", lambda: True)  # so that no plan is kept
    for m in (1, 16, 64, 200, 300) * 3:
        assert same_bits(ops.mm(x[:m], w), whole[:m])


@triton.jit
def _chunked_kernel(a_ptr, b_ptr, out_ptr, num_m, num_n, num_k, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """``a @ b.T`` with an accumulator for each ``CHUNK`` of k: another order."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, num_k, CHUNK):
        acc = tl.zeros((BLOCK, BLOCK), tl.float32)
        for k in range(start, min(start + CHUNK, num_k), BLOCK):
            at = k + tl.arange(0, BLOCK)
            a_mask = (rows[:, None] < num_m) & (at[None, :] < num_k)
            b_mask = (columns[:, None] < num_n) & (at[None, :] < num_k)
            a = tl.load(a_ptr + rows[:, None] * num_k + at[None, :], mask=a_mask, other=0.0)
            b = tl.load(b_ptr + columns[:, None] * num_k + at[None, :], mask=b_mask, other=0.0)
            acc = tl.dot(a, b.T, acc)
        total += acc
    inside = (rows[:, None] < num_m) & (columns[None, :] < num_n)
    tl.store(out_ptr + rows[:, None] * num_n + columns[None, :], total.to(out_ptr.dtype.element_ty), mask=inside)


def test_a_poisoned_schedule_is_refused_and_the_others_stay(monkeypatch, tmp_path):
    """One that adds chunks of 1024 k is as good a product as any, and has other bits."""
    monkeypatch.setenv("BICOMPILE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(gpu, "ADMISSION", Admission("poisoned", []))
    poisoned = TileSchedule(64, 64, 64, warps=4, stages=1)
    honest = TileSchedule(64, 64, 64, warps=4, stages=4)
    true_runner = gpu.runner_of

    def run_chunked(a: Tensor, b: Tensor, c: Tensor | None, out: Tensor) -> None:
        grid = (triton.cdiv(out.shape[0], 64), triton.cdiv(out.shape[1], 64))
        left, right = a.contiguous(), b.t().contiguous()
        _chunked_kernel[grid](left, right, out, *out.shape, a.shape[1], 1024, 64)

    def runner_of(schedule: TileSchedule, problem: Problem, device: int) -> Runner:
        return run_chunked if schedule == poisoned else true_runner(schedule, problem, device)

    monkeypatch.setattr(gpu, "runner_of", runner_of)
    monkeypatch.setattr(gpu, "preferences", lambda p, table, sms: [poisoned, honest, REFERENCES[p.dtype]])
    monkeypatch.setattr(plans, "is_capturing", lambda: True)  # so that no plan is kept
    x, w = spread(100, 4096, dtype=torch.bfloat16), weight(4096, 256, True, torch.bfloat16)
    problem = problem_of(x, w, x.dtype, tf32=False, add=False)
    ours = ops.mm(x, w)
    bad, good = gpu.admitted_runner(poisoned, problem, DEVICE), gpu.admitted_runner(honest, problem, DEVICE)
    assert bad is None and good is not None
    verdicts = {verdict.admitted: verdict for verdict in gpu.ADMISSION.verdicts(0)}
    assert "differ" in verdicts[False].reason and "stages 1" in verdicts[False].schedule
    assert "stages 4" in verdicts[True].schedule
    wrong, right = torch.empty_like(ours), torch.empty_like(ours)
    run_chunked(x, w, None, wrong)
    true_runner(REFERENCES[x.dtype], problem, 0)(x, w, None, right)
    assert same_bits(ours, right) and not same_bits(ours, wrong)


def test_the_probes_tell_split_k_from_one_chain():
    """Libraries split K for few rows and a long K; each kind of probe must show it, whatever the output type hides."""
    x, w = spread(16, 16384, dtype=torch.bfloat16), weight(16384, 512, True, torch.bfloat16)
    problem = problem_of(x, w, x.dtype, tf32=False, add=False)
    (probe,) = [p for p in probes.full_probes(problem, 1 << 24) if p.m == 16]
    for a, b, _ in probes.factors(probe, DEVICE):
        wanted = torch.empty(16, probe.n, dtype=x.dtype, device=DEVICE)
        gpu.runner_of(REFERENCES[x.dtype], probe, 0)(a, b, None, wanted)
        halves = torch.zeros(16, probe.n, dtype=torch.float32, device=DEVICE)
        for part in (slice(0, 8192), slice(8192, None)):
            piece = dataclasses.replace(
                problem_of(a[:, part], b[part], x.dtype, tf32=False, add=False), out=torch.float32
            )
            out = torch.empty(16, probe.n, dtype=torch.float32, device=DEVICE)
            gpu.runner_of(REFERENCES[x.dtype], piece, 0)(a[:, part], b[part], None, out)
            halves += out
        assert not equal_bits(wanted, halves.to(x.dtype))


def test_cublaslt_is_found():
    assert cublaslt.available() and cublaslt.version() > 120000


# -- CUDA graphs, sizes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warm", [True, False], ids=["seen before", "new"])
def test_capture_gives_the_same_bits(warm):
    n = 640 if warm else 656
    x, w = spread(48, 1024, dtype=torch.bfloat16), weight(1024, n, True, torch.bfloat16)
    whole = ops.mm(spread(49, 1024, dtype=torch.bfloat16).copy_(torch.cat([x, x[:1]])), w)[:48]
    if warm:
        ops.mm(x, w)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.mm(x, w)
    out.zero_()
    graph.replay()
    assert same_bits(out, whole)
    graph.replay()
    assert same_bits(out, whole)


def test_more_than_two_to_the_31_elements():
    rows, k = 2**21 + 3, 1032
    assert rows * k > 2**31
    x = torch.empty(rows, k, dtype=torch.bfloat16, device=DEVICE).normal_()
    w = weight(k, 16, True, torch.bfloat16)
    some = torch.tensor([0, 2**20, rows - 1], device=DEVICE)
    assert same_bits(ops.mm(x, w)[some], ops.mm(x[some], w))
    tall = x.view(-1)[: (k * rows) // 8 * 8].view(8, -1)[:, : 2**28].t()  # columns 2**28 elements apart
    some = torch.tensor([0, 12345, 2**28 - 1], device=DEVICE)
    assert same_bits(ops.mm(tall, w[:8])[some], ops.mm(tall[some].contiguous(), w[:8]))
