"""``bicompile bench``: every suite runs on the CPU in its smallest setting, and can say its cases without a GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tqdm")

from bicompile.__main__ import main
from bicompile.bench import Row, plotting
from bicompile.bench.results import RESULTS, _command, device_slug
from bicompile.bench.suites import MODULES, compile_cpu
from bicompile.bench.table import table

SMALLEST = {
    "matmul": ["--only", "float32 feed-forward 576 -> 1536 -> 576 M=64"],
    "attention": ["--only", "decode float32 B=1 L=1 S=128"],
    "reduction": ["--only", "softmax 1x49152 float32"],
    "scatter": ["--only", "index_add of a vector"],
    "convolution": ["--only", "3x3, 64 channels, 28x28 float32"],
    "size": ["--layers", "0", "--only", "4 x 1 tokens, width 256"],
    "model": ["--only", "20 products"],
    "compile": ["--layers", "0"],
    "training": ["--layers", "0"],
}


def _in_this_process(command: list[str], **_: Any) -> SimpleNamespace:
    """What the worker says to whom ``compile`` gave ``command``: a process of its own would import for ten seconds."""
    python, flag, module, *arguments = command
    assert (python, flag, module) == (sys.executable, "-m", compile_cpu.__name__)
    return SimpleNamespace(stdout=f"a line of a library's\n{compile_cpu.worker(*arguments)}\n")


@pytest.mark.parametrize("suite", MODULES)
def test_every_suite_measures_its_smallest_case_on_the_cpu(suite: str, tmp_path: Path, capsys, monkeypatch):
    if suite == "compile":
        monkeypatch.setattr(compile_cpu, "subprocess", SimpleNamespace(run=_in_this_process, PIPE=None))
    file = tmp_path / "result.json"
    options = ["--device", "cpu", "--quick", "--case-seconds", "0.01", "--json", str(file)]
    assert main(["bench", suite, *options, *SMALLEST[suite]]) == 0
    found, output = json.loads(file.read_text()), capsys.readouterr().out
    assert set(found) == {"meta", "rows", "summary"}
    assert {"device", "driver", "versions", "threads", "load", "date", "commit", "command"} == set(found["meta"])
    assert found["summary"] and all(set(entry) == {"value", "bar"} for entry in found["summary"].values())
    assert found["rows"]
    for row in found["rows"]:
        assert row["case"] in output
        assert {"case", "against", "ratio", "same_bits"} <= set(row) and row["ratio"] > 0
        ours, theirs = (next(v for key, v in row.items() if key.startswith(who)) for who in ("ours_", "theirs_"))
        higher_is_better = any(key.endswith("_per_s") for key in row)
        assert row["ratio"] == pytest.approx(ours / theirs if higher_is_better else theirs / ours, rel=1e-2)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("suite", MODULES)
def test_every_suite_says_its_cases_without_a_gpu(suite: str, device: str, capsys):
    few, every = [], []
    for names, options in ((few, ["--quick"]), (every, [])):
        assert main(["bench", suite, "--device", device, "--list", *options]) == 0
        names += capsys.readouterr().out.splitlines()
    assert 1 <= len(few) <= len(every) == len(set(every))


def test_a_row_that_lost_its_bits_fails_the_command(monkeypatch):
    from bicompile.bench.suites import attention_cpu

    monkeypatch.setattr(attention_cpu.Case, "first_row_keeps_its_bits", lambda self: False)
    options = ["--device", "cpu", "--quick", "--case-seconds", "0.01", *SMALLEST["attention"]]
    assert main(["bench", "attention", *options]) == 1


def test_inductor_is_measured_with_pytorchs_own_attention():
    from bicompile.bench.suites import smollm

    for backend, attention in (("inductor", "sdpa"), ("batch_invariant", "batch_invariant")):
        model = smollm.compiled(torch.float32, backend, quick=True)
        assert model.config._attn_implementation == attention


def test_part_of_a_suite_is_not_written_over_the_whole(capsys):
    for options in (["--quick"], ["--only", "M=1"]):
        assert main(["bench", "matmul", "--device", "cpu", "--write", *options]) == 2
        assert "--write keeps whole runs" in capsys.readouterr().out
    assert main(["bench", "matmul", "--device", "cpu", "--only", "no such case"]) == 2


def test_plot_is_drawn_over_the_sweep_and_as_bars(tmp_path: Path):
    drawn = []
    for group, rows, ratio in (("a", 1, 0.5), ("a", 8, 2.0), ("b", 1, 1.0)):
        extra = {"group": group, "series": group, "rows": rows, "ours_us": 1.0, "theirs_us": ratio}
        drawn.append(Row(f"{group} M={rows}", "eager", ratio, extra=extra))
    for name, sweep in (("lines", "rows"), ("bars", None)):
        plotting.plot("matmul", drawn, sweep, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_every_result_has_its_picture():
    wanted = [path.with_suffix(".png") for path in RESULTS.glob("*/*.json")]
    assert wanted and not [path for path in wanted if not path.exists()], "run python -m bicompile.bench.plotting"


def test_a_row_is_read_as_it_was_written():
    row = Row("a", "eager", 2.0, True, {"ours_us": 10.0, "group": "g"})
    assert Row.from_json(row.to_json()) == row


def test_table_shows_the_pair_that_was_measured_and_lost_bits():
    rows = [
        Row("a", "eager", 2.0, True, {"ours_us": 10.0, "theirs_us": 20.0, "ratio_low": 1.9, "ratio_high": 2.1}),
        Row("b", "inductor", 0.5, False, {"ours_tokens_per_s": 7.0, "theirs_tokens_per_s": 14.0}),
    ]
    _, first, second = table(rows).splitlines()
    assert first.split() == "a eager 10 20 us 2.000 1.90 to 2.10 yes".split()
    assert second.split() == "b inductor 7 14 tokens/s 0.500 NO".split()


@pytest.mark.parametrize(
    ("vendor", "name", "family", "model", "slug"),
    [
        ("AuthenticAMD", "AMD EPYC", 25, 17, "cpu-amd-epyc-zen4"),
        ("AuthenticAMD", "AMD EPYC 7B13 64-Core Processor", 25, 1, "cpu-amd-epyc-7b13-zen3"),
        ("GenuineIntel", "Intel(R) Xeon(R) Processor", 6, 207, "cpu-intel-xeon-emerald-rapids"),
        ("GenuineIntel", "Intel(R) Xeon(R) Gold 6 CPU @ 2.7GHz", 6, 143, "cpu-intel-xeon-gold-6-sapphire-rapids"),
        ("GenuineIntel", "Intel(R) Core(TM) i7", 6, 1, "cpu-intel-core-i7-family-6-model-1"),
    ],
)  # fmt: skip
def test_results_lie_in_a_folder_of_the_processors_name(vendor, name, family, model, slug, monkeypatch):
    facts = {"vendor_id": vendor, "model name": name, "cpu family": str(family), "model": str(model)}
    monkeypatch.setattr("bicompile.bench.results._cpu_facts", lambda: facts)
    assert device_slug() == slug


def test_command_is_kept_as_it_can_be_typed():
    assert _command(["/x/bin/bicompile", "bench", "matmul"]) == "bicompile bench matmul"
    assert _command(["/x/bicompile/__main__.py", "bench", "model"]) == "bicompile bench model"
    assert _command(["examples/01_linear.py", "--n", "3"]) == "python examples/01_linear.py --n 3"
