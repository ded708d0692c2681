"""The kit itself: it compares bits, and it catches functions that are variant on purpose."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bicompile.errors import BatchInvarianceError
from bicompile.testing import (
    LAYOUTS,
    SITUATIONS,
    assert_batch_invariant,
    difference,
    differing_bits,
    lay_out,
    same_bits,
)
from bicompile.testing.strategies import Batch, batches, dtypes, lengths, row_shapes

NAN = float("nan")

DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.int64,
    torch.uint8,
    torch.bool,
)


def rows(num_rows: int = 6, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, *(shape or (40,)), generator=torch.Generator().manual_seed(seed))


def ones_and_zeros(dtype: torch.dtype) -> Tensor:
    return (torch.arange(35) % 2).reshape(5, 7).to(dtype)


def per_row(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``fn`` on each row by itself: batch-invariant by construction."""
    return lambda x: torch.stack([fn(row.contiguous().clone()) for row in x])


# same_bits, differing_bits, difference


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_flipped_bit_is_found_in_every_dtype(dtype: torch.dtype):
    x = ones_and_zeros(dtype)
    y = x.clone()
    y.view(torch.uint8)[2, -1] ^= 1
    assert same_bits(x, x.clone())
    assert not same_bits(x, y)
    assert differing_bits(x, y) == 1
    found = difference(x, y)
    assert found is not None and found.index == (2, 6) and found.elements == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_empty_tensors_and_scalars_do_not_matter(dtype: torch.dtype):
    x = ones_and_zeros(dtype)
    assert same_bits(x.t(), x.t().contiguous())
    assert same_bits(x[:, 1], x[:, 1].clone())
    assert same_bits(x[:0], x[:0].clone()) and differing_bits(x[:0], x[:0]) == 0
    assert same_bits(x[1, 1], x[1, 1].clone()) and not same_bits(x[0, 1], x[0, 0])


def test_zeros_of_both_signs_differ_and_equal_nans_do_not():
    zero, nan = torch.tensor([0.0]), torch.tensor([NAN])
    assert not same_bits(zero, -zero) and differing_bits(zero, -zero) == 1
    assert same_bits(nan, nan.clone())
    other_nan = (nan.view(torch.int32) + 1).view(torch.float32)
    assert other_nan.isnan().all() and not same_bits(nan, other_nan)


def test_shape_and_dtype_are_part_of_the_bits():
    x = torch.zeros(6)
    assert not same_bits(x, x.reshape(2, 3))
    assert not same_bits(x, x.int())
    assert not same_bits(x[:0], x[:0].bfloat16())
    with pytest.raises(ValueError, match=r"float32\[6\].*float32\[2, 3\]"):
        differing_bits(x, x.reshape(2, 3))


def test_conjugate_and_negative_views_have_the_bits_they_show():
    z = torch.randn(5, dtype=torch.complex64)
    assert same_bits(z.conj(), z.conj().resolve_conj())
    assert same_bits(z.conj().imag, -z.imag)


def test_nested_values_are_compared_leaf_by_leaf():
    from transformers.modeling_outputs import BaseModelOutput

    x, y = rows(2), rows(2, seed=1)
    assert same_bits({"a": [x, (y, 1, None)]}, {"a": (x.clone(), [y, 1, None])})
    assert not same_bits({"a": x}, {"b": x})
    assert not same_bits([x], [x, x])
    assert not same_bits([x, 1], [x, 1.0])
    assert not same_bits(0.0, -0.0) and same_bits(NAN, NAN)
    assert same_bits(BaseModelOutput(last_hidden_state=x), BaseModelOutput(last_hidden_state=x.clone()))
    assert not same_bits(BaseModelOutput(last_hidden_state=x), BaseModelOutput(last_hidden_state=y))


def test_tensors_without_plain_data_are_refused_by_name():
    with pytest.raises(TypeError, match="sparse"):
        same_bits(torch.eye(3).to_sparse(), torch.eye(3).to_sparse())
    with pytest.raises(TypeError, match="meta"):
        same_bits(torch.empty(3, device="meta"), torch.empty(3, device="meta"))


@given(shape=row_shapes(1, 3, 40), dtype=dtypes())
def test_every_layout_holds_the_same_values(shape: tuple[int, ...], dtype: torch.dtype):
    x = torch.randn(shape).to(dtype)
    for layout in LAYOUTS:
        assert same_bits(lay_out(x, layout), x)


