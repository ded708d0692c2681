"""``bicompile doctor`` on this machine, and on ones that lack something."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from bicompile import doctor
from bicompile.__main__ import main
from bicompile.lowering import native
from bicompile.lowering.gpu import admission
from bicompile.lowering.gpu.admission import Admission, Verdict


def test_a_machine_that_can_run_this_suite_has_a_processor_and_a_compiler(capsys):
    main(["doctor"])
    text = capsys.readouterr().out
    for word in ("torch", torch.__version__, "C++", "cpu", "bicompile", "MB"):
        assert word in text


def test_json_holds_what_the_text_says(capsys):
    code = main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"versions", "compilers", "devices", "caches", "problems"}
    assert found["versions"]["torch"] == torch.__version__
    assert found["devices"][0]["device"] == "cpu" and found["devices"][0]["usable"]
    assert code == (1 if found["problems"] else 0)
    assert all(problem["what"] and problem["remedy"] for problem in found["problems"])


def test_a_missing_compiler_is_a_problem_with_a_remedy(monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "no-such-compiler" in text and "unusable" in text


def test_a_cache_directory_that_cannot_be_written_is_a_problem(monkeypatch, tmp_path):
    monkeypatch.setenv("BICOMPILE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    assert any("BICOMPILE_CACHE_DIR" in problem.remedy for problem in doctor.examine().problems)


def test_an_unknown_torch_is_a_problem(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.4.0+cpu")
    assert any("2.4.0" in problem.what for problem in doctor.examine().problems)


@pytest.mark.parametrize("dropped", ["some", "all"])
def test_dropped_schedules_are_named_with_their_reason(monkeypatch, dropped):
    """A GPU, its schedules and their verdicts, as they would be read from the cache."""
    verdicts = [Verdict("matmul", "tile 128", False, "probe 3: 2% of elements differ")]
    if dropped == "some":
        verdicts.append(Verdict("matmul", "tile 64", True))
    family = SimpleNamespace(verdicts=lambda index: verdicts)
    monkeypatch.setattr(doctor, "known_families", lambda: {"matmul": family})
    problems: list[doctor.Problem] = []
    schedules = doctor._schedules(0, problems)
    assert schedules["matmul"]["admitted"] == len(verdicts) - 1
    device = doctor.Device("cuda:0", "a GPU", "sm_90", True, schedules)
    text = str(doctor.Findings({}, {}, [device], {}, problems))
    assert "tile 128: probe 3" in text
    assert bool(problems) == (dropped == "all")


def test_every_admission_is_known_by_its_family(monkeypatch):
    monkeypatch.setattr(admission, "_FAMILIES", {})
    made = Admission("example", [])
    assert admission.known_families() == {"example": made}


def test_sizes_of_caches_are_counted(monkeypatch, tmp_path):
    monkeypatch.setenv("BICOMPILE_CACHE_DIR", str(tmp_path))
    (tmp_path / "admitted").mkdir()
    (tmp_path / "admitted" / "matmul.json").write_text("12345")
    assert native.cache_dir() == tmp_path
    cache = doctor.examine().caches["bicompile"]
    assert (cache["files"], cache["bytes"]) == (1, 5)
