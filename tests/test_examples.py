"""Every example runs and says what its docstring promises."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
PNG = b"\x89PNG"


def _output(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def test_linear_keeps_every_row(capsys):
    assert "batch_invariant: 0 of 12 rows changed" in _output("01_linear.py", capsys)


def test_explain_shows_what_is_lowered_crossed_and_refused(capsys):
    covered, refused = _output("02_explain.py", capsys).split("\n\n")
    assert covered.startswith("batch-invariant") and "bicompile.sdpa" in covered and "cross-batch" in covered
    assert refused.startswith("NOT proven") and "linalg_pinv" in refused


def test_generate_keeps_every_logit(capsys):
    pytest.importorskip("transformers")
    stock, ours = _output("03_generate.py", capsys).splitlines()
    assert "batch_invariant: 0 of" in ours
    assert "stock: 0 of" not in stock


def test_requests_get_one_answer_greedily_and_one_for_each_seed(capsys, monkeypatch, tmp_path):
    pytest.importorskip("transformers")
    few = ["--model", "random", "--requests", "8", "--seeds", "2", "--largest", "4", "--tokens", "6", "--write"]
    picture = tmp_path / "counts.png"
    monkeypatch.setattr("bicompile.bench.results.RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["04_thousand_completions.py", *few, "--modes", "ours"])
    output = _output("04_thousand_completions.py", capsys)
    assert "batch_invariant, greedy (1 right): 1 different answers" in output
    assert "batch_invariant, sampled (2 right): 2 different answers" in output
    # A run of another mode adds to what the first one wrote.
    monkeypatch.setattr("sys.argv", ["04_thousand_completions.py", *few, "--modes", "eager", "--plot", str(picture)])
    assert "stock eager, sampled" in _output("04_thousand_completions.py", capsys)
    (file,) = tmp_path.glob("*/determinism.json")
    ours, stock = json.loads(file.read_text())["rows"][1::2]
    assert (ours["against"], stock["against"]) == ("batch_invariant", "stock eager")
    assert ours["unique"] == stock["ours_unique"] == 2 and stock["ratio"] > 0 and stock["same_bits"]
    assert picture.read_bytes().startswith(PNG)


def test_a_mode_is_not_held_against_ours_of_another_case(capsys, monkeypatch, tmp_path):
    pytest.importorskip("transformers")
    monkeypatch.setattr("bicompile.bench.results.RESULTS", tmp_path)
    options = ["--model", "random", "--requests", "8", "--write", "--modes", "eager"]
    monkeypatch.setattr("sys.argv", ["04_thousand_completions.py", *options])
    with pytest.raises(SystemExit):
        _output("04_thousand_completions.py", capsys)
    assert "add ours" in capsys.readouterr().err


def test_answers_that_differ_are_counted_and_placed():
    found = runpy.run_path(str(EXAMPLES / "04_thousand_completions.py"))["Found"]
    assert found({0: [[5, 6, 7]], 1: [[1, 2, 3], [1, 2, 4], [1, 9, 3]]}).unique == 4
    assert found({0: [[5, 6, 7]], 1: [[1, 2, 3], [1, 2, 4], [1, 9, 3]]}).first_divergence == 2
    assert found({0: [[5, 6, 7]]}).first_divergence is None


def test_any_module_is_refused_covered_or_allowed(capsys):
    refused, covered, allowed = _output("05_any_module.py", capsys).splitlines()
    assert refused.startswith("refused: ") and "linalg_pinv" in refused
    assert covered.startswith("covered: every row keeps its bits")
    assert allowed.startswith("allowed: solutions of shape (9, 3, 1)")


def test_vision_models_keep_every_image(capsys):
    pytest.importorskip("transformers")
    lines = _output("06_vision.py", capsys).splitlines()
    assert [line for line in lines if "batch_invariant: 0 of 8 images" in line] == lines[1::2]
    assert not any("stock: 0 of" in line for line in lines[::2]) and len(lines) == 4


def test_scores_do_not_know_the_batch_size(capsys, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr("sys.argv", ["07_evaluation.py", "--tiny", "--batch-sizes", "3", "8"])
    stock, ours = _output("07_evaluation.py", capsys).splitlines()
    assert "batch_invariant: 0 of 64 scores changed, 0 answers turned" in ours
    assert "stock: 0 of" not in stock


def test_server_gives_each_prompt_one_answer(capsys, monkeypatch):
    pytest.importorskip("transformers")
    few = ["--tiny", "--clients", "12", "--seconds", "0.5", "--tokens", "8"]
    monkeypatch.setattr("sys.argv", ["08_serving.py", *few])
    _, ours = _output("08_serving.py", capsys).splitlines()
    counts = re.search(r"batch_invariant: (\d+) different answers to (\d+) prompts from 12 clients", ours)
    assert counts and counts[1] == counts[2]


def test_trl_trains_with_the_samplers_probabilities(capsys, monkeypatch, tmp_path):
    pytest.importorskip("trl")
    few, picture = ["--tiny", "--steps", "2", "--rows", "8"], tmp_path / "curves.png"
    monkeypatch.setattr("sys.argv", ["09_trl.py", *few, "--plot", str(picture)])
    steps = _output("09_trl.py", capsys).splitlines()
    stock, ours = ([line for line in steps if line.lstrip().startswith(mode)] for mode in ("stock", "batch_invariant"))
    assert len(stock) == len(ours) == 2
    assert all(re.search(r": reward [\d.]+, 0 of \d\d+ tokens changed, 0 ratios are not 1, KL 0$", x) for x in ours)
    assert all(re.search(r", [1-9]\d* of \d+ tokens changed, [1-9]\d* ratios .*, KL \d\S+$", x) for x in stock)
    assert picture.read_bytes().startswith(PNG)


def test_trainer_computes_the_samplers_probabilities(capsys, monkeypatch, tmp_path):
    pytest.importorskip("transformers")
    found, picture = [], tmp_path / "curves.png"
    for dtype in ("float32", "bfloat16"):  # stock's products follow the batch in one of them, by the processor
        arguments = ["--steps", "2", "--layers", "1", "--hidden", "256", "--dtype", dtype, "--plot", str(picture)]
        monkeypatch.setattr("sys.argv", ["on_policy_rl.py", *arguments])
        stock, ours = (line for line in _output("on_policy_rl.py", capsys).splitlines() if "at most" in line)
        assert ours.lstrip().startswith("batch_invariant: KL(sampler || trainer) at most 0,")
        found.append(stock)
    assert any("at most 0," not in stock for stock in found), found
    assert picture.read_bytes().startswith(PNG)


def test_every_example_is_tested():
    source = Path(__file__).read_text()
    assert [path.name for path in EXAMPLES.glob("*.py") if f'_output("{path.name}"' not in source] == []
