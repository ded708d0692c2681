"""The op map: no op of PyTorch's database is worse than ``docs/ops.json`` says, and the map itself can find faults."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("expecttest")

from bicompile.lowering.reduction import op as reduction_op  # noqa: E402, F401 (registers the ops)
from bicompile.maps import command, ops  # noqa: E402

COMMITTED = json.loads((Path(__file__).resolve().parent.parent / "docs" / "ops.json").read_text())
# Other versions of PyTorch have other ops and samples; the map is of this one.
COMPILED_EACH_DAY = 5


def problems(entry: ops.Entry) -> list[str]:
    """What is worse about ``entry`` than the committed map says."""
    expected = COMMITTED.get(entry.op, {}).get(entry.dtype, "refused")
    if ops.KINDS.index(entry.kind) <= ops.KINDS.index(expected):
        return []
    return [f"{entry.op} in {entry.dtype} was {expected} and is {entry.kind}: {'; '.join(entry.detail)}"]


@pytest.mark.parametrize("dtype", ops.DTYPES.values(), ids=ops.DTYPES)
def test_no_op_is_worse_than_the_committed_map_says(dtype: torch.dtype):
    infos = ops.op_infos(dtype)
    assert len(infos) > 400
    found = [problem for info in infos for problem in problems(ops.entry_of(info, dtype, max_samples=1))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("dtype", ops.DTYPES.values(), ids=ops.DTYPES)
def test_a_few_ops_other_each_day_are_right_compiled(dtype: torch.dtype):
    chosen = ops.sample_of(ops.op_infos(dtype), COMPILED_EACH_DAY, seed=os.environ["BICOMPILE_SAMPLE_SEED"])
    found = [p for info in chosen for p in problems(ops.entry_of(info, dtype, max_samples=3, compiled=True))]
    assert not found, "\n".join(found)


def named(name: str) -> object:
    return next(info for info in ops.op_infos(torch.float32) if ops.name_of(info) == name)


def test_classes_are_those_of_well_known_ops():
    expected = {"transpose": "exact", "exp": "elementwise", "nn.functional.linear": "lowered", "linalg.pinv": "refused"}
    expected["nn.functional.dropout"] = "elementwise"  # drawn: it has rows, and values that are not stock's
    found = {name: ops.entry_of(named(name), torch.float32, max_samples=3) for name in expected}
    assert {name: entry.kind for name, entry in found.items()} == expected
    assert found["nn.functional.linear"].rows > 0 and found["nn.functional.dropout"].rows == 3
    assert found["linalg.pinv"].detail == ["aten.linalg_pinv.atol_rtol_tensor"]


def test_wrong_values_are_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ops, "_in_eager", lambda op: op)
    monkeypatch.setitem(ops._TOLERANCE, torch.float32, 0.0)  # stock's own sums are not ours to the last bit
    kinds = {ops.entry_of(named(name), torch.float32, max_samples=9).kind for name in ("logsumexp", "std", "softmax")}
    assert "wrong" in kinds


def test_values_of_another_sign_are_found_however_rough_stock_is():
    for name in ("sin", "floor", "grid_sampler_2d"):
        info = named(name)
        args, kwargs = next(ops._samples(info, torch.bfloat16, 1))
        stock = ops._stock(info.op, args, kwargs)
        assert stock is not None and stock.exact
        stock.compare(stock.tensors, torch.bfloat16)
        with pytest.raises(AssertionError, match="not close"):
            stock.compare([-t for t in stock.tensors], torch.bfloat16)


def test_rows_that_depend_on_the_batch_are_found(monkeypatch: pytest.MonkeyPatch):
    def variant(op):
        return lambda x, *args, **kwargs: op(x, *args, **kwargs) + (1e-6 if len(x) == 1 else 0.0)

    monkeypatch.setattr(ops, "_in_eager", variant)
    entry = ops.entry_of(named("sin"), torch.float32, max_samples=2)
    assert entry.kind == "wrong" and "BatchInvarianceError" in entry.detail[0]


def test_page_and_file_hold_every_op(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    few = [named("sin"), named("mm")]
    monkeypatch.setattr(ops, "op_infos", lambda dtype: few)
    arguments = ["ops", "--samples", "2", "--write", str(tmp_path)]
    from bicompile.__main__ import main

    assert main(["map", *arguments]) == 0
    assert "float32: 2 ops, 0 exact, 1 elementwise, 1 lowered, 0 refused, 0 wrong" in capsys.readouterr().out
    assert json.loads((tmp_path / "ops.json").read_text())["mm"] == {"float32": "lowered", "bfloat16": "lowered"}
    assert "| mm | lowered | lowered | bicompile.mm |" in (tmp_path / "ops.md").read_text()
    assert command.counts([]) == "\n".join(
        f"{dtype}: 0 ops, " + ", ".join(f"0 {kind}" for kind in ops.KINDS) for dtype in ops.DTYPES
    )
