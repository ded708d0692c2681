"""``bicompile explain``: what it takes for the target and its inputs, what it writes, and its exit code."""

from __future__ import annotations

import json
import re
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from bicompile.__main__ import main
from bicompile.explain_command import ExplainError, InputSpec, is_factory, parse_input

MODELS = """
    import torch
    from torch import nn

    def plain(x, scale=2.0):
        return x.softmax(-1) * scale

    def refused(x):
        return torch.linalg.pinv(x)

    def broken(x):
        y = x.sum(-1)
        torch._dynamo.graph_break()
        return y * 2

    def build():
        return nn.Linear(8, 4)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.drop, self.out = nn.Embedding(50, 8), nn.Dropout(0.5), nn.Linear(8, 4)

        def forward(self, ids, mask):
            return self.out(self.drop(self.table(ids)) * mask[..., None])

    ready = nn.LayerNorm(8)
    number = 3

    def raises(x):
        raise ValueError("no such rows")

    def by_name():
        return {"mask": torch.ones(4, 7, dtype=torch.bool), "ids": torch.arange(28).view(4, 7)}

    def by_place():
        return (torch.ones(4, 8),)

    class holder:
        inner = build
"""


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    path = tmp_path / "explained_models.py"
    path.write_text(textwrap.dedent(MODELS))
    monkeypatch.setattr("sys.path", ["", *sys.path])
    return str(path)


@pytest.mark.parametrize(
    ("target", "arguments"),
    [
        ("plain", "--input 4x8:bfloat16 --input scale=0.5"),
        ("build", "--input 4x8 --dtype bfloat16"),
        ("Net", "--input 4x7:int64:50 --input 4x7:bool --inference"),
        ("Net", "--inputs {}:by_name --inference"),
        ("ready", "--inputs {}:by_place"),
        ("holder.inner", "--input 4x8"),
    ],
)
def test_what_is_covered_exits_with_0(target: str, arguments: str, models: str, capsys: pytest.CaptureFixture[str]):
    assert main(["explain", f"{models}:{target}", *arguments.format(models).split()]) == 0
    out = capsys.readouterr().out
    assert out.startswith("batch-invariant: ") and "lowered" in out
    assert ("bfloat16" in out) == ("bfloat16" in arguments)


@pytest.mark.parametrize(("target", "seen"), [("refused", "linalg_pinv"), ("broken", "graph break")])
def test_what_is_not_proven_exits_with_1(target: str, seen: str, models: str, capsys: pytest.CaptureFixture[str]):
    assert main(["explain", f"{models}:{target}", "--input", "4x3x3"]) == 1
    out = capsys.readouterr().out
    assert "NOT proven" in out and seen in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("{}:plan --input 4x8", "has no 'plan'; it has .*plain"),
        ("{}:number --input 4x8", "expected a function, a module or a factory of one, got int"),
        ("{}:raises --input 4x8", "raised when it was called: .*no such rows"),
        ("{}:plain", "expected an input that holds the batch, got none; give one for each of x, scale"),
        ("{}:plain --input 4y8", "expected .*SIZExSIZE.* got '4y8'"),
        ("{}:plain --input 4x8:float31", "expected a dtype such as float32, .*, got 'float31'"),
        ("{}:plain --inputs {}:plain", "--inputs: .* raised: TypeError"),
        ("{}:plain --inputs {}:build", "expected a tuple of arguments, a dict .* got Linear"),
        ("missing.py:plain --input 4x8", "expected a Python file, and there is none at"),
        ("no_such_package.mine:plain --input 4x8", "nothing is called 'no_such_package'"),
        ("plain --input 4x8", "expected MODULE:CALLABLE such as mine.py:model, got 'plain'"),
    ],
)
def test_what_cannot_be_tried_exits_with_2_and_says_what_to_do(
    arguments: str, said: str, models: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["explain", *arguments.replace("{}", models).split()]) == 2
    captured = capsys.readouterr()
    assert not captured.out
    assert re.search(said, captured.err, re.DOTALL), captured.err


def test_files_hold_the_certificate(models: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    files = ["--json", str(tmp_path / "c.json"), "--html", str(tmp_path / "c.html")]
    assert main(["explain", f"{models}:plain", "--input", "4x8", *files]) == 0
    printed = capsys.readouterr().out
    assert main(["explain", f"{models}:plain", "--input", "4x8", "--json"]) == 0
    written = json.loads((tmp_path / "c.json").read_text())
    assert written == json.loads(capsys.readouterr().out)
    assert written["subject"] == "plain" and written["proof"] in printed
    assert (tmp_path / "c.html").read_text().startswith("<!DOCTYPE html>")


def test_specs_are_read_as_help_says():
    assert parse_input("4x16") == InputSpec(None, (4, 16))
    assert parse_input("ids=4x7:int64:100") == InputSpec("ids", (4, 7), torch.int64, 100)
    assert parse_input("dim=-1") == InputSpec("dim", number=-1)
    assert parse_input("eps=1e-5") == InputSpec("eps", number=1e-5)
    for wrong in ("", "4x", "x4", "4x16:", "4x16:float32:1:2", "4x16:int64:many", "a b=4", "=4x4"):
        with pytest.raises(ExplainError, match="expected"):
            parse_input(wrong)


def test_random_inputs_are_those_of_their_seed():
    def drawn(seed: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        specs = [parse_input(text) for text in ("3x4", "3:int64:5", "3x2:bool", "2:bfloat16")]
        return [spec.value(generator, torch.float64, "cpu") for spec in specs]

    x, integers, flags, half = drawn(0)
    assert (x.dtype, integers.dtype, flags.dtype) == (torch.float64, torch.int64, torch.bool)
    assert half.dtype == torch.bfloat16 and 0 <= int(integers.min()) <= int(integers.max()) < 5
    assert torch.equal(x, drawn(0)[0]) and not torch.equal(x, drawn(1)[0])


def test_what_takes_nothing_is_a_factory():
    assert is_factory(lambda: 1) and is_factory(torch.nn.Linear)
    assert not is_factory(lambda x: x) and not is_factory(lambda x=1: x)
    assert not is_factory(torch.nn.Identity()) and not is_factory(torch.mm) and not is_factory(int)
