"""Attention: a row's bits depend on the row, the keys that it sees, and nothing else."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bicompile.errors import UnsupportedOpError
from bicompile.lowering.attention import reference
from bicompile.lowering.attention.op import scaled_dot_product_attention
from bicompile.lowering.attention.order import order_for
from bicompile.testing import same_bits
from bicompile.testing.layouts import LAYOUTS, lay_out

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
ops = torch.ops.bicompile


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Values over many binades, so that the order of additions shows."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    return (x * torch.exp(torch.randn(shape, generator=g, dtype=torch.float64))).to(dtype)


def inputs(
    dtype: torch.dtype, seed: int = 0, *, batch: int = 2, heads: int = 6, kv_heads: int = 2, queries: int = 40,
    keys: int = 400, depth: int = 24, value_depth: int = 24,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    q = values((batch, heads, queries, depth), dtype, seed)
    k = values((batch, kv_heads, keys, depth), dtype, seed + 1)
    return q, k, values((batch, kv_heads, keys, value_depth), dtype, seed + 2)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, causal: bool = False) -> tuple[Tensor, Tensor]:
    out, lse = ops.sdpa(q, k, v, mask, causal, 0.2)
    return out, lse


def gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, causal: bool = False
) -> tuple[Tensor, ...]:
    """dq, dk, dv and, for a floating-point mask, dmask."""
    out, lse = sdpa(q, k, v, mask, causal=causal)
    wanted = mask is not None and mask.dtype != torch.bool
    found = ops.sdpa_backward(grad, q, k, v, mask, out, lse, causal, 0.2, wanted)
    return found if wanted else found[:3]


def causal_mask(queries: int, keys: int) -> Tensor:
    """Queries are the last ones of ``keys``."""
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


def pad_left(t: Tensor, count: int, value: float) -> Tensor:
    return F.pad(t, (0, 0, count, 0), value=value)


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


# --- the function ----------------------------------------------------------------------------------------------------


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


FORMS = {
    "2-D": ((5, 4), (7, 4), (7, 3), {}),
    "3-D": ((2, 5, 4), (2, 7, 4), (2, 7, 3), {}),
    "3-D with one key batch": ((2, 5, 4), (1, 7, 4), (1, 7, 3), {}),
    "3-D, mask of the batch": ((2, 5, 4), (2, 7, 4), (2, 7, 3), {"attn_mask": randn(2, 5, 7)}),
    "mask of the keys": ((2, 5, 4), (2, 7, 4), (2, 7, 3), {"attn_mask": randn(7)}),
    "one key batch": ((2, 3, 5, 4), (1, 3, 7, 4), (2, 3, 7, 3), {}),
    "one key head": ((2, 3, 5, 4), (2, 1, 7, 4), (2, 1, 7, 3), {}),
    "5-D causal": ((6, 2, 3, 5, 4), (6, 2, 3, 7, 4), (6, 2, 3, 7, 3), {"is_causal": True}),
    "5-D, broadcast": ((6, 2, 3, 5, 4), (1, 2, 3, 7, 4), (6, 2, 3, 7, 3), {"attn_mask": randn(6, 1, 1, 5, 7)}),
    "no queries": ((2, 3, 0, 4), (2, 3, 7, 4), (2, 3, 7, 3), {}),
    "no keys": ((2, 3, 5, 4), (2, 3, 0, 4), (2, 3, 0, 3), {}),
    "no batch": ((0, 3, 5, 4), (0, 3, 7, 4), (0, 3, 7, 3), {}),
    "no heads": ((2, 0, 5, 4), (2, 0, 7, 4), (2, 0, 7, 3), {}),
    "no depth": ((2, 3, 5, 0), (2, 3, 7, 0), (2, 3, 7, 3), {}),
    "groups": ((2, 6, 5, 4), (2, 2, 7, 4), (2, 2, 7, 3), {"enable_gqa": True}),
    "groups of two sizes": ((2, 6, 5, 4), (2, 2, 7, 4), (2, 3, 7, 3), {"enable_gqa": True}),
    "scale": ((2, 6, 5, 4), (2, 6, 7, 4), (2, 6, 7, 3), {"scale": 0.3}),
}


@pytest.mark.parametrize("form", FORMS)
def test_function_takes_every_form_that_torch_takes(form: str):
    *shapes, options = FORMS[form]
    q, k, v = (randn(*shape) for shape in shapes)
    expected = F.scaled_dot_product_attention(q, k, v, **options)
    found = scaled_dot_product_attention(q, k, v, **options)
    torch.testing.assert_close(found, expected)
    with FakeTensorMode() as mode:
        q, k, v = (mode.from_tensor(t) for t in (q, k, v))
        options = {key: mode.from_tensor(o) if isinstance(o, Tensor) else o for key, o in options.items()}
        fake = scaled_dot_product_attention(q, k, v, **options)
    assert (fake.shape, fake.dtype) == (found.shape, found.dtype)
    assert fake.numel() == 0 or fake.stride() == found.stride()


def test_one_graph_serves_every_batch_and_length():
    """Trap 12: the function branches on no size that may change between calls."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(scaled_dot_product_attention, backend=counter, fullgraph=True, dynamic=True)
    frames = []
    for batch, length in ((4, 9), (3, 7), (7, 300)):
        q, k, v = inputs(torch.float32, batch=batch, queries=length, keys=length)
        mask = causal_mask(length, length).expand(batch, 1, length, length)
        for options in ({"is_causal": True}, {"attn_mask": mask}):
            eager = scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)
            assert same_bits(compiled(q, k, v, enable_gqa=True, **options), eager)
        frames.append(counter.frame_count)
    assert len(set(frames)) == 1, frames


