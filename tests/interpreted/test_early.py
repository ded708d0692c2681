"""Ops on a GPU are planned while Inductor compiles, and what cannot be planned then is planned when it runs."""

from __future__ import annotations

import contextlib
import threading
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

import bicompile
from bicompile.lowering.gpu import early, plans, sites
from bicompile.lowering.gpu.plans import Planned
from bicompile.testing import same_bits

EARLY, LATE = True, False


@pytest.fixture
def gpu_ops_on_the_cpu():
    """The GPU's ops, interpreted, in the place of those of the CPU in code that is compiled meanwhile."""
    with (
        mock.patch.object(sites, "DEVICE", "cpu"),
        mock.patch.object(early, "DEVICE", "cpu"),
        mock.patch.dict(plans._PLANS, clear=True),
        torch._inductor.config.patch(force_disable_caches=True),
    ):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()


@contextlib.contextmanager
def _noting():
    """Which plans were built early, by the names of the ops."""
    found: dict[str, list[bool]] = {}
    plan = Planned.plan

    def noting(self, *args):
        known = len(plans._PLANS)
        result = plan(self, *args)
        if len(plans._PLANS) > known:
            found.setdefault(self.__name__, []).append(threading.current_thread().name.startswith(early.THREAD))
        return result

    with mock.patch.object(Planned, "plan", noting):
        yield found


@pytest.mark.parametrize("dynamic", [False, True])
def test_ops_are_planned_in_a_thread_and_found_when_they_run(gpu_ops_on_the_cpu, dynamic: bool):
    def attention(q, w):
        y = F.scaled_dot_product_attention(q, q, q).flatten(0, 2)
        return (y @ w @ w @ w).softmax(-1)

    inputs = torch.randn(2, 3, 7, 16), torch.randn(16, 16)
    with _noting() as found:
        torch.compile(attention, backend="batch_invariant", dynamic=dynamic)(*inputs)
    assert found == dict.fromkeys(("sdpa", "mm", "softmax"), [EARLY])  # of equal calls one
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(early.THREAD)]


def test_the_gradients_graph_is_planned_too(gpu_ops_on_the_cpu):
    x, w = torch.randn(5, 16), torch.randn(16, 16, requires_grad=True)
    with _noting() as found:
        torch.compile(lambda x, w: (x @ w).softmax(-1), backend="batch_invariant")(x, w).sum().backward()
    assert found == {"mm": [EARLY] * 2, "softmax": [EARLY], "softmax_backward": [EARLY]}


def test_what_cannot_be_planned_early_is_planned_where_it_runs(gpu_ops_on_the_cpu, caplog):
    x, w = torch.randn(5, 16), torch.randn(16, 16)
    with (
        mock.patch.object(early.Like, "make", side_effect=torch.OutOfMemoryError("none left")),
        caplog.at_level("DEBUG", early.__name__),
        _noting() as found,
    ):
        out = torch.compile(torch.mm, backend="batch_invariant")(x, w)
    assert found == {"mm": [LATE]} and same_bits(out[:1], plans.ON_GPU["mm"](x[:1], w))
    assert "mm: not planned early" in caplog.text and "none left" in caplog.text


def test_nothing_is_planned_while_a_graph_is_captured_or_only_explained(gpu_ops_on_the_cpu):
    x, w = torch.randn(5, 16), torch.randn(16, 16)
    with mock.patch.object(early, "is_capturing", lambda: True), _noting() as found:
        torch.compile(torch.mm, backend="batch_invariant")(x, w)
    assert found == {"mm": [LATE]}
    plans._PLANS.clear()
    with _noting() as found:
        bicompile.explain(torch.mm, x, w)
    assert not found


def test_a_compilation_that_fails_still_waits():
    release, planned = threading.Event(), []

    def slow(op, arguments):
        release.wait(10)
        planned.append(op)

    gm = torch.fx.symbolic_trace(lambda x: x + 1)
    with pytest.raises(ZeroDivisionError), mock.patch.object(early, "_plan", slow), early.early_plans():
        with mock.patch.object(early, "_call_of", lambda node: (node.op, [])):
            early.plan_early(gm)
        threading.Timer(0.1, release.set).start()
        _ = 1 / 0
    assert sorted(planned) == ["call_function", "output", "placeholder"]


def test_nothing_begins_in_other_threads_or_outside():
    planned, gm = [], torch.fx.symbolic_trace(lambda x: x + 1)
    with (
        mock.patch.object(early, "_plan", lambda op, arguments: planned.append(op)),
        mock.patch.object(early, "_call_of", lambda node: (node.op, [])),
    ):
        with early.early_plans():
            other = threading.Thread(target=early.plan_early, args=(gm,))
            other.start()
            other.join()
        early.plan_early(gm)
        assert not planned
        with early.early_plans():
            early.plan_early(gm)
    assert len(planned) == 3
