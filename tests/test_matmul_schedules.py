"""The choice of a GPU schedule: always one that can run, whatever the sizes; tables are read and written whole."""

from __future__ import annotations

import inspect
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from bicompile.lowering.matmul import schedule as schedules
from bicompile.lowering.matmul.order import gpu_order_for
from bicompile.lowering.matmul.problem import Factor, Problem, can_stream, problem_of
from bicompile.lowering.matmul.schedule import LIBRARY, REFERENCES, TABLES, LibrarySchedule, StreamSchedule
from bicompile.tuning import matmul as tuning

PATHS = sorted(TABLES.glob("sm_*.json"))
SIZES = st.sampled_from((1, 2, 7, 8, 16, 33, 64, 100, 768, 1000, 4096, 50257))


def _problem(m: int, n: int, k: int, b_by_k: bool = True, add: bool = False, offset: int = 0) -> Problem:
    a = Factor(0, k, 1, offset == 0)
    b = Factor(0, 1, k, True) if b_by_k else Factor(0, n, 1, True)
    return Problem(torch.bfloat16, torch.bfloat16, 1, m, n, k, a, b, add=add)


def test_the_order_cannot_see_the_batch():
    assert list(inspect.signature(gpu_order_for).parameters) == ["length", "dtype", "tf32"]
    assert gpu_order_for(64, torch.float32).group == 1 and gpu_order_for(64, torch.float32, tf32=True).group == 8


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_tables_hold_schedules_that_are_written_as_they_are_read(path):
    table = schedules.read_table(path)
    for schedule in table.own_schedules():
        assert schedules.parse(str(schedule)) == schedule
    assert tuning.layout(json.loads(path.read_text())) == path.read_text()
    older = int(path.stem.removeprefix("sm_")) < 90
    assert not (older and any(isinstance(s, StreamSchedule) for s in table.own_schedules()))


@given(
    m=SIZES,
    n=SIZES,
    k=SIZES,
    b_by_k=st.booleans(),
    add=st.booleans(),
    offset=st.integers(0, 1),
    path=st.sampled_from(PATHS),
)
def test_there_is_always_a_schedule_that_can_run(m, n, k, b_by_k, add, offset, path):
    problem = _problem(m, n, k, b_by_k, add, offset)
    wanted = schedules.preferences(problem, schedules.read_table(path), 132)
    assert wanted[-1] == REFERENCES[torch.bfloat16]
    assert len(wanted) == len(set(wanted))
    for schedule in wanted:
        assert not isinstance(schedule, StreamSchedule) or can_stream(problem)


def test_tuned_entries_come_first_and_hold_up_to_their_rows():
    path = TABLES / "sm_90.json"
    body = json.loads(path.read_text()) | {
        "tuned": {"tn 64x32": [[4, "library 2"], [16, "tile 16x16x256 warps 2 stages 4"]]}
    }
    table = schedules.Table(
        "",
        (),
        (),
        33,
        {
            shape: tuple((rows, schedules.parse(text)) for rows, text in entries)
            for shape, entries in body["tuned"].items()
        },
    )
    first = [schedules.preferences(_problem(m, 32, 64), table, 132)[0] for m in (1, 4, 5, 16, 17)]
    assert first[:2] == [LibrarySchedule(2)] * 2 and first[2] == first[3] != LIBRARY and first[4] == LIBRARY
    assert json.loads(tuning.layout(body)) == body


def test_a_newer_architecture_gets_the_newest_table_and_an_unknown_name_is_refused():
    assert schedules.table_for((13, 0)) == schedules.read_table(TABLES / "sm_120.json")
    assert schedules.table_for((8, 7)) == schedules.read_table(TABLES / "sm_86.json")
    with pytest.raises(ValueError, match="expected one such as"):
        schedules.parse("tile 16x16")


def test_strides_of_dims_of_size_one_do_not_matter():
    wide = torch.zeros(7, 100).bfloat16()
    one, weight = wide[:1, :64], torch.zeros(32, 64).bfloat16().t()
    problem = problem_of(one, weight, torch.bfloat16, tf32=False, add=False)
    assert problem.a_by_k and problem.b_by_k and problem.is_dense and problem.is_aligned
    column = problem_of(weight.t(), wide[0, :64, None], torch.bfloat16, tf32=False, add=False)
    assert column.b_by_k and column.is_dense


def test_repeated_winners_are_written_once():
    assert tuning.shortened([(1, "x"), (2, "x"), (4, "y"), (8, "x")]) == [(2, "x"), (4, "y"), (8, "x")]
