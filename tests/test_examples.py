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
    assert refused.startswith("NOT proven") and "_linalg_svd" in refused


def test_every_example_is_tested():
    tested = {"01_linear.py", "02_explain.py"}
    assert {path.name for path in EXAMPLES.glob("*.py")} == tested
