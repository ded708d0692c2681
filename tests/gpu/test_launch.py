"""Kernels are launched with little Python, on the stream and for the tensors at hand."""

from __future__ import annotations

import threading
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

from bicompile.lowering.attention import gpu as attention
from bicompile.lowering.attention.problem import problem_of
from bicompile.lowering.attention.schedule import REFERENCE, HopperSchedule, SplitSchedule, TileSchedule
from bicompile.lowering.gpu import driver, early, launch, plans
from bicompile.lowering.gpu.driver import DriverLaunch
from bicompile.lowering.gpu.plans import Planned
from bicompile.lowering.matmul.problem import problem_of as product_of
from bicompile.lowering.matmul.runners import stream_runner, tile_runner
from bicompile.lowering.matmul.schedule import REFERENCES, StreamSchedule
from bicompile.testing import same_bits

needs_tma = pytest.mark.skipif(torch.cuda.get_device_capability() < (9, 0), reason="tensor maps came with sm_90")
ops = torch.ops.bicompile


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[DriverLaunch | None]:
    """What the driver is asked for, and None where it could not launch a kernel."""
    found = []

    def noting(*arguments):
        found.append(driver.driver_launch(*arguments))
        return found[-1]

    monkeypatch.setattr(launch, "driver_launch", noting)
    return found


@needs_tma
@pytest.mark.parametrize(
    "schedule",
    [
        SplitSchedule(16, 4, 3, 512, True),
        SplitSchedule(16, 4, 2, 0, True),
        TileSchedule(128, 8, 2, True),
        HopperSchedule(2, True),
    ],
    ids=str,
)
def test_tensor_maps_follow_the_tensors(schedule, launches: list[DriverLaunch | None]):
    if isinstance(schedule, HopperSchedule) and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("a kernel of sm_90")
    queries = 1 if isinstance(schedule, SplitSchedule) else 300
    problems = [
        problem_of("sdpa", randn(2, 8, queries, 64), randn(2, 2, 3000, 64), randn(2, 2, 3000, 64), None, False, 0.1)
        for _ in range(3)
    ]
    plan = attention.plan_of(problems[0], schedule)
    for p in (*problems, *problems):
        assert same_bits(plan(p), attention.run(p, REFERENCE))
    assert launches and None not in launches


@needs_tma
def test_products_by_tensor_maps_follow_the_tensors(launches: list[DriverLaunch | None]):
    factors = [(randn(48, 512), randn(384, 512).t(), randn(48, 384)) for _ in range(3)]
    problem = product_of(*factors[0][:2], torch.bfloat16, tf32=False, add=True)
    run = stream_runner(StreamSchedule(64, 64, 128, warps=4, stages=3), problem, 0)
    for a, b, c in (*factors, *factors):
        out, wanted = (torch.full((48, 384), torch.nan, dtype=a.dtype, device="cuda") for _ in range(2))
        run(a, b, c, out)
        tile_runner(REFERENCES[a.dtype], problem, 0)(a, b, c, wanted)
        assert same_bits(out, wanted)
    assert launches and None not in launches


@needs_tma
def test_launches_of_the_driver_are_of_the_current_stream_and_can_be_captured(launches: list[DriverLaunch | None]):
    p = problem_of("sdpa", randn(2, 8, 1, 64), randn(2, 2, 3000, 64), randn(2, 2, 3000, 64), None, False, 0.1)
    plan = attention.plan_of(p, SplitSchedule(16, 4, 3, 512, True))
    expected = [plan(p)[0] for _ in range(2)][-1].clone()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        p.k.neg_()  # what runs elsewhere would not wait for this
        negative = plan(p)[0]
        p.k.neg_()
        again = plan(p)[0]
    stream.synchronize()
    assert same_bits(again, expected) and not same_bits(negative, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = plan(p)[0]
    p.v.neg_()
    graph.replay()
    assert same_bits(captured, -expected)
    assert len(launches) == 2  # the splits' and the merge's


@needs_tma
def test_a_thread_may_begin_with_a_launch(launches: list[DriverLaunch | None]):
    p = problem_of("sdpa", randn(2, 8, 1, 64), randn(2, 2, 3000, 64), randn(2, 2, 3000, 64), None, False, 0.1)
    plan = attention.plan_of(p, SplitSchedule(16, 4, 3, 512, True))
    expected, found = [plan(p) for _ in range(2)][-1], []
    thread = threading.Thread(target=lambda: found.append(plan(p)))
    thread.start()
    thread.join()
    assert same_bits(found, [expected]) and None not in launches


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(256), nn.Linear(256, 512), nn.Linear(512, 256, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q = self.norm(x).view(*x.shape[:2], 4, 64).transpose(1, 2)
        x = x + F.scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2).flatten(2)
        return torch.softmax(x + self.down(F.silu(self.up(self.norm(x)))), -1)


def test_compiled_code_with_static_shapes_plans_once():
    block, planned = Block().cuda().bfloat16(), []
    compiled = torch.compile(block, backend="batch_invariant")
    plan = Planned.plan

    def noting(self, *args):
        planned.append(self.__name__)
        return plan(self, *args)

    with torch.no_grad(), mock.patch.object(Planned, "plan", noting):
        x = randn(2, 70, 256)
        expected, (code,) = run_and_get_code(compiled, x)
        for op in ("rms_norm", "mm", "sdpa", "softmax"):
            assert f" = Site({op!r})\n" in code
        first = len(planned)
        assert same_bits(compiled(x), expected) and len(planned) == first
        # Addresses that are not aligned take another way, to the same bits.
        loose = torch.empty(2 * 70 * 256 + 1, dtype=x.dtype, device="cuda")[1:].view(2, 70, 256).copy_(x)
        assert same_bits(compiled(loose), expected)
        assert same_bits(compiled(x[:1]), expected[:1])
        symbolic, (code,) = run_and_get_code(torch.compile(block, backend="batch_invariant", dynamic=True), x)
        assert "= ON_GPU['mm'](" in code and "Site(" not in code and same_bits(symbolic, expected)


class Noted(dict):
    """Plans, and in which threads they were kept."""

    def __init__(self) -> None:
        self.threads: list[str] = []

    def __setitem__(self, key: Any, plan: Any) -> None:
        self.threads.append(threading.current_thread().name)
        super().__setitem__(key, plan)


def test_a_graph_is_planned_while_it_is_compiled(caplog: pytest.LogCaptureFixture):
    torch._dynamo.reset()
    block, x = Block().cuda().bfloat16(), randn(3, 71, 256)
    compiled = torch.compile(block, backend="batch_invariant")
    caplog.set_level("DEBUG", early.__name__)
    with mock.patch.object(plans, "_PLANS", Noted()) as noted, torch._inductor.config.patch(force_disable_caches=True):
        with torch.no_grad():
            compiled(x)
        assert len(noted.threads) > 4
        assert all(name.startswith(early.THREAD) for name in noted.threads), noted.threads
        forward = len(noted.threads)
        compiled(x).sum().backward()
        assert len([name for name in noted.threads[forward:] if name.startswith(early.THREAD)]) > 4
    assert "not planned early" not in caplog.text, caplog.text
