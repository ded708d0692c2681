"""Attention on a GPU: a row's bits depend on the row and the keys that it sees, whatever the schedule."""

from __future__ import annotations

import concurrent.futures
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from dropped_attention import dropped_attention
from torch import Tensor
from workers import once

import bicompile
from bicompile.lowering.attention import admitted, gpu, gpu_backward
from bicompile.lowering.attention.op import scaled_dot_product_attention
from bicompile.lowering.attention.problem import problem_of
from bicompile.lowering.attention.schedule import (
    PLAIN_BACKWARD,
    REFERENCE,
    REFERENCE_BACKWARD,
    SplitSchedule,
    TileSchedule,
    backward_schedules,
    tile_schedules,
)
from bicompile.lowering.gpu.device import device_key
from bicompile.testing import same_bits

ops = torch.ops.bicompile
KINDS = [(torch.bfloat16, 128), (torch.float16, 64), (torch.float32, 40)]
every_kind = pytest.mark.parametrize(("dtype", "depth"), KINDS, ids=str)
main_kind = pytest.mark.parametrize(("dtype", "depth"), KINDS[:1], ids=str)
ERRORS = [*KINDS, (torch.bfloat16, 80), (torch.bfloat16, 256), (torch.float64, 64)]
"""Dtypes and depths whose values are checked."""
DROPPED_ERRORS = [*KINDS, (torch.float64, 64)]
"""The same with dropout."""
SCALE = 0.1


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Values over many binades, so that the order of additions shows."""
    g = torch.Generator(device="cuda").manual_seed(seed)
    x = torch.randn(shape, generator=g, device="cuda")
    return (x * torch.exp(torch.randn(shape, generator=g, device="cuda"))).to(dtype)


def inputs(
    dtype: torch.dtype, depth: int, *, batch: int = 2, heads: int = 8, kv_heads: int = 2, queries: int = 700,
    keys: int = 700, seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    shapes = ((queries, heads), (keys, kv_heads), (keys, kv_heads))
    q, k, v = (values((batch, *shape, depth), dtype, seed + i).transpose(1, 2) for i, shape in enumerate(shapes))
    return q, k, v


def seeds_for(q: Tensor) -> Tensor:
    """Any int64, for each query row."""
    g = torch.Generator(device="cuda").manual_seed(7)
    return torch.randint(-(2**63), 2**63 - 1, q.shape[:3], generator=g, device="cuda")


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, causal: bool = False, seeds: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, lse = ops.sdpa(q, k, v, mask, causal, SCALE, None, seeds, dropout_p)
    return out, lse


def gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, causal: bool = False,
    seeds: Tensor | None = None, dropout_p: float = 0.0,
) -> tuple[Tensor, ...]:  # fmt: skip
    """dq, dk, dv and, for a floating-point mask, dmask."""
    out, lse = sdpa(q, k, v, mask, causal=causal, seeds=seeds, dropout_p=dropout_p)
    wanted = mask is not None and mask.dtype != torch.bool
    found = ops.sdpa_backward(grad, q, k, v, mask, out, lse, causal, SCALE, wanted, seeds, dropout_p)
    return tuple(found if wanted else found[:3])


def causal_mask(queries: int, keys: int) -> Tensor:
    """Queries are the last ones of ``keys``."""
    return torch.ones(queries, keys, dtype=torch.bool, device="cuda").tril(keys - queries)


def pad(t: Tensor, left: int, right: int, value: float) -> Tensor:
    return F.pad(t, (0, 0, left, right), value=value)


def _prepare(case: tuple[torch.dtype, int, str, int, float]) -> None:
    """Compile and admit what the tests of one kind of problem need; runs in a process of its own.

    The last numbers of ``case`` are how many queries, or 0 for the gradients, and the probability of dropout.
    """
    dtype, depth, mask, queries, dropout_p = case
    q, k, v = inputs(dtype, depth, queries=queries or 700)
    seen = None
    if mask == "bool":
        seen = causal_mask(queries or 700, 700)
    elif mask == "additive":
        seen = torch.zeros(queries, 700, dtype=dtype, device="cuda")
    seeds = seeds_for(q) if dropout_p else None
    if queries:
        sdpa(q, k, v, seen, causal=mask == "causal", seeds=seeds, dropout_p=dropout_p)
    else:
        gradients(torch.ones_like(q), q, k, v, seen, causal=mask == "causal", seeds=seeds, dropout_p=dropout_p)


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    once(_compile_beforehand, "attention")


def _compile_beforehand() -> None:
    """Compile in parallel what would otherwise be compiled one by one."""
    first, *others = KINDS
    cases = [(*first, mask, n) for mask in ("bool", "causal", "none") for n in (700, 0, 16, 1)]
    cases += [(*first, "additive", n) for n in (700, 1)]
    cases += [(*kind, *case) for kind in others for case in (("causal", 700), ("bool", 700), ("bool", 16), ("none", 1))]
    cases += [(dtype, depth, "causal", 0) for dtype, depth in ERRORS]
    cases = [(*case, 0.0) for case in cases]
    cases += [(*kind, mask, n, 0.2) for kind in KINDS[:2] for mask in ("causal", "bool") for n in (700, 0)]
    cases += [(dtype, depth, "causal", 0, 0.2) for dtype, depth in DROPPED_ERRORS if (dtype, depth) not in KINDS[:2]]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(12, os.cpu_count() or 1), context) as pool:
        list(pool.map(_prepare, cases))


# --- schedules -------------------------------------------------------------------------------------------------------


def test_schedules_are_admitted():
    """Each was compared with the reference when the cases were compiled; only the named ones may be missing."""
    sdpa(*inputs(torch.bfloat16, 128))
    verdicts = admitted.ADMISSION.verdicts(torch.cuda.current_device())
    assert verdicts
    dropped = [verdict for verdict in verdicts if not verdict.admitted]
    assert not dropped, dropped


@pytest.mark.parametrize(("dtype", "depth"), KINDS[:2], ids=str)
def test_probes_show_which_keys_the_tensor_core_adds_together(dtype: torch.dtype, depth: int):
    """Control: keys that change places among 32, as Triton does it for ``mma.sync`` behind a load of bytes."""
    moved = torch.arange(32, device="cuda").view(2, 4, 2, 2).permute(2, 0, 1, 3).flatten()
    for p in admitted.probes_of(torch.device("cuda"), dtype, depth, depth, "none", False, False):
        keys = torch.arange(p.k.shape[2], device="cuda")
        whole = keys[: len(keys) // 32 * 32].view(-1, 32)
        whole.copy_(whole[:, moved])
        other = problem_of("sdpa", p.q, p.k[:, :, keys], p.v[:, :, keys], None, False, p.scale)
        assert (gpu.run(p, REFERENCE)[0] != gpu.run(other, REFERENCE)[0]).double().mean() > 0.01


@pytest.mark.parametrize("causal", [False, True])
def test_tiles_and_splits_have_the_same_bits(causal: bool):
    """Traps 6 and 8, over splits of every size."""
    q, k, v = inputs(torch.bfloat16, 128, batch=1, heads=2, kv_heads=1, queries=70, keys=18000)
    p = problem_of("sdpa", q, k, v, None, causal, SCALE)
    expected = gpu.run(p, REFERENCE)
    splits = [SplitSchedule(16, 4, 1, span) for span in (1, 2048, 8192, 0)] + [SplitSchedule(32, 8, 2)]
    splits += [SplitSchedule(16, 4, 3, 512, tma, 2) for tma in (False, True)]
    for schedule in (TileSchedule(64, 8, 1), *splits):
        assert same_bits(gpu.run(p, schedule), expected)


def test_another_order_has_other_bits():
    """Control: with a grid of keys that starts elsewhere, these values show it."""
    q, k, v = inputs(torch.bfloat16, 128, queries=1)
    additive = torch.zeros(1, 707, device="cuda").index_fill(1, torch.arange(7, device="cuda"), -1e4)
    moved = (F.pad(t, (0, 0, 7, 0)) for t in (k, v))
    assert not same_bits(sdpa(q, *moved, additive)[0], sdpa(q, k, v)[0])


# --- rows ------------------------------------------------------------------------------------------------------------


@main_kind
def test_row_of_the_batch_has_same_bits_among_any_others(dtype: torch.dtype, depth: int):
    q, k, v = inputs(dtype, depth, batch=5, queries=100, keys=700)
    mask = torch.rand(5, 1, 100, 700, device="cuda", generator=torch.Generator("cuda").manual_seed(1)) < 0.8
    grad = values(tuple(q.shape), dtype, 9)
    for tensors in ((grad, q, k, v, mask), (grad, q, k, v)):

        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            return *sdpa(*tensors[1:]), *gradients(*tensors)

        whole = run(*tensors)
        order = [3, 0, 4, 1, 2]
        permuted = run(*(t[order] for t in tensors))
        for row in (0, 3):
            alone = run(*(t[row : row + 1] for t in tensors))
            poisoned = [torch.full_like(t, math.nan) if t.is_floating_point() else t.clone() for t in tensors]
            for p, t in zip(poisoned, tensors, strict=True):
                p[row] = t[row]
            among = run(*poisoned)
            for i, expected in enumerate(whole):
                assert same_bits(alone[i][0], expected[row])
                assert same_bits(among[i][row], expected[row])
        for ours, expected in zip(permuted, whole, strict=True):
            assert same_bits(ours, expected[order])
        assert same_bits(run(*tensors), whole)


@main_kind
def test_layout_does_not_show(dtype: torch.dtype, depth: int):
    """Traps 13 and 14: odd offsets, padded rows, strides of zero, columns apart."""
    q, k, v = inputs(dtype, depth, queries=150, keys=150)
    grad = values(tuple(q.shape), dtype, 3)
    expected = sdpa(q, k, v, causal=True), gradients(grad, q, k, v, causal=True)

    def odd(t: Tensor) -> Tensor:
        wide = torch.empty((*t.shape[:3], depth + 3), dtype=dtype, device="cuda")[..., 1 : depth + 1]
        return wide.copy_(t)

    def apart(t: Tensor) -> Tensor:
        return t.transpose(2, 3).contiguous().transpose(2, 3)

    layouts: list[Callable[[Tensor], Tensor]] = [odd, apart, torch.Tensor.contiguous]
    for layout in layouts:
        moved = [layout(t) for t in (grad, q, k, v)]
        assert same_bits((sdpa(*moved[1:], causal=True), gradients(*moved, causal=True)), expected)
    one = k[:1, :1].expand_as(k), v[:1, :1].expand_as(v)
    assert same_bits(sdpa(q, *one), sdpa(q, *(t.contiguous() for t in one)))
    out, _ = sdpa(q, k, v)
    assert out.transpose(1, 2).is_contiguous()


# --- sequences -------------------------------------------------------------------------------------------------------


@every_kind
def test_prefill_chunks_and_decode_have_same_bits(dtype: torch.dtype, depth: int):
    """Trap 7, and M = 1 equal to M = k + 1."""
    length = 1300
    q, k, v = inputs(dtype, depth, queries=length, keys=length)
    whole = sdpa(q, k, v, causal=True)
    assert same_bits(sdpa(q, k, v, causal_mask(length, length)), whole)
    if dtype == KINDS[0][0]:
        additive = torch.zeros(length, length, dtype=dtype, device="cuda")
        assert same_bits(sdpa(q, k, v, additive.masked_fill(~causal_mask(length, length), -math.inf)), whole)
    for start, stop in ((0, 1), (0, 100), (100, 101), (101, 290), (511, 516), (640, 705), (1295, 1300), (1299, 1300)):
        chunk = sdpa(q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], causal_mask(stop - start, stop))
        assert same_bits(chunk, tuple(t[:, :, start:stop] for t in whole))
    for i in (0, 127, 128, 511, 512, 1299):
        one = sdpa(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1])
        assert same_bits(one, tuple(t[:, :, i : i + 1] for t in whole))
    assert same_bits(sdpa(q[:, :, :1], k, v, causal=True)[0], whole[0][:, :, :1])  # upper-left: the first key only


@main_kind
@pytest.mark.parametrize("padding", [1, 3, 64, 70])
def test_left_padding_does_not_show(dtype: torch.dtype, depth: int, padding: int):
    """Trap 18: whatever padded queries see, and whatever padded keys hold; forward and backward."""
    length = 600
    q, k, v = inputs(dtype, depth, batch=1, queries=length, keys=length)
    grad = values(tuple(q.shape), dtype, 3)
    expected = sdpa(q, k, v, causal=True)
    expected_gradients = gradients(grad, q, k, v, causal=True)
    mask = causal_mask(length + padding, length + padding)
    mask[:, :padding] = False
    moved = [pad(grad, padding, 0, 1.0), pad(q, padding, 0, math.nan), pad(k, padding, 0, math.nan)]
    moved.append(pad(v, padding, 0, math.inf))
    out, lse = sdpa(*moved[1:], mask)
    assert same_bits((out[:, :, padding:], lse[:, :, padding:]), expected)
    assert not out[:, :, :padding].any()
    found = gradients(*moved, mask)
    assert same_bits(tuple(t[:, :, padding:] for t in found), expected_gradients)
    assert not any(t[:, :, :padding].any() for t in found)
    assert same_bits(sdpa(q[:, :, -1:], *moved[2:], mask[-1:])[0], expected[0][:, :, -1:])
    for value in (-math.inf, torch.finfo(dtype).min):
        additive = torch.zeros(mask.shape, dtype=dtype, device="cuda").masked_fill(~mask, value)
        assert same_bits(sdpa(*moved[1:], additive)[0][:, :, padding:], expected[0])
    selfish = mask | torch.eye(length + padding, dtype=torch.bool, device="cuda")
    selfish[:padding] |= causal_mask(length + padding, length + padding)[:padding]
    finite = [torch.nan_to_num(t, nan=1.0, posinf=1.0) for t in moved[1:]]
    assert same_bits(sdpa(*finite, selfish)[0][:, :, padding:], expected[0])


@main_kind
@pytest.mark.parametrize("unused", [1, 50, 5000])
def test_unused_cache_slots_do_not_show(dtype: torch.dtype, depth: int, unused: int):
    q, k, v = inputs(dtype, depth, queries=3, keys=600)
    mask = torch.arange(600 + unused, device="cuda") < 600
    cache = pad(k, 0, unused, math.nan), pad(v, 0, unused, math.inf)
    assert same_bits(sdpa(q, *cache, mask), sdpa(q, k, v))
    grad = values(tuple(q.shape), dtype, 3)
    dq, dk, dv = gradients(grad, q, *cache, mask)
    assert same_bits((dq, dk[:, :, :600], dv[:, :, :600]), gradients(grad, q, k, v))
    assert not dk[:, :, 600:].any() and not dv[:, :, 600:].any()


def test_packed_documents_are_attention_to_each_alone():
    q, k, v = inputs(torch.bfloat16, 128, queries=500, keys=500)
    starts = torch.zeros(500, dtype=torch.int64, device="cuda")
    starts[[77, 300]] = 1
    document = starts.cumsum(0)
    mask = causal_mask(500, 500) & (document[:, None] == document[None, :])
    out, _ = sdpa(q, k, v, mask)
    for own in (slice(0, 77), slice(77, 300), slice(300, 500)):
        alone, _ = sdpa(q[:, :, own], k[:, :, own], v[:, :, own], causal=True)
        assert same_bits(alone, out[:, :, own])


def test_sliding_window_is_attention_to_the_keys_in_the_window():
    length, window = 330, 250
    q, k, v = inputs(torch.bfloat16, 128, queries=length, keys=length)
    out, _ = sdpa(q, k, v, causal_mask(length, length).triu(1 - window))
    for i in (0, 100, 249, 250, 329):
        seen = slice(max(0, i + 1 - window), i + 1)
        alone, _ = sdpa(q[:, :, i : i + 1], k[:, :, seen], v[:, :, seen])
        assert same_bits(alone, out[:, :, i : i + 1])


@main_kind
def test_grouped_heads_have_the_bits_of_repeated_keys(dtype: torch.dtype, depth: int):
    for queries in (1, 300):
        q, k, v = inputs(dtype, depth, queries=queries)
        assert same_bits(sdpa(q, k, v), sdpa(q, k.repeat_interleave(4, 1), v.repeat_interleave(4, 1)))


# --- masked rows, NaN and Inf ----------------------------------------------------------------------------------------


@main_kind
def test_value_that_is_not_finite_reaches_only_the_rows_that_see_it(dtype: torch.dtype, depth: int):
    q, k, v = inputs(dtype, depth, queries=300, keys=300)
    clean = sdpa(q, k, v, causal=True)
    v[:, :, 170, 3] = math.nan
    v[:, :, 171, 4] = math.inf
    k[:, :, 250] = math.nan
    out, lse = sdpa(q, k, v, causal=True)
    assert same_bits((out[:, :, :170], lse[:, :, :250]), (clean[0][:, :, :170], clean[1][:, :, :250]))
    assert out[:, :, 170:, 3].isnan().all() and out[:, :, 171:, 4].isnan().all() and out[:, :, 250:].isnan().all()
    assert same_bits(out[:, :, 170:250, 5:], clean[0][:, :, 170:250, 5:])


@main_kind
def test_row_that_sees_no_key_is_zero(dtype: torch.dtype, depth: int):
    """Trap 19."""
    q, k, v = inputs(dtype, depth, queries=4, keys=30)
    mask = torch.ones(4, 30, dtype=torch.bool, device="cuda")
    mask[1] = False
    out, lse = sdpa(q, k, v, mask)
    assert not out[:, :, 1].any() and not out.isnan().any() and (lse[:, :, 1] == -math.inf).all()
    found = gradients(torch.ones_like(q), q, k, v, mask)
    assert not found[0][:, :, 1].any() and not any(t.isnan().any() for t in found)
    empty = sdpa(q, k[:, :, :0], v[:, :, :0])
    assert not empty[0].any() and (empty[1] == -math.inf).all()


@main_kind
def test_long_prefill_holds_no_scores_in_memory(dtype: torch.dtype, depth: int):
    """32k tokens, whose scores would take 16 GiB for 8 heads; the last tokens are those of a chunk."""
    length, last = 32768, 64
    q, k, v = inputs(dtype, depth, batch=1, queries=length, keys=length)
    sdpa(*(t[:, :, :last] for t in (q, k, v)), causal=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, lse = sdpa(q, k, v, causal=True)
    gradients(torch.ones_like(out), q, k, v, causal=True)
    assert torch.cuda.max_memory_allocated() - before < 16 * out.nbytes
    chunk = sdpa(q[:, :, -last:], k, v, causal_mask(last, length))
    assert same_bits(chunk, (out[:, :, -last:], lse[:, :, -last:]))


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "depth"), ERRORS, ids=str)
def test_error_is_not_much_above_that_of_torch(dtype: torch.dtype, depth: int):
    g = torch.Generator("cuda").manual_seed(0)
    shapes = ((2, 6, 260, depth), (2, 2, 260, depth), (2, 2, 260, depth), (2, 6, 260, depth))
    q, k, v, grad = (torch.randn(shape, generator=g, device="cuda").to(dtype) for shape in shapes)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def stock(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def run(function: Callable[..., Tensor], wide: torch.dtype) -> Iterator[Tensor]:
        leaves = [t.to(wide).requires_grad_() for t in (q, k, v)]
        out = function(*leaves)
        yield out.detach()
        yield from torch.autograd.grad(out, leaves, grad.to(wide))

    floor = 16 * torch.finfo(torch.float64).eps
    for mine, theirs, truth in zip(run(ours, dtype), run(stock, dtype), run(stock, torch.float64), strict=True):
        error = [((x.double() - truth).norm() / truth.norm()).item() for x in (theirs, mine)]
        assert error[1] <= 2 * error[0] + floor


@pytest.mark.parametrize("shape", [(90, 130), (2, 1, 1, 130), (6, 90, 1), (2, 6, 90, 130)])
def test_gradient_of_the_mask_is_that_of_torch(shape: tuple[int, ...]):
    q, k, v = (torch.randn(2, h, n, 32, device="cuda") for h, n in ((6, 90), (2, 130), (2, 130)))
    mask = torch.randn(shape, device="cuda")
    leaves = [t.double().requires_grad_() for t in (q, k, v, mask.expand(2, 6, 90, 130))]
    out = F.scaled_dot_product_attention(*leaves, scale=SCALE, enable_gqa=True)
    grad = torch.randn_like(q)
    *wanted, terms = torch.autograd.grad(out, leaves, grad.double())
    scales = [exact.abs().max().item() for exact in wanted]
    # A sum's error is on the scale of its terms: what is added to a whole row of scores has gradient 0.
    wanted.append(terms.sum_to_size(shape))
    scales.append(terms.abs().sum_to_size(shape).max().item())
    for ours, exact, scale in zip(gradients(grad, q, k, v, mask), wanted, scales, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4 * scale)


def test_backward_schedules_have_the_same_bits():
    q, k, v = inputs(torch.bfloat16, 128, queries=300, keys=500)
    p = problem_of("sdpa", q, k, v, None, False, SCALE)
    out, lse = gpu.run(p, REFERENCE)
    found = [gpu_backward.run(p, out, out, lse, schedule)[:3] for schedule in (REFERENCE_BACKWARD, PLAIN_BACKWARD)]
    assert same_bits(found[1], found[0])


# --- dropout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "depth"), KINDS[:2], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_dropped_row_of_the_batch_has_same_bits_among_any_others(dtype: torch.dtype, depth: int, masked: bool):
    q, k, v = inputs(dtype, depth, batch=4, queries=150, keys=700)
    tensors = [values(tuple(q.shape), dtype, 9), q, k, v, seeds_for(q)]
    if masked:
        mask = torch.rand(4, 1, 150, 700, device="cuda", generator=torch.Generator("cuda").manual_seed(1)) < 0.8
        mask[1, :, :, :33] = False
        tensors.append(mask)

    def run(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, seeds: Tensor, *mask: Tensor) -> tuple[Tensor, ...]:
        dropout = dict(causal=not mask, seeds=seeds, dropout_p=0.2)
        return *sdpa(q, k, v, *mask, **dropout), *gradients(grad, q, k, v, *mask, **dropout)

    whole = run(*tensors)
    assert not same_bits(whole[0], sdpa(*tensors[1:4], *tensors[5:], causal=not masked)[0])
    order = [3, 0, 2, 1]
    permuted = run(*(t[order] for t in tensors))
    for ours, expected in zip(permuted, whole, strict=True):
        assert same_bits(ours, expected[order])
    for row in (1, 3):
        alone = run(*(t[row : row + 1] for t in tensors))
        for ours, expected in zip(alone, whole, strict=True):
            assert same_bits(ours[0], expected[row])
    assert same_bits(run(*tensors), whole)


@pytest.mark.parametrize(("dtype", "depth"), KINDS[:2], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_schedules_drop_alike(dtype: torch.dtype, depth: int, masked: bool):
    q, k, v = inputs(dtype, depth, batch=2, heads=4, queries=300, keys=1300)
    mask = causal_mask(300, 1300) if masked else None
    if mask is not None:
        mask[:200, :37] = False
    p = problem_of("sdpa", q, k, v, mask, not masked, SCALE, None, seeds_for(q), 0.2)
    device = device_key(q.device.index)
    out, lse = expected = gpu.run(p, REFERENCE)
    for schedule in tile_schedules(300, p.widths, dtype, device):
        assert same_bits(gpu.run(p, schedule), expected), schedule
    grad = values(tuple(q.shape), dtype, 3)
    wanted = gpu_backward.run(p, grad, out, lse, REFERENCE_BACKWARD)[:3]
    for schedule in backward_schedules(p.widths, dtype, device):
        found = gpu_backward.run(p, grad, out, lse, schedule)[:3]
        assert same_bits(found, wanted), schedule


@main_kind
def test_one_dropped_query_is_that_of_many(dtype: torch.dtype, depth: int):
    q, k, v = inputs(dtype, depth, queries=300, keys=300)
    seeds = seeds_for(q)
    whole, _ = sdpa(q, k, v, causal=True, seeds=seeds, dropout_p=0.2)
    for i in (0, 127, 128, 299):
        one = q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1]
        assert same_bits(sdpa(*one, seeds=seeds[:, :, i : i + 1], dropout_p=0.2)[0], whole[:, :, i : i + 1])


@main_kind
def test_left_padding_does_not_move_what_is_dropped(dtype: torch.dtype, depth: int):
    length, padding = 300, 67
    q, k, v = inputs(dtype, depth, queries=length, keys=length)
    grad, seeds = values(tuple(q.shape), dtype, 3), seeds_for(q)
    expected = sdpa(q, k, v, causal=True, seeds=seeds, dropout_p=0.2)
    expected += gradients(grad, q, k, v, causal=True, seeds=seeds, dropout_p=0.2)
    mask = causal_mask(length + padding, length + padding)
    mask[:, :padding] = False
    moved = [pad(t, padding, 0, math.nan) for t in (q, k, v)]
    dropout = dict(seeds=F.pad(seeds, (padding, 0), value=5), dropout_p=0.2)
    found = *sdpa(*moved, mask, **dropout), *gradients(pad(grad, padding, 0, 1.0), *moved, mask, **dropout)
    assert same_bits(tuple(t[:, :, padding:] for t in found), expected)


@pytest.mark.parametrize(("dtype", "depth"), DROPPED_ERRORS, ids=str)
@pytest.mark.parametrize("kind", ["causal", "bool", "additive"])
def test_error_with_dropout_is_not_much_above_that_of_plain_torch(dtype: torch.dtype, depth: int, kind: str):
    g = torch.Generator("cuda").manual_seed(0)
    shapes = ((2, 6, 260, depth), (2, 2, 260, depth), (2, 2, 260, depth), (2, 6, 260, depth))
    q, k, v, grad = (torch.randn(shape, generator=g, device="cuda").to(dtype) for shape in shapes)
    mask = None
    if kind != "causal":
        mask = torch.rand(2, 1, 260, 260, generator=g, device="cuda") < 0.8
        mask[0, :, :, :19] = False
    if kind == "additive":
        bias = torch.randn(2, 1, 260, 260, generator=g, device="cuda").to(dtype)
        mask = bias.masked_fill(~mask, -math.inf)
    seeds = seeds_for(q)

    def ours(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return ops.sdpa(q, k, v, mask, kind == "causal", SCALE, None, seeds, 0.2)[0]

    def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return dropped_attention(q, k, v, mask, kind == "causal", SCALE, seeds, 0.2)

    def run(function: Callable[..., Tensor], wide: torch.dtype) -> Iterator[Tensor]:
        leaves = [t.to(wide).requires_grad_() for t in (q, k, v)]
        own = mask
        if mask is not None and kind == "additive":
            own = mask.to(wide).requires_grad_()
            leaves.append(own)
        out = function(*leaves[:3], own)
        yield out.detach()
        yield from torch.autograd.grad(out, leaves, grad.to(wide))

    floor = 16 * torch.finfo(torch.float64).eps
    for mine, theirs, truth in zip(run(ours, dtype), run(plain, dtype), run(plain, torch.float64), strict=True):
        error = [((x.double() - truth).norm() / truth.norm()).item() for x in (theirs, mine)]
        assert error[1] <= 2 * error[0] + floor


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_compiled_dropout_does_not_follow_the_batch(dtype: torch.dtype):
    q, k, v = inputs(dtype, 64, batch=4, heads=4, kv_heads=4, queries=200, keys=200)
    grad = values(tuple(q.shape), dtype, 3)

    @torch.compile(backend="batch_invariant", fullgraph=True)
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.2, is_causal=True)

    def run(rows: list[int]) -> tuple[Tensor, ...]:
        leaves = [t[rows].requires_grad_() for t in (q, k, v)]
        torch.manual_seed(5)
        out = attend(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, grad[rows])

    whole = run([0, 1, 2, 3])
    assert same_bits(run([0, 1, 2, 3]), whole)
    for rows in ([2], [3, 0], [1, 3, 2]):
        for ours, expected in zip(run(rows), whole, strict=True):
            assert same_bits(ours, expected[rows])
    torch.manual_seed(6)
    assert not same_bits(attend(q, k, v), whole[0])


@pytest.mark.parametrize("queries", [1, 300])
def test_compiled_layers_that_share_a_mask_read_it_once(queries: int):
    q, k, v = inputs(torch.bfloat16, 128, queries=queries)
    mask = torch.rand(q.shape[0], 1, queries, k.shape[2], device="cuda") < 0.8

    def layers(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        for _ in range(3):
            q = torch.ops.bicompile.sdpa(q, k, v, mask, False, SCALE)[0]
        return q

    compiled = torch.compile(layers, backend="batch_invariant", fullgraph=True)
    lowered = [node.op for node in bicompile.explain(layers, q, k, v, mask).lowered]
    assert lowered.count("bicompile.mask_rows.default") == 1
    with torch.no_grad():
        assert same_bits(compiled(q, k, v, mask), layers(q, k, v, mask))


def test_a_graph_captures_it():
    q, k, v = inputs(torch.bfloat16, 128, queries=1)
    expected = sdpa(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sdpa(q, k, v)
    graph.replay()
    assert same_bits(captured, expected)
