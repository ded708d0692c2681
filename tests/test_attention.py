"""The attention op: a row's bits depend on the row, the keys that it sees, and nothing else; forward and backward."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from attention_cases import DTYPES, causal_mask, every_dtype, gradients, inputs, ops, pad_left, sdpa, values
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bicompile.lowering.attention import reference
from bicompile.lowering.attention.order import order_for
from bicompile.testing import same_bits
from bicompile.testing.layouts import LAYOUTS, lay_out

# --- the order ---------------------------------------------------------------------------------------------------


def test_order_sees_the_dtype_only():
    assert list(inspect.signature(order_for).parameters) == ["dtype"]


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor | None, bool]:
    """q, k, v in some layout, a mask of some kind, causal or not."""
    dtype, seed = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 2**31))
    kv_heads = draw(st.sampled_from([1, 2]))
    batch, heads = draw(st.sampled_from([1, 2])), kv_heads * draw(st.sampled_from([1, 3]))
    queries, keys = draw(st.sampled_from([0, 1, 2, 9, 33])), draw(st.sampled_from([0, 1, 7, 33, 210, 400]))
    depth, value_depth = draw(st.sampled_from([0, 1, 8, 33])), draw(st.sampled_from([0, 1, 5, 16, 40]))
    q, k, v = inputs(
        dtype, seed, batch=batch, heads=heads, kv_heads=kv_heads, queries=queries, keys=keys, depth=depth,
        value_depth=value_depth,
    )  # fmt: skip
    q, k, v = (lay_out(t, draw(st.sampled_from(LAYOUTS))) for t in (q, k, v))
    kind = draw(st.sampled_from(["none", "causal", "boolean", "additive", "expanded"]), label="mask")
    mask = None
    shape = [draw(st.sampled_from([1, n])) for n in (batch, heads, queries, keys)]
    if kind in ("boolean", "expanded"):
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.6
        mask = mask.expand(batch, heads, queries, keys) if kind == "expanded" else mask
    elif kind == "additive":
        mask = values(tuple(shape), draw(st.sampled_from([dtype, torch.float32])), seed + 3)
        mask = mask.masked_fill(mask > 1.5, -math.inf)
    return q, k, v, mask, kind == "causal" or (kind == "boolean" and draw(st.booleans()))


@given(problem=problems())
@settings(max_examples=25)
def test_output_has_the_bits_of_the_reference(problem: tuple[Tensor, Tensor, Tensor, Tensor | None, bool]):
    q, k, v, mask, causal = problem
    out, lse = sdpa(q, k, v, mask, causal=causal)
    expected, expected_lse = reference.sdpa(q, k, v, mask, causal, 0.2)
    assert same_bits(out, expected)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-6, atol=1e-6)


@given(problem=problems())
@settings(max_examples=12)
def test_gradients_have_the_bits_of_the_reference(problem: tuple[Tensor, Tensor, Tensor, Tensor | None, bool]):
    q, k, v, mask, causal = problem
    out, _ = sdpa(q, k, v, mask, causal=causal)
    grad = values(tuple(out.shape), q.dtype, 5)
    *expected, ds = reference.sdpa_backward(grad, q, k, v, mask, out, causal, 0.2)
    found = gradients(grad, q, k, v, mask, causal=causal)
    assert same_bits(found[:3], tuple(expected))
    if mask is not None and mask.dtype != torch.bool and mask.shape == ds.shape:
        assert same_bits(found[3], ds.to(mask.dtype))


@every_dtype
def test_long_rows_of_heads_and_depths_have_the_bits_of_the_reference(dtype: torch.dtype):
    """Depths above one block, more query heads than a tile holds, more than one block of keys."""
    q, k, v = inputs(dtype, batch=1, heads=70, kv_heads=1, queries=1, keys=400, depth=200, value_depth=72)
    assert same_bits(sdpa(q, k, v)[0], reference.sdpa(q, k, v, None, False, 0.2)[0])


def test_a_block_that_starts_elsewhere_has_other_bits():
    """Control: these values tell the order apart, so the tests on padding can fail."""
    weights, rows = values((1, 1, 4, 300), torch.float32, 0).abs(), values((1, 1, 300, 8), torch.float32, 1)
    order = order_for(torch.float32)
    padded, moved = F.pad(weights, (7, 0)), pad_left(rows, 7, 0.0)
    first = torch.zeros(1, 1, 4, dtype=torch.int64)
    anchored = reference._weighted_sum(padded, moved, order)
    assert same_bits(anchored, reference._weighted_sum(weights, rows, order))
    assert not same_bits(anchored, reference._weighted_sum(padded, moved, order, first))


# --- rows ----------------------------------------------------------------------------------------------------------


@every_dtype
def test_row_has_same_bits_in_any_tile(dtype: torch.dtype):
    """Traps 6 and 8: a query alone, in a small call and in a large one meets other tiles, in either direction."""
    q, k, v = inputs(dtype, queries=100)
    whole, whole_lse = sdpa(q, k, v)
    for rows in (slice(0, 1), slice(37, 38), slice(30, 47), slice(99, 100)):
        out, lse = sdpa(q[:, :, rows], k, v)
        assert same_bits(out, whole[:, :, rows])
        assert same_bits(lse, whole_lse[:, :, rows])


@every_dtype
@pytest.mark.parametrize("batch", [1, 5])
def test_thread_count_does_not_show(dtype: torch.dtype, batch: int, set_threads):
    """Trap 6: nothing is split by the number of tasks or threads."""
    q, k, v = inputs(dtype, batch=batch, queries=65)
    grad = values((batch, 6, 65, 24), dtype, 9)
    mask = values((65, 400), dtype, 8)
    results = []
    for threads in (1, 2, 4, 1):
        set_threads(threads)
        results.append((sdpa(q, k, v, mask), gradients(grad, q, k, v, mask)))
    assert all(same_bits(result, results[0]) for result in results)


@given(seed=st.integers(0, 2**31), batch=st.integers(1, 4), data=st.data())
@settings(max_examples=10)
def test_row_of_the_batch_has_same_bits_among_any_others(seed: int, batch: int, data: st.DataObject):
    dtype = data.draw(st.sampled_from(DTYPES))
    q, k, v = inputs(dtype, seed, batch=batch, queries=20, keys=230)
    mask = torch.rand(batch, 1, 20, 230, generator=torch.Generator().manual_seed(seed)) < 0.8
    grad = values((batch, 6, 20, 24), dtype, seed + 7)
    tensors = (grad, q, k, v, mask)

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        return *sdpa(*tensors[1:]), *gradients(*tensors)

    whole = run(*tensors)
    row = data.draw(st.integers(0, batch - 1), label="row")
    alone = run(*(t[row : row + 1] for t in tensors))
    order = torch.tensor(data.draw(st.permutations(range(batch)), label="order"))
    permuted = run(*(t[order] for t in tensors))
    poisoned = [torch.full_like(t, math.nan) if t.is_floating_point() else t.clone() for t in tensors]
    for p, t in zip(poisoned, tensors, strict=True):
        p[row] = t[row]
    among_nans = run(*poisoned)
    for i, expected in enumerate(whole):
        assert same_bits(alone[i][0], expected[row])
        assert same_bits(permuted[i], expected[order])
        assert same_bits(among_nans[i][row], expected[row])


@every_dtype
def test_layout_does_not_show(dtype: torch.dtype):
    q, k, v = inputs(dtype, queries=70, keys=70)
    grad = values((2, 6, 70, 24), dtype, 3)
    expected = sdpa(q, k, v), gradients(grad, q, k, v)
    for layout in LAYOUTS:
        moved = [lay_out(t, layout) for t in (grad, q, k, v)]
        assert same_bits((sdpa(*moved[1:]), gradients(*moved)), expected)
    fused = torch.cat([t.transpose(1, 2) for t in (q, k, v)], 2)  # one projection, as models have it
    views = [t.transpose(1, 2) for t in fused.split([6, 2, 2], 2)]
    assert same_bits(sdpa(*views), expected[0])


def test_output_lies_as_the_next_projection_wants_it():
    q, k, v = inputs(torch.float32, queries=5, keys=5)
    out, _ = sdpa(q, k, v)
    assert out.transpose(1, 2).is_contiguous()


# --- sequences ---------------------------------------------------------------------------------------------------


@every_dtype
def test_prefill_chunks_and_decode_have_same_bits(dtype: torch.dtype):
    """Trap 7: causal attention of many queries at once, of chunks and of single queries, with and without a mask."""
    length = 300
    q, k, v = inputs(dtype, queries=length, keys=length)
    whole, whole_lse = sdpa(q, k, v, causal=True)
    assert same_bits(sdpa(q, k, v, causal_mask(length, length)), (whole, whole_lse))
    for start, stop in ((0, 1), (0, 100), (100, 101), (101, 290), (290, 300), (299, 300)):
        mask = causal_mask(stop - start, stop)
        out, lse = sdpa(q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], mask)
        assert same_bits((out, lse), (whole[:, :, start:stop], whole_lse[:, :, start:stop]))
    for i in (0, 1, 191, 192, 299):
        one = sdpa(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1])
        assert same_bits(one[0], whole[:, :, i : i + 1])
    assert same_bits(sdpa(q[:, :, :1], k, v, causal=True)[0], whole[:, :, :1])  # upper-left: the first key only


@every_dtype
@pytest.mark.parametrize("padding", [1, 3, 64, 191, 192, 300])
def test_left_padding_does_not_show(dtype: torch.dtype, padding: int):
    """Trap 18: nor do NaN and Inf in what was padded, forward and backward."""
    length = 210
    q, k, v = inputs(dtype, batch=1, queries=length, keys=length)
    grad = values((1, 6, length, 24), dtype, 3)
    expected = sdpa(q, k, v, causal=True)
    expected_gradients = gradients(grad, q, k, v, causal=True)

    mask = causal_mask(length + padding, length + padding)
    mask[:, :padding] = False
    moved = [pad_left(grad, padding, 1.0), pad_left(q, padding, math.nan)]
    moved += [pad_left(k, padding, math.nan), pad_left(v, padding, math.inf)]
    out, lse = sdpa(*moved[1:], mask)
    assert same_bits((out[:, :, padding:], lse[:, :, padding:]), expected)
    found = gradients(*moved, mask)
    assert same_bits(tuple(t[:, :, padding:] for t in found), expected_gradients)
    assert all(same_bits(t[:, :, :padding], torch.zeros_like(t[:, :, :padding])) for t in found)

    additive = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -math.inf)
    assert same_bits(sdpa(*moved[1:], additive)[0][:, :, padding:], expected[0])
    step = sdpa(q[:, :, -1:], *moved[2:], mask[-1:])
    assert same_bits(step[0], expected[0][:, :, -1:])


@every_dtype
@pytest.mark.parametrize("unused", [1, 50, 333])
def test_unused_cache_slots_do_not_show(dtype: torch.dtype, unused: int):
    """Right padding and a static cache: slots after the last key hold whatever they held before."""
    q, k, v = inputs(dtype, queries=3, keys=200)
    grad = values((2, 6, 3, 24), dtype, 3)
    mask = torch.arange(200 + unused) < 200
    k_cache = F.pad(k, (0, 0, 0, unused), value=math.nan)
    v_cache = F.pad(v, (0, 0, 0, unused), value=math.inf)
    assert same_bits(sdpa(q, k_cache, v_cache, mask), sdpa(q, k, v))
    dq, dk, dv = gradients(grad, q, k_cache, v_cache, mask)
    assert same_bits((dq, dk[:, :, :200], dv[:, :, :200]), gradients(grad, q, k, v))
    assert not dk[:, :, 200:].any() and not dv[:, :, 200:].any()


@every_dtype
def test_sliding_window_is_attention_to_the_keys_in_the_window(dtype: torch.dtype):
    length, window = 330, 250
    q, k, v = inputs(dtype, queries=length, keys=length)
    mask = causal_mask(length, length).triu(1 - window)
    out, _ = sdpa(q, k, v, mask)
    for i in (0, 100, 249, 250, 329):
        seen = slice(max(0, i + 1 - window), i + 1)
        alone, _ = sdpa(q[:, :, i : i + 1], k[:, :, seen], v[:, :, seen])
        assert same_bits(alone, out[:, :, i : i + 1])


@every_dtype
def test_grouped_heads_have_the_bits_of_repeated_keys(dtype: torch.dtype):
    q, k, v = inputs(dtype)
    repeated = sdpa(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1))
    assert same_bits(sdpa(q, k, v), repeated)
    for head in range(6):
        one = sdpa(q[:, head : head + 1], k[:, head // 3, None], v[:, head // 3, None])
        assert same_bits(one[0], repeated[0][:, head : head + 1])


# --- masked rows, NaN and Inf ----------------------------------------------------------------------------------------


@every_dtype
def test_row_that_sees_no_key_is_zero(dtype: torch.dtype):
    """Trap 19: zeros, an lse of -inf and zero gradients, whichever mask hides the keys and whatever they hold."""
    q, k, v = inputs(dtype, queries=4, keys=30)
    grad = values((2, 6, 4, 24), dtype, 3)
    boolean = torch.ones(4, 30, dtype=torch.bool)
    boolean[1] = False
    additive = torch.zeros(4, 30, dtype=dtype).masked_fill(~boolean, -math.inf)
    for mask in (boolean, additive):
        out, lse = sdpa(q, k, v, mask)
        assert not out[:, :, 1].any() and not out.isnan().any()
        assert (lse[:, :, 1] == -math.inf).all()
        found = gradients(grad, q, k, v, mask)
        assert not found[0][:, :, 1].any()
        assert not any(t.isnan().any() for t in found)
        others = [0, 2, 3]
        alone = gradients(grad[:, :, others], q[:, :, others], k, v, mask[others])
        assert same_bits(alone[0], found[0][:, :, others])
    nothing = torch.zeros(1, 30, dtype=torch.bool)
    found = gradients(grad, q, torch.full_like(k, math.nan), v, nothing)
    assert all(same_bits(t, torch.zeros_like(t)) for t in found)
    empty = sdpa(q, k[:, :, :0], v[:, :, :0])
    assert not empty[0].any() and (empty[1] == -math.inf).all()


@every_dtype
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_score_of_a_key_that_is_seen_makes_the_row_nan(dtype: torch.dtype, value: float):
    q, k, v = inputs(dtype, queries=4, keys=30)
    clean, _ = sdpa(q, k, v)
    q[:, :, 2] = value
    out, lse = sdpa(q, k, v)
    assert out[:, :, 2].isnan().all() and lse[:, :, 2].isnan().all()
    assert same_bits(out[:, :, :2], clean[:, :, :2]) and same_bits(out[:, :, 3:], clean[:, :, 3:])


@every_dtype
def test_weight_of_zero_hides_a_value(dtype: torch.dtype):
    """Scores so far below the maximum that their weight is zero, in the middle of the row."""
    q, k, v = inputs(dtype, queries=4, keys=30)
    far = torch.zeros(30, dtype=torch.float32)
    far[7:11] = -1e4
    v[:, :, 7:11] = math.nan
    seen = far == 0
    assert same_bits(sdpa(q, k, v, far), sdpa(q, k, v, seen))
    assert not sdpa(q, k, v, far)[0].isnan().any()


def results_on_any_processor() -> list[tuple[Tensor, ...]]:
    """For tests/test_instruction_sets.py."""
    results = []
    for dtype in DTYPES:
        for shape in ({"queries": 40, "keys": 230}, {"queries": 1, "keys": 400, "depth": 64, "value_depth": 33}):
            q, k, v = inputs(dtype, **shape)
            grad = values((*q.shape[:3], v.shape[3]), dtype, 3)
            mask = torch.rand(q.shape[2], k.shape[2], generator=torch.Generator().manual_seed(0)) < 0.7
            v[:, :, 5] = math.nan
            mask[:, 5] = False
            for allowed, causal in ((mask, False), (None, True)):
                out, lse = sdpa(q, k, v, allowed, causal=causal)
                backward = ops.sdpa_backward(grad, q, k, v, allowed, out, lse, causal, 0.2, False)
                results.append((out, lse, *backward))
    return results
