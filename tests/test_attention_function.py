"""``F.scaled_dot_product_attention`` in every form that it takes: shapes, masks, errors, graphs, values, gradients."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from attention_cases import causal_mask, every_dtype, inputs, ops, pad_left, sdpa, values
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import bicompile
from bicompile.errors import UnsupportedOpError
from bicompile.lowering.attention.op import scaled_dot_product_attention
from bicompile.testing import same_bits


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


@pytest.mark.parametrize("depth", [16, 17, 33, 64, 80, 96, 127, 128, 192, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_heads_of_every_size_decode_as_they_prefill_and_are_as_exact_as_torch(dtype: torch.dtype, depth: int):
    q, k, v = (t.transpose(1, 2) for t in (randn(1, 210, h, depth).to(dtype) for h in (4, 2, 2)))
    whole = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    for i in (0, 16, 191, 192, 209):
        now = q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1]
        assert same_bits(scaled_dot_product_attention(*now, enable_gqa=True), whole[:, :, i : i + 1])
    wide = (t.double() for t in (q, k, v))
    exact = F.scaled_dot_product_attention(*wide, is_causal=True, enable_gqa=True)
    stock = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert (whole - exact).norm() <= 1.5 * (stock - exact).norm()


def test_causal_biases_of_torch_are_masks_to_the_upper_left_and_to_the_lower_right():
    q, k, v = inputs(torch.float32, queries=5, keys=9, kv_heads=6)

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    for bias, mask in ((causal_lower_right(5, 9), causal_mask(5, 9)), (causal_upper_left(5, 9), causal_mask(9, 9)[:5])):
        with bicompile.eager():
            expected = attend(q, k, v, mask)
            assert same_bits(attend(q, k, v, bias), expected)
        assert same_bits(torch.compile(attend, backend="batch_invariant")(q, k, v, bias), expected)
        torch._dynamo.reset()


def test_biases_that_follow_the_distance_do_not_see_left_padding():
    """ALiBi, as an additive mask of each head; trap 18."""
    length, padding = 230, 37
    q, k, v = inputs(torch.float32, batch=1, queries=length, keys=length, kv_heads=6)
    distance = torch.arange(length) - torch.arange(length)[:, None]
    slopes = 2.0 ** -torch.arange(1, 7)
    alibi = (slopes[:, None, None] * distance).masked_fill(distance > 0, -math.inf)
    expected = scaled_dot_product_attention(q, k, v, alibi)
    behind = F.pad(alibi, (padding, 0, padding, 0), value=-math.inf)
    moved = scaled_dot_product_attention(*(pad_left(t, padding, math.nan) for t in (q, k, v)), behind)
    assert same_bits(moved[:, :, padding:], expected)
    last = scaled_dot_product_attention(q[:, :, -1:], k, v, alibi[:, -1:])
    assert same_bits(last, expected[:, :, -1:])


def test_a_graph_holds_no_op_of_one_backend():
    """Whichever PyTorch would take by the form of the call, or was told to take."""

    def every_form(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> list[Tensor]:
        attend = functools.partial(F.scaled_dot_product_attention, enable_gqa=True)
        with sdpa_kernel(SDPBackend.MATH):
            told = attend(q, k, v)
        return [told, attend(q, k, v, is_causal=True), attend(q, k, v, mask), attend(q[:, :, :1], k, v, mask.float())]

    q, k, v = (t.requires_grad_() for t in inputs(torch.float32, queries=5, keys=9))
    certificate = bicompile.explain(every_form, q, k, v, torch.ones(1, 9, dtype=torch.bool))
    lowered = [node.op for node in certificate.lowered]
    assert lowered.count("bicompile.sdpa.default") == 4 and lowered.count("bicompile.sdpa_backward.default") == 4
    assert not any("scaled_dot_product" in node.op for node in certificate.nodes)


def test_nested_tensors_are_refused_with_a_way_out():
    rows = torch.nested.nested_tensor([randn(n, 4, 16) for n in (3, 5)], layout=torch.jagged).transpose(1, 2)
    with bicompile.eager(), pytest.raises(UnsupportedOpError, match="Pad the nested tensor"):
        F.scaled_dot_product_attention(rows, rows, rows)


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


def test_other_dtypes_are_refused():
    q, k, v = randn(2, 3, 5, 4), randn(2, 3, 7, 4), randn(2, 3, 7, 3)
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