def test_layouts_are_what_they_are_called():
    x = rows(4, 8)
    assert lay_out(x, "offset").data_ptr() % 64 == 4
    assert lay_out(x, "offset").is_contiguous()
    assert lay_out(x, "strided").stride() == (11, 1)
    assert lay_out(x, "transposed").stride() == (1, 4)
    assert lay_out(x[0], "transposed").stride() == (2,)


# assert_batch_invariant


def _adds_in_an_order_of_the_batch(x: Tensor) -> Tensor:
    return x.sum(-1) if len(x) % 2 else x.flip(-1).cumsum(-1)[:, -1]


def _has_another_kernel_for_one_row(x: Tensor) -> Tensor:
    return x / 3.0 if len(x) > 1 else x * (1.0 / 3.0)


def _reads_its_neighbour(x: Tensor) -> Tensor:
    return x + 1e-3 * x.roll(1, 0)


def _knows_its_position(x: Tensor) -> Tensor:
    return x * torch.arange(1, len(x) + 1).view(-1, 1)


def _scales_by_the_largest_entry(x: Tensor) -> Tensor:
    return x / x.nan_to_num(0, 0, 0).abs().max()


def _leaks_nan_through_a_product_with_zero(x: Tensor) -> Tensor:
    return x + 0.0 * x.roll(1, 0)


def _leaks_nan_only(x: Tensor) -> Tensor:
    return torch.where(x.isnan().any(), 2.0 * x, x)


def _leaks_infinity_only(x: Tensor) -> Tensor:
    return torch.where(x.isinf().any(), 2.0 * x, x)


def _leaks_huge_values_only(x: Tensor) -> Tensor:
    finite = torch.where(x.isfinite(), x, 0.0)
    return torch.where((finite.abs() > 1e30).any(), 2.0 * x, x)


def _leaks_denormals_only(x: Tensor) -> Tensor:
    return torch.where(((x.abs() < 1e-38) & (x != 0)).any(), 2.0 * x, x)


def _leaks_zero_rows_only(x: Tensor) -> Tensor:
    return torch.where((x == 0).all(-1).any(), 2.0 * x, x)


def _follows_alignment(x: Tensor) -> Tensor:
    return x * (1 + x.data_ptr() % 64)


def _follows_strides(x: Tensor) -> Tensor:
    return x if x.is_contiguous() or x.stride(-1) != 1 or 0 in x.stride() else 2.0 * x


def _follows_the_order_of_dims(x: Tensor) -> Tensor:
    return 2.0 * x if x.stride(-1) > 1 and x.shape[0] > 1 else x


def _follows_equal_rows(x: Tensor) -> Tensor:
    return 2.0 * x if len(x) > 2 and bool((x[0] == x).all()) else x


def _changes_from_run_to_run() -> Callable[[Tensor], Tensor]:
    calls = iter(range(10**6))
    return lambda x: x + next(calls)


def _wrong_for_odd_sub_batches(x: Tensor) -> Tensor:
    return 2.0 * x if 1 < len(x) < 6 else x


VARIANT = {
    "order of addition follows the batch": (_adds_in_an_order_of_the_batch, None),
    "one row has another kernel": (_has_another_kernel_for_one_row, "alone"),
    "neighbour is read": (_reads_its_neighbour, None),
    "position is read": (_knows_its_position, None),
    "scale over the batch": (_scales_by_the_largest_entry, None),
    "size of a sub-batch": (_wrong_for_odd_sub_batches, "sub-batch"),
    "equal rows": (_follows_equal_rows, "duplicated"),
    "NaN times zero": (_leaks_nan_through_a_product_with_zero, "nan"),
    "NaN": (_leaks_nan_only, "nan"),
    "Inf": (_leaks_infinity_only, "inf"),
    "huge values": (_leaks_huge_values_only, "huge"),
    "denormal values": (_leaks_denormals_only, "denormal"),
    "zero rows": (_leaks_zero_rows_only, "zero"),
    "alignment": (_follows_alignment, "alone"),
    "strides": (_follows_strides, "strided"),
    "order of dims": (_follows_the_order_of_dims, "transposed"),
    "random": (lambda x: F.dropout(x, 0.5), None),
}


