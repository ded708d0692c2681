"""A schedule is used only after it gave the reference's bits, whatever the number of threads that want it."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bicompile.lowering.gpu import admission
from bicompile.lowering.gpu.admission import Admission
from bicompile.lowering.gpu.device import DeviceKey

GOOD, OTHER = torch.tensor([1.0, -0.0, torch.nan]), torch.tensor([1.0, 0.0, torch.nan])


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A GPU that is not there, and no verdict yet."""
    monkeypatch.setenv("BICOMPILE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(admission, "_FAMILIES", {})
    monkeypatch.setattr(admission, "device_key", lambda index: DeviceKey(f"GPU {index}", (9, 0), 132, 1 << 17, ""))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())


def reference() -> list[Tensor]:
    return [GOOD, GOOD]


def test_the_verdict_is_kept_on_disk_for_its_device(device: None):
    def never() -> list[Tensor]:
        raise AssertionError("probed again")

    assert Admission("family", []).allows("tile", 0, reference, reference)
    assert Admission("family", []).allows("tile", 0, never, never)
    assert Admission("family", []).verdict("tile", 1) is None
    assert not Admission("family", []).allows("tile", 1, lambda: [GOOD, OTHER], reference)
    assert "probe 1: 33.33% of elements differ" in Admission("family", []).verdicts(1)[0].reason
    assert Admission("family", [Path(__file__)]).verdict("tile", 0) is None  # of other sources


@pytest.mark.parametrize(
    ("results", "reason"),
    [
        ([GOOD], "ValueError"),  # one too few
        ([GOOD, GOOD.double()], "probe 1"),
        ([GOOD, GOOD[None]], "probe 1"),
        (None, "RuntimeError: out of registers"),
    ],
)
def test_what_gives_something_else_or_fails_is_dropped(device: None, results: list[Tensor] | None, reason: str):
    def run() -> list[Tensor]:
        if results is None:
            raise RuntimeError("out of registers")
        return results

    family = Admission("family", [])
    assert not family.allows("tile", 0, run, reference)
    assert reason in family.verdicts(0)[0].reason


def test_without_memory_and_while_a_graph_is_captured_there_is_no_verdict(
    device: None, monkeypatch: pytest.MonkeyPatch
):
    def full() -> list[Tensor]:
        raise torch.OutOfMemoryError("none left")

    family = Admission("family", [])
    assert not family.allows("tile", 0, full, reference) and not family.verdicts(0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not family.allows("tile", 0, reference, reference) and not family.verdicts(0)


def test_of_threads_that_want_a_schedule_one_probes_it(device: None):
    family, probed, allowed = Admission("family", []), [], []
    assert not family.verdicts(0)

    def run() -> list[Tensor]:
        probed.append(threading.current_thread())
        return reference()

    def want() -> None:
        allowed.append(family.allows("tile", 0, run, reference))

    threads = [threading.Thread(target=want) for _ in range(2)]
    with family.lock:
        for thread in threads:
            thread.start()
            thread.join(0.05)  # it has found no verdict, and waits for the lock
    for thread in threads:
        thread.join()
    assert allowed == [True, True] and len(probed) == 1
