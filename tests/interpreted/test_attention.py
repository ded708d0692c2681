"""Attention's Triton kernels: indices, masks, anchors, splits and gradients, in fp32, fp16 and fp64."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from triton.runtime import interpreter

from bicompile.lowering.attention import gpu, gpu_backward
from bicompile.lowering.attention.order import gpu_order_for
from bicompile.lowering.attention.problem import mask_rows
from bicompile.lowering.attention.schedule import REFERENCE, SplitSchedule, share
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
    out, lse = gpu.run_tiles(p, REFERENCE)
    wanted = exact(q, k, v, mask, causal)
    assert close(out, wanted, q.dtype)
    for schedule in (SPLIT, WHOLE):
        parts, parts_lse = gpu.run_splits(p, schedule)
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
    assert torch.equal(gpu.run_tiles(p, REFERENCE)[0], wanted)
    additive = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
    assert torch.equal(gpu.run_tiles(gpu.problem_of("sdpa", q, k, v, additive, False, SCALE), REFERENCE)[0], wanted)
    additive = additive.clamp(min=torch.finfo(torch.float32).min)
    assert torch.equal(gpu.run_tiles(gpu.problem_of("sdpa", q, k, v, additive, False, SCALE), REFERENCE)[0], wanted)


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
    before = gpu.run_tiles(p, REFERENCE)[0], gpu.run_splits(p, SPLIT)[0]
    v[:, :, 11, 3] = math.nan
    v[:, :, 12, 4] = math.inf
    after = gpu.run_tiles(p, REFERENCE)[0], gpu.run_splits(p, SPLIT)[0]
    for clean, out in zip(before, after, strict=True):
        assert torch.equal(out[:, :, :11], clean[:, :, :11])
        assert out[:, :, 11:, 3].isnan().all() and out[:, :, 12:, 4].isnan().all()
        assert torch.equal(out[:, :, 11:, 5:], clean[:, :, 11:, 5:])


def test_only_flagged_tiles_are_computed_again():
    """Among them one past the first group of flags."""
    q, k, v = inputs(torch.float32, queries=150, keys=24)
    p = gpu.problem_of("sdpa", q, k, v, None, True, SCALE)
    wanted, wanted_lse = gpu.run_tiles(p, REFERENCE)
    out, lse = torch.full_like(wanted, 7.0), torch.full_like(wanted_lse, 7.0)
    flags = torch.zeros(2, 10, dtype=torch.int32)
    flags[0, [1, 9]] = flags[1, 4] = 1
    gpu.run_flagged(p, gpu.row_info(p), 16, flags, out, lse)
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
    wanted = gpu.run_splits(p, SPLIT)
    assert close(wanted[0], exact(q, k, v, None, False), q.dtype)
    for span in (1024, 4096, 8192):
        assert same_bits(gpu.run_splits(p, SplitSchedule(16, 4, 1, span)), wanted)


@pytest.mark.parametrize(("value_depth", "masked"), [(64, False), (50, True)])
def test_programs_share_the_columns_of_the_values(value_depth: int, masked: bool):
    q, k, v = inputs(torch.float32, queries=3, keys=700, value_depth=value_depth)
    mask = torch.rand(1, 1, 3, 700, generator=torch.Generator().manual_seed(0)) < 0.8 if masked else None
    p = gpu.problem_of("sdpa", q, k, v, mask, not masked, SCALE)
    wanted, wanted_lse = gpu.run_splits(p, SPLIT)
    for v_programs in (2, 4):
        out, lse = gpu.run_splits(p, replace(SPLIT, v_programs=v_programs))
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