@pytest.mark.parametrize("name", VARIANT)
def test_a_variant_function_is_caught(name: str):
    fn, situation = VARIANT[name]
    with pytest.raises(BatchInvarianceError) as caught:
        assert_batch_invariant(fn, rows())
    if situation is not None:
        assert caught.value.situation == situation


@pytest.mark.parametrize("situation", ["offset", "alone"])
def test_alignment_is_caught_in_the_whole_batch_and_alone(situation: str):
    with pytest.raises(BatchInvarianceError, match="unaligned"):
        assert_batch_invariant(_follows_alignment, rows(), situations=[situation])


def test_a_function_that_changes_from_run_to_run_is_caught():
    with pytest.raises(BatchInvarianceError, match="when run again"):
        assert_batch_invariant(_changes_from_run_to_run(), rows())


@pytest.mark.parametrize("num_rows", [0, 1, 2, 3, 6])
@pytest.mark.parametrize("fn", [torch.abs, per_row(lambda r: r.sum()), lambda x: (x * 2, {"y": [x[..., :3]]})])
def test_an_invariant_function_passes(fn: Callable[[Tensor], Any], num_rows: int):
    if num_rows or fn is torch.abs:
        assert_batch_invariant(fn, rows(num_rows), check_input_grad=True)


def test_the_message_names_output_row_element_situation_and_bits():
    def fn(x: Tensor) -> dict[str, Any]:
        wrong = x.clone()
        if len(x) == 1:
            wrong[:, 2, 5] = -wrong[:, 2, 5]
            wrong[:, 3, 1] = -wrong[:, 3, 1]
        return {"hidden": x, "parts": [wrong]}

    x = rows(5, 4, 8)
    with pytest.raises(BatchInvarianceError) as caught:
        assert_batch_invariant(fn, x)
    error = caught.value
    assert (error.output, error.row, error.situation) == ("output['parts'][0]", 0, "alone")
    assert (error.index, error.differing_elements, error.differing_bits) == ((2, 5), 2, 2)
    assert error.expected == x[0, 2, 5].item() and error.got == -x[0, 2, 5].item()
    for part in ("output['parts'][0]", "row 0 of 5", "alone", "(2, 5)", "2 of 32 elements", "2 bits", repr(error.got)):
        assert part in str(error)