BAD = {
    "dtypes": ((5, 4), (7, 4), (7, 3), {}, "same dtype"),
    "depths": ((5, 4), (7, 5), (7, 3), {}, "last dim"),
    "keys": ((5, 4), (7, 4), (8, 3), {}, "number of keys"),
    "heads": ((2, 6, 5, 4), (2, 2, 7, 4), (2, 2, 7, 3), {}, "enable_gqa=True"),
    "groups": ((2, 6, 5, 4), (2, 4, 7, 4), (2, 4, 7, 3), {"enable_gqa": True}, "must divide"),
    "rank": ((4,), (7, 4), (7, 3), {}, "at least 2 dimensional"),
    "mask": ((5, 4), (7, 4), (7, 3), {"attn_mask": randn(5, 6)}, "does not broadcast"),
    "mask's batch": ((1, 2, 5, 4), (1, 2, 7, 4), (1, 2, 7, 3), {"attn_mask": randn(3, 1, 5, 7)}, "does not broadcast"),
    "mask's dtype": ((5, 4), (7, 4), (7, 3), {"attn_mask": randn(5, 7).double()}, "attn_mask dtype"),
    "two masks": ((5, 4), (7, 4), (7, 3), {"attn_mask": randn(5, 7), "is_causal": True}, "is_causal=True"),
}


@pytest.mark.parametrize("case", BAD)
def test_function_refuses_what_does_not_go_together(case: str):
    *shapes, options, message = BAD[case]
    q, k, v = (randn(*shape) for shape in shapes)
    if case == "dtypes":
        k = k.double()
    with pytest.raises(ValueError, match=message):
        scaled_dot_product_attention(q, k, v, **options)


def test_dropout_and_other_dtypes_are_refused():
    q, k, v = randn(2, 3, 5, 4), randn(2, 3, 7, 4), randn(2, 3, 7, 3)
    with pytest.raises(UnsupportedOpError, match="dropout_p"):
        scaled_dot_product_attention(q, k, v, dropout_p=0.1)
    for dtype in (torch.int64, torch.complex64):
        with pytest.raises(ValueError, match="expected float32"):
            scaled_dot_product_attention(*(t.to(dtype) for t in (q, k, v)))


@pytest.mark.parametrize("fake", [False, True])
def test_op_checks_its_arguments(fake: bool):
    device = "meta" if fake else "cpu"
    q, k, v = (torch.empty(shape, device=device) for shape in ((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 3)))
    for bad in ((q[0], k, v), (q, k[:1], v), (q, k, v[:, :, 1:]), (q, k.double(), v), (q.int(), k.int(), v.int())):
        with pytest.raises(RuntimeError, match="bicompile::sdpa"):
            ops.sdpa(*bad, None, False, 1.0)
    with pytest.raises(RuntimeError, match="mask"):
        ops.sdpa(q, k, v, torch.empty(5, 7, dtype=torch.int64, device=device), False, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ops_pass_opcheck(dtype: torch.dtype):
    q, k, v = inputs(dtype, queries=4, keys=6, depth=5, value_depth=3)
    for mask in (None, torch.ones(2, 1, 4, 6, dtype=torch.bool), values((4, 6), dtype, 3)):
        tracked = [t.clone().requires_grad_() for t in (q, k, v)]
        torch.library.opcheck(ops.sdpa.default, (*tracked, mask, False, 0.2))
        out, lse = sdpa(q, k, v, mask)
        wanted = mask is not None and mask.dtype != torch.bool
        arguments = (torch.ones_like(out), q, k, v, mask, out, lse, False, 0.2, wanted)
        torch.library.opcheck(ops.sdpa_backward.default, arguments)


# --- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask_shape", [None, (2, 4, 5, 7), (5, 7), (4, 1, 7), (2, 1, 5, 1)])
def test_gradients_are_those_of_finite_differences(mask_shape: tuple[int, ...] | None):
    def leaf(*shape: int) -> Tensor:
        return randn(*shape).double().requires_grad_()

    leaves = [leaf(2, 4, 5, 6), leaf(2, 2, 7, 6), leaf(2, 2, 7, 3)]
    if mask_shape is not None:
        leaves.append(leaf(*mask_shape))

    def run(*args: Tensor) -> Tensor:
        return scaled_dot_product_attention(*args, is_causal=mask_shape is None, enable_gqa=True)

    assert torch.autograd.gradcheck(run, leaves)


@every_dtype
@pytest.mark.parametrize("causal", [False, True])
def test_error_is_not_much_above_that_of_torch(dtype: torch.dtype, causal: bool):
    q, k, v = (randn(2, h, 260, 40).to(dtype) for h in (6, 2, 2))
    grad = randn(2, 6, 260, 40).to(dtype)

    def run(function, wide: torch.dtype) -> list[Tensor]:
        leaves = [t.to(wide).requires_grad_() for t in (q, k, v)]
        out = function(*leaves, is_causal=causal, enable_gqa=True)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(wide))]

    exact = run(F.scaled_dot_product_attention, torch.float64)
    stock, ours = run(F.scaled_dot_product_attention, dtype), run(scaled_dot_product_attention, dtype)
    floor = 8 * torch.finfo(torch.float64).eps  # where torch computes the exact one
    for truth, theirs, mine in zip(exact, stock, ours, strict=True):
        error = [((x.double() - truth).norm() / truth.norm()).item() for x in (theirs, mine)]
        assert error[1] <= 1.5 * error[0] + floor


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
