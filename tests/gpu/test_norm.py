"""Layer norm and group norm on the GPU: the bits of their references, whatever surrounds a row."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bicompile.lowering.norm.op  # noqa: F401 (registers the ops)
from bicompile.lowering.gpu import grouping, plans
from bicompile.lowering.gpu.admission import equal_bits
from bicompile.lowering.norm import reference
from bicompile.lowering.reduction.reference import gpu_fold, gpu_moments
from bicompile.testing.layouts import LAYOUTS, lay_out

ops = torch.ops.bicompile
EPS = 1e-5


def drawn(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    g = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(shape, generator=g, dtype=torch.float64, device="cuda") * 3 + 1).to(dtype)


def cpu(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.cpu() for t in tensors]


@pytest.mark.parametrize(
    ("shape", "dims", "dtype"),
    [
        ((100, 64), 1, torch.float32),
        ((3, 5, 640), 2, torch.float64),
        ((9, 8192), 1, torch.bfloat16),
        ((4, 30_000), 1, torch.float32),
        ((4, 30_000), 1, torch.float16),
    ],
)
def test_layer_norm_and_its_gradients_have_the_bits_of_their_references(
    shape: tuple[int, ...], dims: int, dtype: torch.dtype
):
    x, grad = drawn(shape, dtype, 0), drawn(shape, dtype, 1)
    for weight, bias in ((drawn(shape[-dims:], torch.float32, 2), drawn(shape[-dims:], dtype, 3)), (None, None)):
        ours = ops.layer_norm(x, dims, weight, bias, EPS)
        expected = reference.layer_norm(x.cpu(), dims, *cpu(weight, bias), EPS, gpu_moments)
        for found, known in zip(ours, expected, strict=True):
            assert equal_bits(found.cpu(), known)
        rows = (*cpu(grad, x), dims, *cpu(*ours[1:]))
        dx = ops.layer_norm_backward(grad, x, dims, *ours[1:], weight)
        assert equal_bits(dx.cpu(), reference.layer_norm_backward(*rows, *cpu(weight), gpu_fold))
        found = ops.layer_norm_backward_params(grad, x, dims, *ours[1:], dtype)
        for got, known in zip(found, reference.layer_norm_backward_params(*rows, dtype, gpu_fold), strict=True):
            assert equal_bits(got.cpu(), known)


def test_parameters_of_many_rows_have_the_bits_of_their_reference():
    x, grad = drawn((20_000, 24), torch.bfloat16, 0), drawn((20_000, 24), torch.bfloat16, 1)
    _, mean, rstd = ops.layer_norm(x, 1, None, None, EPS)
    found = ops.layer_norm_backward_params(grad, x, 1, mean, rstd, torch.float32)
    expected = reference.layer_norm_backward_params(*cpu(grad, x), 1, *cpu(mean, rstd), torch.float32, gpu_fold)
    for got, known in zip(found, expected, strict=True):
        assert equal_bits(got.cpu(), known)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "groups"), [((3, 12, 50), 4), ((2, 8), 2), ((2, 64, 40, 40), 4)])
def test_group_norm_and_its_gradients_have_the_bits_of_their_references(
    shape: tuple[int, ...], groups: int, dtype: torch.dtype
):
    x, grad, weight, bias = (drawn(s, dtype, i) for i, s in enumerate((shape, shape, shape[1:2], shape[1:2])))
    ours = ops.group_norm(x, groups, weight, bias, EPS)
    expected = reference.group_norm(*cpu(x), groups, *cpu(weight, bias), EPS, gpu_moments)
    for found, known in zip(ours, expected, strict=True):
        assert equal_bits(found.cpu(), known)
    rows = (*cpu(grad, x), groups, *cpu(*ours[1:]))
    dx = ops.group_norm_backward(grad, x, groups, *ours[1:], weight)
    assert equal_bits(dx.cpu(), reference.group_norm_backward(*rows, *cpu(weight), gpu_fold))
    found = ops.group_norm_backward_params(grad, x, groups, *ours[1:], dtype)
    for got, known in zip(found, reference.group_norm_backward_params(*rows, dtype, gpu_fold), strict=True):
        assert equal_bits(got.cpu(), known)


@pytest.mark.parametrize(("rows", "n"), [(3000, 96), (700, 4096), (33, 8192), (17, 50257)])
def test_row_has_the_same_bits_in_any_batch(rows: int, n: int):
    x, grad, weight = (
        drawn((rows, n), torch.bfloat16, 0),
        drawn((rows, n), torch.bfloat16, 1),
        drawn((n,), torch.bfloat16, 2),
    )

    def results(x: Tensor, grad: Tensor) -> Tensor:
        y, mean, rstd = ops.layer_norm(x, 1, weight, weight, EPS)
        return torch.stack([y, ops.layer_norm_backward(grad, x, 1, mean, rstd, weight)], 1)

    whole = results(x, grad)
    order = torch.randperm(rows, device="cuda")
    assert equal_bits(results(x[order], grad[order]), whole[order])
    for row in (0, rows // 2, rows - 1):
        poisoned = torch.full_like(x, math.nan)
        poisoned[row] = x[row]
        assert equal_bits(results(x[row : row + 1], grad[row : row + 1])[0], whole[row])
        assert equal_bits(results(poisoned, grad)[row], whole[row])


def test_rows_taken_in_groups_have_the_same_bits(monkeypatch: pytest.MonkeyPatch):
    x, weight = drawn((50, 6, 5000), torch.bfloat16, 0), drawn((6,), torch.bfloat16, 1)
    expected = ops.group_norm(x, 3, weight, weight, EPS)
    monkeypatch.setattr(grouping, "_cache_bytes", lambda device: 1)
    plans._PLANS.clear()
    for ours, known in zip(ops.group_norm(x, 3, weight, weight, EPS), expected, strict=True):
        assert equal_bits(ours, known)
    plans._PLANS.clear()


def test_memory_layout_does_not_show():
    x, weight = drawn((3, 40, 96), torch.bfloat16, 0), drawn((96,), torch.float32, 1)
    expected = ops.layer_norm(x, 1, weight, None, EPS)
    channels = ops.group_norm(x, 8, None, None, EPS)
    for layout in LAYOUTS:
        y = lay_out(x, layout)
        for ours, known in zip(ops.layer_norm(y, 1, lay_out(weight, layout), None, EPS), expected, strict=True):
            assert equal_bits(ours, known), layout
        for ours, known in zip(ops.group_norm(y, 8, None, None, EPS), channels, strict=True):
            assert equal_bits(ours, known), layout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [768, 8192, 50257])
def test_values_are_nearly_as_good_as_torchs(n: int, dtype: torch.dtype):
    x, grad, weight, bias = (drawn(s, dtype, i) for i, s in enumerate(((60, n), (60, n), (n,), (n,))))
    y, mean, rstd = ops.layer_norm(x, 1, weight, bias, EPS)
    dx = ops.layer_norm_backward(grad, x, 1, mean, rstd, weight)
    dw, db = ops.layer_norm_backward_params(grad, x, 1, mean, rstd, dtype)
    found = []
    for wide in (torch.float64, dtype):
        leaves = [t.to(wide).requires_grad_() for t in (x, weight, bias)]
        result = F.layer_norm(leaves[0], (n,), leaves[1], leaves[2], EPS)
        result.backward(grad.to(wide))
        found.append([result.detach(), *(t.grad for t in leaves)])
    for ours, exact, theirs in zip((y, dx, dw, db), *found, strict=True):
        scale = exact.abs().max()
        error, theirs_error = (((t.double() - exact).abs() / scale).max().item() for t in (ours, theirs))
        assert error <= 2 * theirs_error + 2 * torch.finfo(dtype).eps


def test_ops_pass_opcheck():
    x, weight = drawn((3, 4, 40), torch.bfloat16, 0), drawn((40,), torch.float32, 1)
    torch.library.opcheck(ops.layer_norm.default, (x, 1, weight, None, EPS))
    torch.library.opcheck(ops.group_norm.default, (x, 2, None, None, EPS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [128, 4096, 20_000])
def test_rms_norm_has_the_bits_of_the_pair_that_it_replaces(n: int, dtype: torch.dtype):
    """Of the mean square and what the backend's compiler makes of the rest."""
    x, weight = drawn((77, n), dtype, 0), drawn((n,), dtype, 1)

    def rounded_first(x: Tensor, mean: Tensor) -> Tensor:
        return weight * (x.float() * torch.rsqrt(mean + EPS)).to(x.dtype)

    def rounded_last(x: Tensor, mean: Tensor) -> Tensor:
        return (x.float() * torch.rsqrt(mean + EPS) * weight.float()).to(x.dtype)

    mean = ops.mean_square(x, [1], True, torch.float32)
    for first, rest in ((True, rounded_first), (False, rounded_last)):
        ours = ops.rms_norm(x, weight, EPS, first)
        assert equal_bits(ours, torch.compile(rest, backend="batch_invariant")(x, mean))
        assert equal_bits(ops.rms_norm(x[5:6], weight, EPS, first), ours[5:6])
        assert equal_bits(ops.rms_norm(lay_out(x, "strided"), weight, EPS, first), ours)


def test_models_norms_are_fused_and_keep_their_bits():
    x, weight = drawn((40, 512), torch.bfloat16, 0), drawn((512,), torch.bfloat16, 1)

    def norm(x: Tensor) -> Tensor:
        return F.rms_norm(x, (512,), weight, EPS)

    with torch.no_grad():
        compiled = torch.compile(norm, backend="batch_invariant")(x)
    assert equal_bits(compiled, ops.rms_norm(x, weight, EPS, False))
    trained = torch.compile(norm, backend="batch_invariant")(x.clone().requires_grad_())
    assert equal_bits(trained.detach(), compiled)