class Doubles(torch.autograd.Function):
    """Twice the input, with a gradient that follows the number of rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2.0 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2.0 * grad + 1e-3 * len(grad)


def test_a_gradient_that_follows_the_batch_is_caught_only_when_asked_for():
    assert_batch_invariant(Doubles.apply, rows())
    with pytest.raises(BatchInvarianceError, match=r"gradient of args\[0\], row 0 of 6") as caught:
        assert_batch_invariant(Doubles.apply, rows(), check_input_grad=True)
    assert caught.value.output == "gradient of args[0]"


def test_a_forward_that_follows_autograd_is_caught():
    with pytest.raises(BatchInvarianceError, match="without autograd"):
        assert_batch_invariant(lambda x: 2 * x if x.requires_grad else x + 1, rows(), check_input_grad=True)


def test_only_inputs_that_ask_get_gradients():
    x, mask = rows().requires_grad_(), rows(seed=1)

    def fn(x: Tensor, mask: Tensor) -> Tensor:
        assert not mask.requires_grad
        return x * mask

    assert_batch_invariant(fn, x, mask=mask, check_input_grad=True)


def test_weights_and_other_tensors_are_not_batched():
    weight = torch.nn.Parameter(rows(6, 40))  # as many rows as the batch
    bias = rows(3, 40)

    def fn(x: Tensor, weight: Tensor, options: dict[str, Any]) -> Tensor:
        assert weight.shape == (6, 40) and len(options["bias"]) == 3
        return x * weight[0] + options["bias"][1]

    assert_batch_invariant(fn, rows(6, 40), weight, {"bias": bias, "name": "two"})


def test_the_batch_may_lie_in_another_dim():
    x = rows(5, 7)
    assert_batch_invariant(lambda x: x.abs(), x, batch_dim=1, check_input_grad=True)
    assert_batch_invariant(lambda x: x.abs(), x, batch_dim=-1)
    with pytest.raises(BatchInvarianceError):
        assert_batch_invariant(lambda x: x.cumsum(1), x, batch_dim=1)


def test_key_value_caches_are_taken_apart_and_not_touched():
    from transformers import DynamicCache

    cache = DynamicCache()
    cache.update(rows(4, 2, 3, 8), rows(4, 2, 3, 8, seed=1), 0)

    def fn(x: Tensor, cache: DynamicCache) -> Any:
        cache.update(x, x, 0)
        return x, cache

    assert_batch_invariant(fn, rows(4, 2, 1, 8), cache)
    assert cache.get_seq_length() == 3


def test_integer_inputs_meet_only_zero_neighbours():
    table = rows(10, 8)
    seen = []

    def fn(ids: Tensor) -> Tensor:
        seen.append(ids)
        return table[ids]

    assert_batch_invariant(fn, torch.tensor([[3, 4], [5, 6], [9, 1]]))
    assert all(0 <= int(ids.min()) and int(ids.max()) < 10 for ids in seen)


def test_random_state_is_left_alone():
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    assert_batch_invariant(lambda x: x * torch.rand(1), rows())
    assert same_bits(torch.random.get_rng_state(), before)


def test_what_cannot_be_checked_is_refused():
    with pytest.raises(ValueError, match="output of size 6"):
        assert_batch_invariant(lambda x: x.sum(), rows())
    with pytest.raises(ValueError, match="expected a tensor among the arguments"):
        assert_batch_invariant(lambda: 1)
    with pytest.raises(ValueError, match="give batch_dim"):
        assert_batch_invariant(torch.abs, torch.tensor(1.0))
    with pytest.raises(ValueError, match="alone, permuted.*'solo'"):
        assert_batch_invariant(torch.abs, rows(), situations=["solo"])
    with pytest.raises(ValueError, match="floating-point"):
        assert_batch_invariant(lambda i: i + 1, torch.arange(4), check_input_grad=True)


def test_outputs_whose_shape_ignores_the_batch_are_refused():
    with pytest.raises(BatchInvarianceError, match=r"expected shape \[1, 40\] alone"):
        assert_batch_invariant(lambda x: x.squeeze(0), rows())


def test_outputs_without_rows_only_have_to_repeat():
    weight = rows(3, 3)
    assert_batch_invariant(lambda x: (x, weight, x.shape[0], x.mean()), rows())


@pytest.mark.parametrize("situation", SITUATIONS)
def test_each_situation_runs_by_itself(situation: str):
    calls = []
    assert_batch_invariant(lambda x: calls.append(1) or x.abs(), rows(), situations=[situation], check_input_grad=True)
    assert len(calls) > 1


# strategies


@given(batch=batches(max_padding=3), data=st.data())
def test_a_batch_holds_its_rows_in_every_company(batch: Batch, data: st.DataObject):
    row = data.draw(st.integers(0, batch.num_rows - 1))
    whole = batch.tensor()
    assert whole.shape == (batch.num_rows, *batch.row_shape) and whole.dtype == batch.dtype
    assert same_bits(batch.alone(row)[0], whole[row])
    assert same_bits(batch.among_neighbours(row)[row], whole[row])
    assert same_bits(batch.permuted(), whole[list(batch.order)])
    if whole.dim() > 1:
        inner = batch.padded()[:, batch.left_pad : batch.left_pad + whole.shape[1]]
        assert same_bits(inner, whole)


@given(batch=batches(row_shape=(400,), dtype=torch.float32, min_rows=8, max_rows=8))
def test_values_tell_one_order_of_addition_from_another(batch: Batch):
    """One row in twenty has the same sum both ways: never all of eight."""
    columns = batch.tensor().unbind(-1)
    assert not same_bits(functools.reduce(torch.add, columns), functools.reduce(torch.add, columns[::-1]))


@given(n=lengths(5, 30))
def test_lengths_keep_their_bounds(n: int):
    assert 5 <= n <= 30


def test_the_kit_needs_hypothesis_for_strategies_only():
    code = (
        "import sys; sys.modules['hypothesis'] = None\n"
        "from bicompile.testing import assert_batch_invariant\n"
        "try:\n    from bicompile.testing import batches\n"
        "except ModuleNotFoundError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'bicompile[test]'" in done.stdout
