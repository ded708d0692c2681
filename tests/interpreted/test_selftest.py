"""What kernels are tested with on a device, before their first use, passes where they are right."""

from __future__ import annotations

import threading
from unittest import mock

import pytest
import torch

from bicompile.lowering.gpu import admission
from bicompile.lowering.gpu import selftest as module
from bicompile.lowering.gpu.selftest import SelfTest
from bicompile.lowering.scan.selftest import SCANS
from bicompile.lowering.scatter.selftest import SCATTERS
from bicompile.testing import same_bits


@pytest.mark.parametrize("selftest", [SCANS, SCATTERS], ids=["scans", "scatters"])
def test_cases_have_the_bits_of_their_references(selftest: SelfTest):
    compared = 0
    for ours, theirs in selftest.cases(torch.device("cpu")):
        expected = theirs()
        if expected.dtype != torch.bfloat16:  # to which the interpreter does not round to nearest
            assert same_bits(ours(), expected)
            compared += 1
    assert compared


@pytest.fixture
def selftest(monkeypatch: pytest.MonkeyPatch) -> SelfTest:
    """The test of a family of no kernels, on a GPU that is not there."""
    monkeypatch.setattr(admission, "_FAMILIES", {})
    monkeypatch.setattr(module, "INTERPRETED", False)
    return SelfTest("any", [], lambda device: [])


def test_kernels_serve_no_thread_before_their_verdict(selftest: SelfTest):
    asked, verdict, served, device = threading.Event(), threading.Event(), [], torch.device("cuda", 0)

    def allows(*arguments):
        selftest.require(device)  # as the kernels under test do
        asked.set()
        return verdict.wait(10)

    def use():
        selftest.require(device)
        served.append(verdict.is_set())

    with mock.patch.object(selftest.admission, "allows", allows):
        first, second = threading.Thread(target=use), threading.Thread(target=use)
        first.start()
        assert asked.wait(10)
        second.start()
        second.join(0.1)
        assert not served
        verdict.set()
        first.join()
        second.join()
    assert served == [True, True]


def test_kernels_that_fail_serve_nobody(selftest: SelfTest):
    with (
        mock.patch.object(selftest.admission, "allows", lambda *arguments: False),
        mock.patch.object(selftest.admission, "verdict", lambda *arguments: None),
        mock.patch("torch.cuda.get_device_name", lambda device: "any GPU"),
    ):
        for _ in range(2):
            with pytest.raises(RuntimeError, match="any kernels: expected the bits of their references on any GPU"):
                selftest.require(torch.device("cuda", 0))
