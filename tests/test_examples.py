"""Every example runs and says what its docstring promises."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def _output(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def test_linear_keeps_every_row(capsys):
    assert "batch_invariant: 0 of 12 rows changed" in _output("01_linear.py", capsys)


def test_explain_shows_what_is_lowered_crossed_and_refused(capsys):
    covered, refused = _output("02_explain.py", capsys).split("\n\n")
    assert covered.startswith("batch-invariant") and "bicompile.sdpa" in covered and "cross-batch" in covered
    assert refused.startswith("NOT proven") and "_cdist_forward" in refused


def test_generate_keeps_every_logit(capsys):
    pytest.importorskip("transformers")
    stock, ours = _output("03_generate.py", capsys).splitlines()
    assert "batch_invariant: 0 of" in ours
    assert "stock: 0 of" not in stock


def test_sampled_requests_get_one_answer_for_each_seed(capsys, monkeypatch):
    pytest.importorskip("transformers")
    few = ["--model", "random", "--requests", "8", "--seeds", "2", "--largest", "4", "--tokens", "6"]
    monkeypatch.setattr("sys.argv", ["04_thousand_completions.py", *few])
    output = _output("04_thousand_completions.py", capsys)
    assert "batch_invariant: 2 different answers to 8 requests" in output
    assert "stock: " in output


def test_trainer_computes_the_samplers_probabilities(capsys, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr("sys.argv", ["on_policy_rl.py", "--steps", "2", "--layers", "1"])
    stock, ours = (line for line in _output("on_policy_rl.py", capsys).splitlines() if "at most" in line)
    assert ours.lstrip().startswith("batch_invariant: KL(sampler || trainer) at most 0,")
    assert "at most 0," not in stock


def test_every_example_is_tested():
    tested = {"01_linear.py", "02_explain.py", "03_generate.py", "04_thousand_completions.py", "on_policy_rl.py"}
    assert {path.name for path in EXAMPLES.glob("*.py")} == tested
