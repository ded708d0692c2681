"""Layer norm and group norm, forward and backward."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from test_reduction import DTYPES, spread, worst_error
from torch import Tensor

import bicompile
import bicompile.lowering.norm.op  # noqa: F401 (registers the ops)
from bicompile.lowering.norm import reference
from bicompile.lowering.norm.order import order_for
from bicompile.testing import same_bits
from bicompile.testing.layouts import LAYOUTS, lay_out

ops = torch.ops.bicompile
EPS = 1e-5


def layer_norm_results(
    x: Tensor, grad: Tensor, dims: int, weight: Tensor | None, bias: Tensor | None, ops: object = ops
) -> list[Tensor]:
    """Forward, gradient of x and gradients of the parameters, by our ops or by the reference."""
    y, mean, rstd = ops.layer_norm(x, dims, weight, bias, EPS)
    dx = ops.layer_norm_backward(grad, x, dims, mean, rstd, weight)
    return [y, mean, rstd, dx, *ops.layer_norm_backward_params(grad, x, dims, mean, rstd, x.dtype)]


def group_norm_results(
    x: Tensor, grad: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, ops: object = ops
) -> list[Tensor]:
    y, mean, rstd = ops.group_norm(x, groups, weight, bias, EPS)
    dx = ops.group_norm_backward(grad, x, groups, mean, rstd, weight)
    return [y, mean, rstd, dx, *ops.group_norm_backward_params(grad, x, groups, mean, rstd, x.dtype)]


def all_results(x: Tensor) -> list[Tensor]:
    """Every op on ``x``: [N, C, L]."""
    weight, bias = spread((x.shape[2],), x.dtype, 11), spread((x.shape[2],), x.dtype, 12)
    channel_weight, channel_bias = spread((x.shape[1],), x.dtype, 13), spread((x.shape[1],), x.dtype, 14)
    results = layer_norm_results(x, x.flip(0), 1, weight, bias) + layer_norm_results(x, x.flip(0), 2, None, None)
    for groups in (1, x.shape[1]):
        results += group_norm_results(x, x.flip(0), groups, channel_weight, channel_bias)
    return results


def results_on_any_processor() -> list[Tensor]:
    """For tests/test_instruction_sets.py."""
    return [result for dtype in DTYPES for result in all_results(spread((7, 5, 133), dtype, 3))]


def test_order_sees_one_row_only():
    assert list(inspect.signature(order_for).parameters) == ["n", "dtype"]


@st.composite
def cases(draw: st.DrawFn, min_rank: int) -> tuple[Tensor, Tensor, torch.dtype, int]:
    """x and grad in any dtypes and layouts, a dtype for the parameters, and a seed for them."""
    sizes = st.sampled_from([1, 2, 3, 6, 33, 70])
    shape = tuple(draw(st.lists(sizes, min_size=min_rank, max_size=3), label="shape"))
    dtype, seed = draw(st.sampled_from(DTYPES), label="dtype"), draw(st.integers(0, 2**31), label="seed")
    x, grad = spread(shape, dtype, seed), spread(shape, draw(st.sampled_from([dtype, torch.float32])), seed + 1)
    x, grad = (lay_out(t, draw(st.sampled_from(LAYOUTS))) for t in (x, grad))
    return x, grad, draw(st.sampled_from([dtype, torch.float32]), label="dtype of weight"), seed


def parameters(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> tuple[Tensor | None, Tensor | None]:
    weight, bias = spread(shape, dtype, seed + 2), spread(shape, dtype, seed + 3)
    return (weight if seed % 3 else None), (bias if seed % 2 else None)


@given(case=cases(1), data=st.data())
def test_layer_norm_has_the_bits_of_its_reference(case: tuple[Tensor, Tensor, torch.dtype, int], data: st.DataObject):
    x, grad, dtype, seed = case
    dims = data.draw(st.integers(1, x.dim()), label="normalized dims")
    weight, bias = parameters(tuple(x.shape[-dims:]), dtype, seed)
    ours = layer_norm_results(x, grad, dims, weight, bias)
    assert same_bits(ours, layer_norm_results(x, grad, dims, weight, bias, reference))
    assert all(t.is_contiguous() for t in ours)


@given(case=cases(2), data=st.data())
def test_group_norm_has_the_bits_of_its_reference(case: tuple[Tensor, Tensor, torch.dtype, int], data: st.DataObject):
    x, grad, dtype, seed = case
    channels = x.shape[1]
    groups = data.draw(st.sampled_from([g for g in range(1, channels + 1) if channels % g == 0]), label="groups")
    weight, bias = parameters((channels,), dtype, seed)
    ours = group_norm_results(x, grad, groups, weight, bias)
    assert same_bits(ours, group_norm_results(x, grad, groups, weight, bias, reference))


@given(
    rows=st.integers(1, 40), n=st.sampled_from([1, 3, 32, 33, 64, 300]), dtype=st.sampled_from(DTYPES), data=st.data()
)
def test_row_has_the_same_bits_in_any_batch(rows: int, n: int, dtype: torch.dtype, data: st.DataObject):
    """Trap 9, rows per task chosen from M; trap 20."""
    seed = data.draw(st.integers(0, 2**31))
    x, grad = spread((rows, 4, n), dtype, seed), spread((rows, 4, n), dtype, seed + 1)
    weight, bias = spread((n,), dtype, seed + 2), spread((n,), dtype, seed + 3)
    row, order = data.draw(st.integers(0, rows - 1)), torch.tensor(data.draw(st.permutations(range(rows))))

    def per_row(x: Tensor, grad: Tensor) -> list[Tensor]:
        return layer_norm_results(x, grad, 1, weight, bias)[:4] + group_norm_results(x, grad, 2, None, None)[:4]

    whole = per_row(x, grad)
    alone = per_row(x[row : row + 1], grad[row : row + 1])
    assert same_bits(alone, [t[row : row + 1] for t in whole])
    assert same_bits(per_row(x[order], grad[order]), [t[order] for t in whole])
    poisoned = torch.full_like(x, math.nan)
    poisoned[row] = x[row]
    assert same_bits([t[row] for t in per_row(poisoned, grad)], [t[row] for t in whole])


@given(
    shape=st.tuples(st.sampled_from([1, 3]), st.sampled_from([2, 6]), st.sampled_from([1, 7, 65])),
    dtype=st.sampled_from(DTYPES),
)
def test_memory_layout_does_not_show(shape: tuple[int, int, int], dtype: torch.dtype):
    """Trap 13."""
    x = spread(shape, dtype, 5)
    expected = all_results(x)
    for layout in LAYOUTS:
        assert same_bits(all_results(lay_out(x, layout)), expected), layout
    assert same_bits(all_results(x.permute(0, 2, 1).contiguous().permute(0, 2, 1)), expected)


def test_threads_do_not_show(set_threads: Callable[[int], None]):
    """Trap 20."""
    found = []
    for threads in (1, 2, 4):
        set_threads(threads)
        found.append(all_results(spread((33, 6, 517), torch.float32, 0)))
    assert same_bits(found[0], found[1])
    assert same_bits(found[0], found[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_as_good_as_torchs(dtype: torch.dtype):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(100, 12, 50, generator=g).add(3).to(dtype)
    row_weight, row_bias = (torch.randn(50, generator=g).to(dtype) for _ in range(2))
    channel_weight, channel_bias = (torch.randn(12, generator=g).to(dtype) for _ in range(2))
    stock = F.layer_norm(x, (50,), row_weight, row_bias), F.group_norm(x, 3, channel_weight, channel_bias)
    exact = (
        F.layer_norm(x.double(), (50,), row_weight.double(), row_bias.double()),
        F.group_norm(x.double(), 3, channel_weight.double(), channel_bias.double()),
    )
    ours = (
        ops.layer_norm(x, 1, row_weight, row_bias, EPS)[0],
        ops.group_norm(x, 3, channel_weight, channel_bias, EPS)[0],
    )
    eps = torch.finfo(dtype).eps
    for mine, theirs, value in zip(ours, stock, exact, strict=True):
        scale = value.abs() + 1
        allowed = 4 * eps if dtype == torch.float64 else worst_error(theirs, value, scale)
        assert worst_error(mine, value, scale) <= 2 * allowed + eps


@pytest.mark.parametrize("dims", [1, 2])
def test_layer_norm_gradients_are_those_of_the_torch_function(dims: int):
    x, grad = spread((5, 7, 33), torch.float64, 1).requires_grad_(), spread((5, 7, 33), torch.float64, 2)
    shape = tuple(x.shape[-dims:])
    weight, bias = (spread(shape, torch.float64, seed).requires_grad_() for seed in (3, 4))
    expected = torch.autograd.grad(F.layer_norm(x, shape, weight, bias, EPS), (x, weight, bias), grad)
    ours = layer_norm_results(x.detach(), grad, dims, weight.detach(), bias.detach())[3:]
    for got, want in zip(ours, expected, strict=True):
        assert torch.allclose(got, want, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("shape", [(5, 6, 4, 3), (5, 6, 3)])
def test_group_norm_gradients_are_those_of_the_torch_function(groups: int, shape: tuple[int, ...]):
    x, grad = spread(shape, torch.float64, 1).requires_grad_(), spread(shape, torch.float64, 2)
    weight, bias = (spread((6,), torch.float64, seed).requires_grad_() for seed in (3, 4))
    expected = torch.autograd.grad(F.group_norm(x, groups, weight, bias, EPS), (x, weight, bias), grad)
    ours = group_norm_results(x.detach(), grad, groups, weight.detach(), bias.detach())[3:]
    for got, want in zip(ours, expected, strict=True):
        assert torch.allclose(got, want, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parameter_dtype", DTYPES[:3])
def test_statistics_have_atens_shapes_and_the_type_computed_in(dtype: torch.dtype, parameter_dtype: torch.dtype):
    """Also bf16 and fp16 rows with float32 weights."""
    x, weight = spread((2, 6, 4), dtype, 1), spread((4,), parameter_dtype, 2)
    stock = torch.native_layer_norm(x.double(), (4,), weight.double(), None, EPS)
    ours = ops.layer_norm(x, 1, weight, None, EPS)
    assert [t.shape for t in ours] == [t.shape for t in stock]
    assert ours[0].dtype == dtype
    assert ours[1].dtype == ours[2].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    stock = torch.ops.aten.native_group_norm(x.double(), None, None, 2, 6, 4, 3, EPS)
    assert [t.shape for t in ops.group_norm(x, 3, None, None, EPS)] == [t.shape for t in stock]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x, w: ops.layer_norm(x, 3, None, None, EPS),
            r"layer_norm: expected normalized_dims in \[1, 2\], got 3",
        ),
        (lambda x, w: ops.layer_norm(x.int(), 1, None, None, EPS), "layer_norm: expected x in float32"),
        (lambda x, w: ops.layer_norm(x, 1, w.int(), None, EPS), "layer_norm: expected weight in float32"),
        (lambda x, w: ops.group_norm(x, 4, None, None, EPS), "group_norm: expected groups to divide the 6 channels"),
        (lambda x, w: ops.group_norm(x[0], 1, None, None, EPS), "group_norm: expected x of rank 2 or more"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bad_arguments_are_named(call: Callable[[Tensor, Tensor], object], message: str, device: str):
    with pytest.raises((RuntimeError, ValueError, TypeError), match=message):
        call(torch.ones(2, 6, device=device), torch.ones(6, device=device))


def test_parameters_of_another_size_are_refused():
    with pytest.raises(RuntimeError, match="layer_norm: expected weight with 6 elements, got 5"):
        ops.layer_norm(torch.ones(2, 6), 1, torch.ones(5), None, EPS)


@pytest.mark.parametrize("shape", [(0, 6), (3, 0), (0, 6, 4), (2, 6, 0)])
def test_empty_tensors_give_empty_results(shape: tuple[int, ...]):
    x = torch.empty(shape)
    assert ops.layer_norm(x, 1, None, None, EPS)[0].shape == shape
    if shape[1]:
        assert ops.group_norm(x, 2, None, None, EPS)[0].shape == shape


def test_ops_pass_opcheck():
    x, weight = spread((3, 6, 40), torch.bfloat16, 6), spread((40,), torch.float32, 7)
    _, mean, rstd = ops.layer_norm(x, 1, weight, None, EPS)
    torch.library.opcheck(ops.layer_norm.default, (x, 1, weight, None, EPS))
    torch.library.opcheck(ops.layer_norm_backward.default, (x, x, 1, mean, rstd, weight))
    torch.library.opcheck(ops.layer_norm_backward_params.default, (x, x, 1, mean, rstd, torch.float32))
    _, mean, rstd = ops.group_norm(x, 2, None, None, EPS)
    torch.library.opcheck(ops.group_norm.default, (x, 2, None, None, EPS))
    torch.library.opcheck(ops.group_norm_backward.default, (x, x, 2, mean, rstd, None))
    torch.library.opcheck(ops.group_norm_backward_params.default, (x, x, 2, mean, rstd, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "dim"), [((6, 5), 0), ((6, 5), 1), ((6, 5, 2, 3), 0), ((6, 5, 3), 2), ((7,), 0)])
def test_gradients_of_a_weight_norm_are_those_of_the_torch_function(
    shape: tuple[int, ...], dim: int, dtype: torch.dtype
):
    g = torch.Generator().manual_seed(0)
    gains = [n if d == dim else 1 for d, n in enumerate(shape)]
    leaves = [torch.randn(s, generator=g).to(dtype) for s in (shape, gains)]
    grad = torch.randn(shape, generator=g).to(dtype)

    def results(fn: Callable[..., Tensor], leaves: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        out = fn(*leaves, dim)
        return out.detach(), *torch.autograd.grad(out, leaves, grad)

    compiled = results(torch.compile(torch._weight_norm, backend="batch_invariant"), leaves, grad)
    with bicompile.eager():
        assert same_bits(results(torch._weight_norm, leaves, grad), compiled)
    exact = results(torch._weight_norm, [leaf.double() for leaf in leaves], grad.double())
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    for ours, wanted in zip(compiled, exact, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), wanted, rtol=tolerance, atol=tolerance)
