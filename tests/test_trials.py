"""``bicompile.testing.trials.search``: what it varies, what it finds, and that it shrinks to the fewest rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from test_testing_kit import Doubles
from torch import Tensor, nn

from bicompile.errors import BatchInvarianceError
from bicompile.testing.strategies import Trial, trials
from bicompile.testing.trials import search

needs_mkl = pytest.mark.skipif(
    not torch.backends.mkl.is_available(), reason="controls were measured with MKL on x86-64"
)


def rows(num_rows: int = 3, *shape: int) -> Tensor:
    return torch.randn(num_rows, *(shape or (40,)), generator=torch.Generator().manual_seed(0))


def found(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Trial:
    with pytest.raises(BatchInvarianceError) as caught:
        search(fn, *args, **{"max_examples": 200, **kwargs})
    assert isinstance(caught.value.trial, Trial)
    with pytest.raises(BatchInvarianceError):  # and the trial alone shows it too
        search(fn, *args, trial=caught.value.trial, **kwargs)
    return caught.value.trial


def _follows_threads(x: Tensor) -> Tensor:
    return x * torch.get_num_threads()


def _follows_size(x: Tensor) -> Tensor:
    return x / 3.0 if len(x) > 2 else x * (1.0 / 3.0)


def _follows_alignment(x: Tensor) -> Tensor:
    return x * (1 + x.data_ptr() % 16)


def _leaks_nan(x: Tensor) -> Tensor:
    return torch.where(x.isnan().any(), 2.0 * x, x)


def _follows_equal_rows(x: Tensor) -> Tensor:
    return 2.0 * x if len(x) > 1 and bool((x[0] == x).all()) else x


def _wrong_for_large_values(x: Tensor) -> Tensor:
    return x + (x.abs().amax(-1, keepdim=True) > 60) * len(x)


def test_what_moves_a_row_is_found_and_nothing_else_is_left_in_the_trial():
    assert found(_follows_threads, rows()).threads != (None, None)
    trial = found(_follows_size, rows())
    assert {len(trial.rows), len(trial.order)} == {1, 3} and trial.fill is None and trial.threads == (None, None)
    assert found(_follows_alignment, rows()).layout != "contiguous"
    assert found(_leaks_nan, rows()).fill == "nan"
    trial = found(_follows_equal_rows, rows())
    assert max(len(trial.rows), len(trial.order)) == 2
    assert found(_wrong_for_large_values, rows()).values is not None


def test_shapes_that_are_static_are_held_against_dynamic_ones():
    def doubles_where_shapes_are_dynamic(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        if any(isinstance(value, torch.SymInt) for value in inputs):
            return lambda *values: [2.0 * y for y in gm(*values)]
        return gm.forward

    trial = found(lambda x: x + 1, rows(), backend=doubles_where_shapes_are_dynamic, max_examples=20)
    assert trial.dynamic[0] != trial.dynamic[1]


def test_padding_is_tried_where_the_sequence_is_named():
    def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
        return (x * mask[..., None]).cumsum(1)  # what was before a position, and is 0 in padding

    def counts_padding(x: Tensor, mask: Tensor) -> Tensor:
        return masked_mean(x, mask) + x.shape[1]

    x, mask = rows(3, 5, 4), torch.ones(3, 5)
    per_row = lambda x, mask: torch.stack([masked_mean(a[None], b[None])[0] for a, b in zip(x, mask, strict=True)])  # noqa: E731
    search(per_row, x, mask, seq_dim=1, max_examples=100, new_values=False)
    search(counts_padding, x, mask, max_examples=30)
    trial = found(counts_padding, x, mask, seq_dim=1)
    assert sum(trial.padding) == 1 and len(trial.rows) == len(trial.order) == 1


def test_batches_have_as_many_rows_as_are_asked_for():
    sizes = set()

    def seen(x: Tensor) -> Tensor:
        sizes.add(len(x))
        return x

    search(seen, rows(), min_rows=2, max_rows=4, max_examples=60)
    assert sizes == {2, 3, 4}


def test_gradients_are_compared_if_asked_for():
    search(Doubles.apply, rows(), max_examples=30)
    found(Doubles.apply, rows(), check_input_grad=True)


def test_inputs_may_be_nested_and_sizes_that_hold_no_rows_are_not_taken_for_batches():
    table, weight = rows(7, 4), nn.Parameter(rows(2, 4))

    def fn(batch: dict[str, Any], scale: float) -> dict[str, Tensor]:
        ids, (x,) = batch["ids"], batch["more"]
        assert len(ids) == len(x) and len(batch["table"]) == 7
        return {"out": batch["table"][ids] * scale + x * weight[0], "table": batch["table"]}

    search(fn, {"ids": torch.tensor([1, 5, 6]), "more": [rows(3, 4)], "table": table}, 2.0, max_examples=60)


def test_what_cannot_be_searched_is_refused():
    with pytest.raises(ValueError, match="output of size 3"):
        search(lambda x: x.sum(), rows())
    with pytest.raises(ValueError, match="expected a batch size from 4 to 3"):
        search(torch.abs, rows(), min_rows=4, max_rows=3)
    with pytest.raises(ValueError, match="expected seq_dim to be a dim"):
        search(torch.abs, rows(), seq_dim=2)


@given(trial=trials(3, [1, 2, 5], compiled=True, max_padding=2), data=st.data())
def test_a_trial_is_its_text_and_its_batches_fit_together(trial: Trial, data: st.DataObject):
    assert eval(repr(trial)) == trial
    assert set(trial.rows) <= set(range(3)) and set(trial.order) <= set(range(len(trial.rows)))
    assert bool(trial.kept) == bool(trial.fill) and (not trial.kept or any(trial.kept))
    for size, dynamic in zip((len(trial.rows), len(trial.order)), trial.dynamic, strict=True):
        assert dynamic or size in (1, 3)


@needs_mkl
def test_stock_pytorch_is_caught_and_our_backend_passes():
    linear, x = nn.Linear(576, 32).requires_grad_(False), rows(3, 576)
    trial = found(linear, x)
    assert len(trial.rows) + len(trial.order) <= 5
    found(torch.compile(linear, backend="batch_invariant"), x, backend="eager")
    search(linear, x, backend="batch_invariant", max_examples=8)


@needs_mkl
def test_stock_inductor_is_caught():
    def is_caught(width: int) -> bool:
        try:
            search(F.softplus, rows(3, width), backend="inductor", max_rows=3, max_examples=10)
        except BatchInvarianceError:
            return True
        return False

    assert any(is_caught(width) for width in (37, 21, 5))
