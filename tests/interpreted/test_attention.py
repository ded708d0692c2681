"""Attention's Triton kernels: indices, masks, anchors, splits and gradients, in fp32, fp16 and fp64."""

from __future__ import annotations

import gc
import inspect
import math
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from dropped_attention import dropped_attention
from torch import Tensor
from triton.runtime import interpreter

from bicompile import dropout
from bicompile.lowering.attention import gpu, gpu_backward, kernels
from bicompile.lowering.attention.order import gpu_order_for
from bicompile.lowering.attention.problem import mask_rows
from bicompile.lowering.attention.schedule import REFERENCE, SplitSchedule, share
from bicompile.lowering.gpu.plans import _PLANS
from bicompile.testing import same_bits

SCALE = 0.2
SPLIT = SplitSchedule(16, 4, 1)
WHOLE = SplitSchedule(16, 4, 1, span=0)


@pytest.fixture(scope="module", autouse=True)
def _loop_bounds() -> Iterator[None]:
    """Let the interpreter take a loop bound that a kernel computed: numpy makes no int of an array of one number."""
    patch = interpreter._patch_lang_tensor

    def with_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = with_index
    yield
    interpreter._patch_lang_tensor = patch


def inputs(
    dtype: torch.dtype, *, batch: int = 1, heads: int = 2, kv_heads: int = 1, queries: int = 20, keys: int = 40,
    depth: int = 8, value_depth: int = 8,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    g = torch.Generator().manual_seed(queries * keys)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    q = randn(batch, heads, queries, depth)
    return q, randn(batch, kv_heads, keys, depth), randn(batch, kv_heads, keys, value_depth)


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """The same in fp64; 0 where a row sees nothing."""
    mask = mask.double() if mask is not None and mask.dtype != torch.bool else mask
    out = F.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), mask, is_causal=causal, scale=SCALE, enable_gqa=True
    )
    return out.nan_to_num()


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> bool:
    return bool((found.double() - wanted).norm() <= 4 * torch.finfo(dtype).eps * wanted.norm())


def both_ways(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, causal: bool = False) -> Tensor:
    """The output by tiles, after it was compared with those by splits and with the exact one."""
    p = gpu.problem_of("sdpa", q, k, v, mask, causal, SCALE)
    out, lse = gpu.run(p, REFERENCE)
    wanted = exact(q, k, v, mask, causal)
    assert close(out, wanted, q.dtype)
    for schedule in (SPLIT, WHOLE):
        parts, parts_lse = gpu.run(p, schedule)
        assert close(parts, wanted, q.dtype)
        torch.testing.assert_close(lse, parts_lse)
    assert out.transpose(1, 2).is_contiguous()
    return out


