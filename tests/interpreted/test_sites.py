"""Compiled code with static shapes calls our GPU ops directly, and gets what the dispatcher would have given it."""

from __future__ import annotations

import contextlib
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch._inductor.scheduler import Scheduler
from torch._inductor.utils import run_and_get_code

from bicompile.lowering.attention.gpu import sdpa
from bicompile.lowering.gpu import plans, sites
from bicompile.lowering.gpu.plans import ON_GPU, Planned, Site
from bicompile.lowering.matmul.gpu import bmm, mm
from bicompile.lowering.reduction.gpu import reduce
from bicompile.lowering.softmax.gpu import softmax
from bicompile.testing import same_bits


@pytest.fixture
def gpu_ops_on_the_cpu():
    """The GPU's ops, interpreted, in the place of those of the CPU in code that is compiled meanwhile."""
    with mock.patch.object(sites, "DEVICE", "cpu"), torch._inductor.config.patch(force_disable_caches=True):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()


def test_code_calls_sites_and_gets_the_kernels_bits(gpu_ops_on_the_cpu):
    def attention_and_products(q):
        return F.scaled_dot_product_attention(q, q, q), torch.softmax(q @ q.mT, -1)

    q, calls = torch.randn(2, 2, 7, 16), []
    compiled = torch.compile(attention_and_products, backend="batch_invariant")
    with _noting(calls):
        (attended, weights), (code,) = run_and_get_code(compiled, q)
        assert same_bits(compiled(q), (attended, weights))
    assert sorted(calls) == ["bmm", "sdpa", "softmax"]  # at the first call, and not again
    assert [code.count(f" = Site({op!r})\n") for op in ("sdpa", "bmm", "softmax")] == [1, 1, 1]
    assert "= torch.ops.bicompile" not in code
    assert same_bits(attended, sdpa(q, q, q, None, False, 0.25)[0])
    rows = q.flatten(0, 1)
    assert same_bits(weights, softmax(bmm(rows, rows.mT).view(2, 2, 7, 7), 3, False, torch.float32))


@contextlib.contextmanager
def _noting(calls):
    """Append the name of every op that is planned."""
    plan = Planned.plan

    def noting(self, *args):
        calls.append(self.__name__)
        return plan(self, *args)

    with mock.patch.object(Planned, "plan", noting):
        yield


def test_where_shapes_are_symbolic_a_plan_is_looked_for_every_time(gpu_ops_on_the_cpu):
    compiled, w, calls = torch.compile(torch.matmul, backend="batch_invariant", dynamic=True), torch.randn(48, 6), []
    x = torch.randn(5, 48)
    with _noting(calls):
        found, (code,) = run_and_get_code(compiled, x, w)
        assert "= ON_GPU['mm'](" in code and "Site(" not in code and "= torch.ops.bicompile" not in code
        assert same_bits(compiled(x[:3], w), found[:3]) and same_bits(found, mm(x, w))
    assert calls == ["mm"] * 3


def test_cpu_ops_are_left_to_the_dispatcher():
    torch._dynamo.reset()
    x = torch.randn(3, 20)
    _, (code,) = run_and_get_code(torch.compile(torch.mm, backend="batch_invariant"), x, x.T)
    assert "= torch.ops.bicompile.mm.default(" in code and "Site(" not in code


@pytest.mark.parametrize(
    ("op", "kwargs", "devices", "name"),
    [
        ("bicompile.mm", [], ["cuda", "cuda"], "mm"),
        ("bicompile.mm", [], ["cuda", "cpu"], None),
        ("bicompile.mm", [], ["cuda", None], None),
        ("bicompile.mm", ["b=buf1"], ["cuda"], None),  # a plan takes no names
        ("bicompile.index_add", [], ["cuda"], None),  # is not there to be called
        ("aten.mm", [], ["cuda", "cuda"], None),
    ],
)
def test_only_ops_of_ours_on_a_gpu_are_called_directly(op, kwargs, devices, name):
    namespace, packet = op.split(".")
    inputs = [mock.Mock(get_device=lambda kind=kind: kind and torch.device(kind)) for kind in devices]
    overload = getattr(getattr(torch.ops, namespace), packet).default
    assert sites._direct(mock.Mock(op_overload=overload, inputs=inputs, codegen_kwargs=lambda: kwargs)) == name


def test_a_site_looks_at_addresses_and_finds_its_plan_once():
    calls, wide, w = [], torch.randn(3, 64), torch.randn(64, 8)
    site = Site("mm")
    with _noting(calls):
        for _ in range(2):
            assert same_bits(site(wide, w), mm.build(wide, w)(wide, w))
        assert calls == ["mm"]
        loose = torch.empty(3 * 64 + 1)[1:].view(3, 64).copy_(wide)  # not aligned to 16 bytes
        assert same_bits(site(loose, w), site(wide, w)) and calls == ["mm", "mm"]


@pytest.mark.parametrize("reason", ["capturing", "loose"])
def test_a_plan_that_does_not_serve_all_calls_is_not_kept(reason: str):
    calls, x, w = [], torch.randn(3, 64), torch.randn(64, 8)
    site = Site("mm")
    loose = torch.empty(3 * 64 + 1)[1:].view(3, 64).copy_(x) if reason == "loose" else x
    with mock.patch.object(plans, "is_capturing", lambda: reason == "capturing"):
        first = site(loose, w)
    with _noting(calls):
        assert same_bits(site(x, w), first) and same_bits(site(x, w), first)
    assert calls == ["mm"]


def test_what_has_no_plan_of_its_own_is_called():
    x = torch.randn(3, 20)
    site = Site("sum")
    for _ in range(2):
        assert same_bits(site(x, [1], False, torch.float32), reduce("sum", x, [1], False, torch.float32))


def test_every_op_on_a_gpu_can_be_imported():
    assert len(ON_GPU) > 20
    for late in ON_GPU.values():
        assert callable(late.function)


def test_parts_of_a_graph_that_are_captured_call_sites(gpu_ops_on_the_cpu, monkeypatch: pytest.MonkeyPatch):
    """With CUDA graphs, Inductor writes a function for each part: here one for all of the graph."""
    monkeypatch.setattr(Scheduler, "should_partition", lambda self, node: None)
    x, w = torch.randn(5, 48), torch.randn(48, 6)
    compiled = torch.compile(lambda x, w: torch.softmax(torch.mm(x, w), 1), backend="batch_invariant")
    found, (code,) = run_and_get_code(compiled, x, w)
    assert "def partition_0(" in code and "= site_" in code
    assert same_bits(found, softmax(mm(x, w), 1, False, torch.float32))
