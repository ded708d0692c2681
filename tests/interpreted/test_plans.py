"""Plans serve the calls that look alike, and no others."""

from __future__ import annotations

import importlib
from unittest import mock

import pytest
import torch

from bicompile.lowering.gpu import plans
from bicompile.lowering.gpu.plans import Late, Planned, new_dense
from bicompile.lowering.matmul import gpu


def _noted(calls):
    """An op that multiplies, and notes in ``calls`` how often it was planned."""

    @Planned
    def scaled(x, y, factor):
        torch._check(x.dim() == 1, lambda: "scaled: one dim")
        calls.append((x.shape, factor))
        new = new_dense(x, x.shape, torch.float64)
        return lambda x, y, factor: torch.mul(x, factor, out=new())

    return scaled


def test_a_plan_serves_all_calls_that_look_alike():
    calls = []
    op, wide = _noted(calls), torch.arange(16.0)
    assert op(wide, None, 2.0).tolist() == (2 * wide).tolist() and op(wide, None, 2.0).dtype == torch.float64
    assert op(wide + 1, None, 2.0).tolist() == (2 * wide + 2).tolist() and len(calls) == 1
    others = [
        (wide[:8], None, 2.0),  # of another length
        (wide[::2], None, 2.0),  # with another stride
        (wide.to(torch.bfloat16), None, 2.0),  # of another dtype
        (torch.arange(17.0)[1:], None, 2.0),  # aligned otherwise
        (wide, wide, 2.0),  # with another tensor
        (wide, None, 3.0),  # by another number
    ]
    for planned_so_far, (x, y, factor) in enumerate(others, start=1):
        assert len(calls) == planned_so_far
        for _ in range(2):
            assert op(x, y, factor).tolist() == (factor * x.double()).tolist()
    assert len(calls) == 1 + len(others)


def test_a_setting_that_changes_makes_another_plan():
    setting = [1.0]

    def scaled(x):
        factor = setting[0]
        return lambda x: factor * x

    op, x = Planned(scaled, setting=lambda x: setting[0]), torch.ones(2)
    assert op(x).tolist() == [1.0, 1.0]
    setting[0] = 2.0
    assert op(x).tolist() == [2.0, 2.0]


def test_products_follow_torchs_setting_of_tf32(monkeypatch: pytest.MonkeyPatch):
    wide, half = ([torch.eye(20, dtype=dtype)] * 2 for dtype in (torch.float32, torch.bfloat16))
    before = gpu.mm.plan(*wide), gpu.mm.plan(*half)
    monkeypatch.setattr(gpu, "allows_tf32", lambda: True)
    assert gpu.mm.plan(*wide) is not before[0] and gpu.mm.plan(*half) is before[1]


def test_a_check_that_failed_is_made_again():
    calls = []
    op = _noted(calls)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="scaled: one dim"):
            op(torch.zeros(2, 2), None, 2.0)
    assert not calls


def test_tensors_of_two_devices_are_refused():
    with pytest.raises(ValueError, match=r"scaled: expected tensors on one device, got some on cpu and meta"):
        _noted([])(torch.zeros(2), torch.zeros(2, device="meta"), 2.0)


def test_nothing_that_is_planned_while_a_graph_is_captured_is_kept():
    calls = []
    op, x = _noted(calls), torch.zeros(3)
    with mock.patch.object(plans, "is_capturing", lambda: True):
        op(x, None, 2.0)
    for _ in range(2):
        op(x, None, 2.0)
    assert len(calls) == 2


def test_plans_run_with_the_device_of_the_first_tensor():
    current, calls = [0], []

    class Device:
        def __init__(self, index):
            self.before, current[0] = current[0], index

        def __enter__(self):
            pass

        def __exit__(self, *error):
            current[0] = self.before

    on_second = mock.Mock(spec=["get_device"], get_device=lambda: 1)
    op = Planned(lambda x: lambda x: calls.append(current[0]))
    with (
        mock.patch.object(torch.cuda, "device", Device),
        mock.patch.object(torch._C, "_cuda_getDevice", lambda: current[0], create=True),
    ):
        op(on_second)
    assert calls == [1] and current == [0]


def test_what_is_imported_late_is_imported_once():
    late = Late("bicompile.lowering.matmul.gpu", "mm")
    assert "function" not in vars(late)
    x = torch.eye(20)
    with mock.patch.object(importlib, "import_module", wraps=importlib.import_module) as imported:
        assert torch.equal(late(x, x), x) and torch.equal(late(x, x), x)
    assert imported.call_count == 1