def test_order_sees_the_depth_and_the_dtype_only():
    assert list(inspect.signature(gpu_order_for).parameters) == ["depth", "dtype"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_tiles_and_splits_are_attention(dtype: torch.dtype):
    both_ways(*inputs(dtype, queries=3, keys=530))
    both_ways(*inputs(dtype, queries=18, keys=18, depth=24, value_depth=5), causal=True)


@pytest.mark.parametrize(("queries", "keys"), [(5, 30), (30, 5), (1, 9)])
def test_causal_is_aligned_to_the_upper_left(queries: int, keys: int):
    both_ways(*inputs(torch.float32, queries=queries, keys=keys), causal=True)


def test_mask_with_gaps_anchors_and_rows_that_see_nothing():
    q, k, v = inputs(torch.float32, batch=2, queries=9, keys=70)
    mask = torch.rand((2, 1, 9, 70), generator=torch.Generator().manual_seed(0)) < 0.7
    mask[1, :, :, :33] = False
    mask[0, :, 2] = False
    k[1, :, :33], v[1, :, :33] = math.nan, math.inf
    clean = [torch.nan_to_num(t, posinf=0.0) for t in (k, v)]
    p = gpu.problem_of("sdpa", q, k, v, mask, False, SCALE)
    wanted = both_ways(q, *clean, mask)
    assert not wanted[0, :, 2].any()
    assert torch.equal(gpu.run(p, REFERENCE)[0], wanted)
    additive = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
    assert torch.equal(gpu.run(gpu.problem_of("sdpa", q, k, v, additive, False, SCALE), REFERENCE)[0], wanted)
    additive = additive.clamp(min=torch.finfo(torch.float32).min)
    assert torch.equal(gpu.run(gpu.problem_of("sdpa", q, k, v, additive, False, SCALE), REFERENCE)[0], wanted)


@pytest.mark.parametrize("shape", [(9, 40), (2, 1, 1, 40), (2, 9, 1), (2, 2, 9, 40)])
def test_additive_masks_broadcast(shape: tuple[int, ...]):
    mask = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    both_ways(*inputs(torch.float32, batch=2, queries=9), mask)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("queries", [1, 33])  # by splits, by tiles
def test_rows_read_before_are_those_read_on_the_way(queries: int, causal: bool):
    q, k, v = inputs(torch.float32, batch=2, queries=queries, keys=90)
    mask = torch.rand(2, 1, queries, 90) < 0.7
    mask[..., :3] = False
    rows = mask_rows(mask, causal)
    assert rows.shape == (3, 2, 1, queries)
    seen = mask.tril() if causal else mask
    assert torch.equal(rows[0], torch.where(seen.any(-1), seen.int().argmax(-1), 90).int())
    assert same_bits(gpu.sdpa(q, k, v, mask, causal, SCALE, rows), gpu.sdpa(q, k, v, mask, causal, SCALE))
    with pytest.raises(ValueError, match="not those of this mask"):
        gpu.sdpa(q, k, v, mask[:, 0], causal, SCALE, rows[:, :, :, 1:])


def test_value_that_is_not_finite_reaches_only_the_rows_that_see_it():
    q, k, v = inputs(torch.float32, queries=20, keys=20)
    p = gpu.problem_of("sdpa", q, k, v, None, True, SCALE)
    before = gpu.run(p, REFERENCE)[0], gpu.run(p, SPLIT)[0]
    v[:, :, 11, 3] = math.nan
    v[:, :, 12, 4] = math.inf
    after = gpu.run(p, REFERENCE)[0], gpu.run(p, SPLIT)[0]
    for clean, out in zip(before, after, strict=True):
        assert torch.equal(out[:, :, :11], clean[:, :, :11])
        assert out[:, :, 11:, 3].isnan().all() and out[:, :, 12:, 4].isnan().all()
        assert torch.equal(out[:, :, 11:, 5:], clean[:, :, 11:, 5:])


def test_only_flagged_tiles_are_computed_again():
    """Among them one past the first group of flags."""
    q, k, v = inputs(torch.float32, queries=150, keys=24)
    p = gpu.problem_of("sdpa", q, k, v, None, True, SCALE)
    wanted, wanted_lse = gpu.run(p, REFERENCE)
    out, lse = torch.full_like(wanted, 7.0), torch.full_like(wanted_lse, 7.0)
    flags = torch.zeros(2, 10, dtype=torch.int32)
    flags[0, [1, 9]] = flags[1, 4] = 1
    gpu.flagged_plan(p, 16)(p, gpu.row_info(p), flags, out, lse)
    flagged = flags.bool().repeat_interleave(16, 1)[None, :, :150]
    assert torch.equal(out, torch.where(flagged[..., None], wanted, 7.0))
    assert torch.equal(lse, torch.where(flagged, wanted_lse, 7.0))


def test_splits_grow_and_are_counted_alike():
    order = gpu_order_for(128, torch.bfloat16)
    (_, smallest), *_, (_, largest) = order.splits
    for keys in (
        1,
        smallest,
        smallest + 1,
        *(start + more for start, _ in order.splits[1:] for more in (0, 1, largest)),
    ):
        starts = order.split_starts(keys)
        assert order.num_splits(keys) == len(starts) and starts[-1] < keys
        for span in (smallest, 1024, 4096):
            assert order.num_splits(keys, span) == sum(start % span == 0 for start in starts)
    assert all(size % order.block == 0 and size & (size - 1) == 0 for _, size in order.splits)
    assert [order.even_until(size) for _, size in order.splits[:-1]] == [start for start, _ in order.splits[1:]]
    assert order.even_until(largest) > 2**20


def test_programs_share_the_splits_of_a_row_in_any_way():
    """Over splits of every size; with a span of one size of splits, and of several."""
    q, k, v = inputs(torch.float32, queries=1, keys=17500)
    p = gpu.problem_of("sdpa", q, k, v, None, False, SCALE)
    wanted = gpu.run(p, SPLIT)
    assert close(wanted[0], exact(q, k, v, None, False), q.dtype)
    for span in (1024, 4096, 8192):
        assert same_bits(gpu.run(p, SplitSchedule(16, 4, 1, span)), wanted)


@pytest.mark.parametrize(("value_depth", "masked"), [(64, False), (50, True)])
def test_programs_share_the_columns_of_the_values(value_depth: int, masked: bool):
    q, k, v = inputs(torch.float32, queries=3, keys=700, value_depth=value_depth)
    mask = torch.rand(1, 1, 3, 700, generator=torch.Generator().manual_seed(0)) < 0.8 if masked else None
    p = gpu.problem_of("sdpa", q, k, v, mask, not masked, SCALE)
    wanted, wanted_lse = gpu.run(p, SPLIT)
    for v_programs in (2, 4):
        out, lse = gpu.run(p, replace(SPLIT, v_programs=v_programs))
        assert close(out, wanted, q.dtype)  # NumPy's products have other bits for other widths
        assert same_bits(lse, wanted_lse)


def test_spans_follow_the_number_of_programs():
    order = gpu_order_for(128, torch.bfloat16)
    assert share(4, 8, False, order, 132) == (512, 32, "few")
    assert share(64, 8, False, order, 132) == (2048, 128, "few")
    assert share(4, 128, False, order, 132) == (0, 128, "few")
    assert share(64, 8, True, order, 132) == (512, 512, "some")
    assert share(1, 8, True, order, 132)[0] == 0


def test_empty_inputs():
    for queries, keys in ((0, 5), (5, 0)):
        q, k, v = inputs(torch.float32, queries=queries, keys=keys)
        out, lse = gpu.sdpa(q, k, v, None, False, SCALE)
        assert out.shape == (1, 2, queries, 8) and not out.any() and (lse == -math.inf).all()


def test_bad_shapes_are_refused():
    q, k, v = inputs(torch.float32, heads=3, kv_heads=2)
    with pytest.raises(ValueError, match="multiple"):
        gpu.sdpa(q, k, v, None, False, SCALE)
    q, k, v = inputs(torch.float32)
    with pytest.raises(ValueError, match="broadcasts"):
        gpu.sdpa(q, k, v, torch.zeros(3, 40), False, SCALE)
    with pytest.raises(ValueError, match="256"):
        gpu.sdpa(*inputs(torch.float32, depth=300), None, False, SCALE)


MASKS = {
    "none": None,
    "causal": None,
    "negative scale": None,
    "bool": (2, 1, 12, 20),
    "rows": (12, 20),
    "keys": (2, 1, 1, 20),
    "queries": (2, 12, 1),
}


@pytest.mark.parametrize("kind", MASKS)
def test_gradients_are_those_of_attention(kind: str):
    shape = MASKS[kind]
    q, k, v = inputs(torch.float64, batch=2, queries=12, keys=20, value_depth=5)
    scale = -SCALE if kind == "negative scale" else SCALE
    mask = None if shape is None else torch.randn(shape, generator=torch.Generator().manual_seed(2)).double()
    if kind == "bool" and mask is not None:
        mask = mask > -0.5
        mask[0, :, :, :3] = False
    wanted_mask = mask is not None and mask.dtype != torch.bool
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    if wanted_mask and mask is not None:
        leaves.append(mask.clone().requires_grad_())
    truth = F.scaled_dot_product_attention(
        *leaves[:3], leaves[3] if wanted_mask else mask, is_causal=kind == "causal", scale=scale, enable_gqa=True
    )
    out, lse = gpu.sdpa(q, k, v, mask, kind == "causal", scale)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = gpu_backward.sdpa_backward(grad, q, k, v, mask, out, lse, kind == "causal", scale, wanted_mask)
    for ours, exact_one in zip(found, torch.autograd.grad(truth, leaves, grad), strict=False):
        torch.testing.assert_close(ours, exact_one)


def test_padded_queries_have_no_part_in_gradients():
    q, k, v = inputs(torch.float64, queries=20, keys=20)
    mask = torch.ones(20, 20, dtype=torch.bool).tril()
    mask[:, :3] = False
    q[:, :, :3], k[:, :, :3], v[:, :, :3] = math.nan, math.nan, math.inf
    out, lse = gpu.sdpa(q, k, v, mask, False, SCALE)
    grad = torch.ones_like(out)
    padded = gpu_backward.sdpa_backward(grad, q, k, v, mask, out, lse, False, SCALE, False)
    q, k, v, grad = (t[:, :, 3:].contiguous() for t in (q, k, v, grad))
    out, lse = gpu.sdpa(q, k, v, None, True, SCALE)
    alone = gpu_backward.sdpa_backward(grad, q, k, v, None, out, lse, True, SCALE, False)
    for ours, theirs in zip(padded[:3], alone[:3], strict=True):
        assert not ours[:, :, :3].any()
        torch.testing.assert_close(ours[:, :, 3:], theirs)


# -- Dropout -----------------------------------------------------------------------------------------------------------


@triton.jit
def _kept_kernel(seeds_ptr, first_ptr, out_ptr, threshold, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """``kernels.is_kept`` of ROWS rows and KEYS keys, counted from each row's first."""
    row, key = tl.arange(0, ROWS), tl.arange(0, KEYS)
    states = kernels.states_of(seeds_ptr, row, row < ROWS, tl.load(first_ptr + row))
    kept = kernels.is_kept(states[:, None], key[None, :], threshold)
    tl.store(out_ptr + row[:, None] * KEYS + key[None, :], kept)


@pytest.mark.parametrize("dropout_p", [0.0, 1e-7, 0.25, 0.9, 1.0])
def test_kernels_keep_what_the_generator_keeps(dropout_p: float):
    seeds, first = seeds_for(64, 1, 1).flatten(), torch.arange(64, dtype=torch.int32) % 7
    seeds[:3] = torch.tensor([0, -1, -(2**63)])
    found = torch.zeros(64, 128, dtype=torch.bool)
    _kept_kernel[(1,)](seeds, first, found, dropout.threshold_of(dropout_p), 64, 128)
    wanted = dropout.is_kept(seeds[:, None], torch.arange(128) - first[:, None], dropout_p)
    assert torch.equal(found, wanted)
    assert abs(found.double().mean() - (1.0 - dropout_p)) < 0.02


def seeds_for(batch: int, heads: int, queries: int) -> Tensor:
    """Any int64, for each query row."""
    g = torch.Generator().manual_seed(4)
    return torch.randint(-(2**63), 2**63 - 1, (batch, heads, queries), generator=g)


def with_gaps(batch: int, queries: int, keys: int) -> Tensor:
    """A boolean mask with left padding, other first keys, gaps, and a row that sees nothing."""
    mask = torch.rand((batch, 1, queries, keys), generator=torch.Generator().manual_seed(5)) < 0.7
    mask[0, :, :, :5] = False
    mask[-1, :, : queries // 2, :9] = False
    mask[0, :, 2] = False
    return mask


def noise(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64).to(dtype)


KINDS = [(torch.float32, 0.25), (torch.float16, 0.25), (torch.float64, 0.25), (torch.float32, 1.0)]


@pytest.mark.parametrize(("dtype", "dropout_p"), KINDS, ids=str)
def test_dropout_falls_on_weights_after_their_sum(dtype: torch.dtype, dropout_p: float):
    """Over several blocks and splits, few queries and many; GQA and odd depths."""
    shapes = [
        (dict(queries=3, keys=530), None, False),
        (dict(queries=18, keys=45, depth=24, value_depth=5), None, True),
        (dict(batch=2, queries=19, keys=70), with_gaps(2, 19, 70), False),
        (dict(queries=9, keys=40), noise((9, 40)).float().masked_fill(~with_gaps(1, 9, 40)[0], -math.inf), False),
    ]
    for sizes, mask, causal in shapes:
        q, k, v = inputs(dtype, **sizes)
        seeds = seeds_for(*q.shape[:3])
        out, lse = gpu.sdpa(q, k, v, mask, causal, SCALE, None, seeds, dropout_p)
        wide = mask.double() if mask is not None and mask.dtype != torch.bool else mask
        wanted = dropped_attention(q.double(), k.double(), v.double(), wide, causal, SCALE, seeds, dropout_p)
        if dtype == torch.float64:  # whose factors are sums of two float32
            torch.testing.assert_close(out, wanted, rtol=1e-13, atol=1e-13)
        else:
            assert close(out, wanted, dtype)
        p = gpu.problem_of("sdpa", q, k, v, mask, causal, SCALE)
        assert same_bits(lse, gpu.run(p, REFERENCE)[1])  # the weights' sum has the dropped ones too


def test_seeds_without_dropout_change_nothing():
    q, k, v = inputs(torch.float32, queries=30)
    seeds = seeds_for(*q.shape[:3])
    out, lse = gpu.sdpa(q, k, v, None, True, SCALE)
    assert same_bits(gpu.sdpa(q, k, v, None, True, SCALE, None, seeds, 0.0), (out, lse))
    found = gpu_backward.sdpa_backward(out, q, k, v, None, out, lse, True, SCALE, False, seeds, 0.0)
    assert same_bits(found, gpu_backward.sdpa_backward(out, q, k, v, None, out, lse, True, SCALE, False))


def test_seeds_may_lie_anyhow():
    q, k, v = inputs(torch.float32, heads=2, queries=30)
    seeds = seeds_for(*q.shape[:3])
    strided = seeds.transpose(1, 2).contiguous().transpose(1, 2)
    out, lse = gpu.sdpa(q, k, v, None, True, SCALE, None, seeds, 0.5)
    assert same_bits(gpu.sdpa(q, k, v, None, True, SCALE, None, strided, 0.5), (out, lse))
    found = gpu_backward.sdpa_backward(out, q, k, v, None, out, lse, True, SCALE, False, seeds, 0.5)
    assert same_bits(gpu_backward.sdpa_backward(out, q, k, v, None, out, lse, True, SCALE, False, strided, 0.5), found)


DROPPED = [(kind, 0.25) for kind in (*MASKS, "gaps", "gaps, causal", "hidden")] + [("causal", 1.0), ("hidden", 1.0)]


@pytest.mark.parametrize(("kind", "dropout_p"), DROPPED)
def test_gradients_with_dropout_are_those_of_attention(kind: str, dropout_p: float):
    causal = kind.endswith("causal")
    queries, keys = (12, 20) if kind in MASKS else (20, 38)
    q, k, v = inputs(torch.float64, batch=2, queries=queries, keys=keys, depth=7, value_depth=5)
    scale = -SCALE if kind == "negative scale" else SCALE
    shape = MASKS.get(kind)
    mask = None if shape is None else noise(shape)
    if kind == "bool" or kind.startswith("gaps"):
        mask = with_gaps(2, queries, keys)
    elif kind == "hidden":
        mask = noise((2, 1, queries, keys)).masked_fill(~with_gaps(2, queries, keys), -math.inf)
    wanted_mask = mask is not None and mask.dtype != torch.bool
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    if wanted_mask and mask is not None:
        leaves.append(mask.clone().requires_grad_())
    seeds = seeds_for(*q.shape[:3])
    truth = dropped_attention(*leaves[:3], leaves[3] if wanted_mask else mask, causal, scale, seeds, dropout_p)
    out, lse = gpu.sdpa(q, k, v, mask, causal, scale, None, seeds, dropout_p)
    grad = noise(tuple(out.shape))
    found = gpu_backward.sdpa_backward(grad, q, k, v, mask, out, lse, causal, scale, wanted_mask, seeds, dropout_p)
    exact_ones = torch.autograd.grad(truth, leaves, grad)
    for ours, exact_one in zip((out, *found[: len(leaves)]), (truth.detach(), *exact_ones), strict=True):
        torch.testing.assert_close(ours, exact_one, rtol=1e-12, atol=1e-12)


def test_left_padding_does_not_move_what_is_dropped():
    """One tile of queries and of keys, so that NumPy's products have their bits at the same places."""
    length, padding, dropout_p = 37, 16, 0.3
    q, k, v = inputs(torch.float32, queries=length, keys=length)
    grad, seeds = noise(tuple(q.shape), torch.float32), seeds_for(*q.shape[:3])
    out, lse = gpu.sdpa(q, k, v, None, True, SCALE, None, seeds, dropout_p)
    found = gpu_backward.sdpa_backward(grad, q, k, v, None, out, lse, True, SCALE, False, seeds, dropout_p)
    mask = torch.ones(length + padding, length + padding, dtype=torch.bool).tril()
    mask[:, :padding] = False
    moved = [F.pad(t, (0, 0, padding, 0), value=math.nan) for t in (q, k, v)]
    seeds = F.pad(seeds, (padding, 0), value=7)
    padded, padded_lse = gpu.sdpa(*moved, mask, False, SCALE, None, seeds, dropout_p)
    assert same_bits((padded[:, :, padding:], padded_lse[:, :, padding:]), (out, lse))
    assert not padded[:, :, :padding].any()
    grad = F.pad(grad, (0, 0, padding, 0), value=1.0)
    theirs = gpu_backward.sdpa_backward(grad, *moved, mask, padded, padded_lse, False, SCALE, False, seeds, dropout_p)
    assert same_bits(tuple(t[:, :, padding:] for t in theirs[:3]), found[:3])
    assert not any(t[:, :, :padding].any() for t in theirs[:3])


def test_value_that_is_not_finite_reaches_rows_that_drop_its_key():
    """As in PyTorch, where what is dropped is multiplied by 0."""
    q, k, v = inputs(torch.float32, queries=20, keys=20)
    v[:, :, 11, 3] = math.nan
    out, _ = gpu.sdpa(q, k, v, None, True, SCALE, None, seeds_for(1, 2, 20), 0.5)
    assert out[:, :, 11:, 3].isnan().all() and not out[:, :, :11].isnan().any() and not out[..., 4:].isnan().any()


def test_empty_inputs_with_dropout():
    for queries, keys in ((0, 5), (5, 0)):
        q, k, v = inputs(torch.float32, queries=queries, keys=keys)
        seeds = seeds_for(1, 2, queries)
        out, lse = gpu.sdpa(q, k, v, None, False, SCALE, None, seeds, 0.5)
        assert out.shape == (1, 2, queries, 8) and not out.any() and (lse == -math.inf).all()
        found = gpu_backward.sdpa_backward(out, q, k, v, None, out, lse, False, SCALE, False, seeds, 0.5)
        assert not any(t.any() for t in found[:3])


# --- plans -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("queries", [1, 20], ids=["splits", "tiles"])
def test_a_second_call_runs_the_plan_of_the_first_which_keeps_no_tensor(queries: int):
    def call(seed: int) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        g = torch.Generator().manual_seed(seed)
        q, k, v = (torch.randn(1, 2, length, 8, generator=g) for length in (queries, 40, 40))
        mask = torch.rand(1, 1, queries, 40, generator=g) < 0.8
        out, lse = gpu.sdpa(q, k, v, mask, False, SCALE)
        gradients = gpu_backward.sdpa_backward(out, q, k, v, mask, out, lse, False, SCALE, False)
        return [q, k, v, mask, out, lse], (out, *gradients[:3])

    _PLANS.clear()
    given, first = call(0)
    plans = dict(_PLANS)  # kept while the tensors are looked for below
    gone = [weakref.ref(t) for t in given]
    del given
    second = call(1)[1]
    assert plans and _PLANS == plans
    _PLANS.clear()
    assert same_bits(call(1)[1], second) and not same_bits(first, second)
    del first
    gc.collect()
    assert not any(ref() is not None for ref in gone)
