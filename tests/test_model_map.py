"""The model map: no model is worse than ``docs/models.json`` says, and the map itself can find faults."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("transformers")

from bicompile import eager_mode  # noqa: E402
from bicompile.__main__ import main  # noqa: E402
from bicompile.maps import command, models, models_page  # noqa: E402
from bicompile.maps.architectures import SUBJECTS, named  # noqa: E402
from bicompile.testing import same_bits  # noqa: E402

DOCS = Path(__file__).resolve().parent.parent / "docs"
COMMITTED, MADE = models_page.from_json((DOCS / "models.json").read_text())
SEED = os.environ["BICOMPILE_SAMPLE_SEED"]  # another each day
EAGER_EACH_DAY = 3


def problems(entry: models.Entry) -> list[str]:
    """What is worse about ``entry`` than the committed map says."""
    expected = COMMITTED[entry.model]
    worse = models.KINDS.index(entry.kind) > models.KINDS.index(expected.kind)
    less = set(expected.sequence) - set(entry.sequence) if entry.kind == expected.kind else set()
    if not worse and not less:
        return []
    return [f"{entry.model} was {expected.kind} and is {entry.kind}, less {less or 'nothing'}: {entry.detail}"]


def test_committed_map_holds_every_model_and_none_is_wrong():
    assert list(COMMITTED) == [subject.name for subject in SUBJECTS]
    assert [entry.family for entry in COMMITTED.values()] == [subject.family for subject in SUBJECTS]
    kinds = [entry.kind for entry in COMMITTED.values()]
    assert "wrong" not in kinds and set(kinds) <= set(models.KINDS)
    assert len(kinds) >= 130 and kinds.count("passes") >= 0.9 * len(kinds)


def test_page_says_what_the_file_says():
    assert models_page.as_markdown(list(COMMITTED.values()), MADE) == (DOCS / "models.md").read_text()


def test_a_few_models_other_each_day_are_no_worse_than_the_committed_map_says():
    chosen = random.Random(SEED).sample(SUBJECTS, EAGER_EACH_DAY)
    found = [problem for subject in chosen for problem in problems(models.entry_of(subject, compiled=()))]
    assert not found, "\n".join(found)


def test_one_model_another_each_day_is_no_worse_compiled():
    """One graph: a row alone, which makes another, is compiled when the map is made."""
    quick = [subject for subject in SUBJECTS if COMMITTED[subject.name].graphs and COMMITTED[subject.name].seconds < 50]
    entry = models.entry_of(random.Random(SEED).choice(quick), models.COMPILED)
    assert entry.graphs
    assert not problems(entry)


@contextlib.contextmanager
def _stock():
    yield


def test_stock_is_found_to_be_wrong(monkeypatch: pytest.MonkeyPatch):
    """Rows that depend on their company are found, where nothing keeps them from it."""
    monkeypatch.setattr(eager_mode, "eager", _stock)
    entries = [models.entry_of(named(name), compiled=()) for name in ("BERT", "ViT", "GPT-J")]
    assert "wrong" in {entry.kind for entry in entries}
    assert any("BatchInvarianceError" in line for entry in entries for line in entry.detail)


def test_wrong_values_are_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(models, "_with_our_attention", lambda subject: (_halved(subject.build("batch_invariant")), ""))
    entry = models.entry_of(named("BERT"), compiled=())
    assert entry.kind == "wrong" and "not close" in entry.detail[0]


def _halved(model):
    model.encoder.layer[0].output.dense.weight.mul_(0.5)
    return model


def test_refusals_and_models_that_do_not_run_are_told_apart(monkeypatch: pytest.MonkeyPatch):
    refused = models.entry_of(named("ViLT"), compiled=())
    assert refused.kind == "refused" and "aten.multinomial.default at modeling_vilt.py" in refused.detail[0]
    broken = models.Subject("broken", "LlamaModel", "LlamaConfig", "decoder", lambda config: {"none": torch.ones(1)})
    assert models.entry_of(broken, compiled=()).kind == "not run"


def test_command_keeps_the_models_that_it_does_not_try(tmp_path: Path, capsys: pytest.CaptureFixture):
    before = [COMMITTED["Llama"], COMMITTED["GPT-2"]]
    models_page.write(tmp_path, before, MADE)
    assert main(["map", "models", "--only", "FNet", "--eager", "--write", str(tmp_path)]) == 0
    assert "1 models: 1 passes, 0 P1 only, 0 refused, 0 not run, 0 wrong" in capsys.readouterr().out
    found = models_page.read(tmp_path)
    assert list(found) == ["Llama", "GPT-2", "FNet"]
    assert [found["Llama"], found["GPT-2"]] == before
    assert "| FNet | passes |" in (tmp_path / "models.md").read_text()
    assert found["FNet"].date >= before[0].date
    with pytest.raises(ValueError, match="no model 'Lama'"):
        main(["map", "models", "--only", "Lama"])
    assert command.counts([])  # of ops


def test_command_mixes_no_versions(tmp_path: Path):
    models_page.write(tmp_path, [COMMITTED["Llama"]], {**MADE, "torch": "2.0.0"})
    with pytest.raises(ValueError, match="make the whole map"):
        main(["map", "models", "--only", "FNet", "--eager", "--write", str(tmp_path)])


def _written_out(query: Tensor, key: Tensor, value: Tensor, padding: int) -> Tensor:
    """Attention as models write it out, of the last query, with ``padding`` hidden keys in front."""
    key, value = (F.pad(t, (0, 0, padding, 0), value=3.0) for t in (key, value))
    hidden = torch.arange(len(key)) < padding
    return (query @ key.T).masked_fill(hidden, torch.finfo(query.dtype).min).softmax(-1) @ value


def test_written_out_attention_shows_padding_from_a_block_of_keys_on():
    """What the page says of it."""
    query, key, value = torch.randn(3, 16), torch.randn(200, 16), torch.randn(200, 16)
    with eager_mode.eager():
        for keys, padding in itertools.product((1, 5, 40, 150), (1, 7, 31, 32, 42)):
            outputs = [_written_out(query, key[:keys], value[:keys], p) for p in (0, padding)]
            assert same_bits(*outputs), f"{keys} keys, {padding} more"
        assert not same_bits(*(_written_out(query, key, value, p) for p in (0, 1)))
