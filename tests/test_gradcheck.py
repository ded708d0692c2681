"""Gradients are those of finite differences, in float64 inside ``eager()``: first and second derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bicompile
from bicompile.errors import UnsupportedOpError

# What gradcheck itself computes with.
_CHECKERS = ("aten.allclose", "aten.randn", "aten.rand", "aten.rand_like", "aten.uniform")

Form = tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]
AT = torch.tensor([0, 2, 0, 1])
CLASSES = torch.tensor([0, 2, 1])
HIDDEN = torch.tensor([False, True, False])


def form(fn: Callable[..., Any], *shapes: tuple[int, ...], **kwargs: Any) -> Form:
    """``fn`` of tensors of these shapes."""
    return (lambda *args: fn(*args, **kwargs)) if kwargs else fn, shapes


def _target(x: Tensor) -> Tensor:
    return torch.linspace(0.1, 0.9, x.numel(), dtype=x.dtype).view_as(x)


def _definite(x: Tensor) -> Tensor:
    return x @ x.mT + 2 * torch.eye(x.shape[-1], dtype=x.dtype)


def _grouped(x: Tensor, weights: Tensor) -> Tensor:
    return F.grouped_mm(x, weights, offs=torch.tensor([2, 2, 5], dtype=torch.int32))


def _batch_norm(training: bool) -> Callable[..., Tensor]:
    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        mean, var = torch.tensor([0.5, -1.0], dtype=x.dtype), torch.tensor([2.0, 0.5], dtype=x.dtype)
        return F.batch_norm(x, mean, var, weight, bias, training=training)

    return norm


def _scatter_reduce(reduce: str) -> Form:
    return form(lambda x, y: x.scatter_reduce(1, AT.expand(2, 4), y, reduce), (2, 3), (2, 4))


def _loss(name: str) -> Form:
    return form(lambda x: getattr(F, name)(x, _target(x)), (2, 3))


def _interpolate(mode: str, *spatial: int) -> Form:
    return form(F.interpolate, (1, 1, *spatial), scale_factor=1.7, mode=mode)


def _cross_entropy(x: Tensor) -> tuple[Tensor, Tensor]:
    weight = torch.arange(1.0, 5.0, dtype=x.dtype)
    return F.cross_entropy(x, CLASSES, weight, ignore_index=1), F.cross_entropy(x, CLASSES, label_smoothing=0.1)


FORMS: dict[str, Form] = {
    "mm, transposed": form(lambda a, b: a @ b.mT, (3, 4), (2, 4)),
    "addmm": form(torch.addmm, (2,), (3, 4), (4, 2), beta=0.5, alpha=2),
    "linear": form(F.linear, (2, 3, 4), (5, 4), (5,)),
    "baddbmm": form(torch.baddbmm, (2, 3, 2), (2, 3, 4), (2, 4, 2), beta=0.5, alpha=2),
    "addbmm": form(torch.addbmm, (3, 2), (2, 3, 4), (2, 4, 2)),
    "addmv": form(torch.addmv, (3,), (3, 4), (4,)),
    "dot": form(torch.dot, (4,), (4,)),
    "einsum": form(lambda a, b: torch.einsum("bij,bkj->ik", a, b), (2, 3, 4), (2, 5, 4)),
    "grouped_mm": form(_grouped, (5, 4), (3, 4, 2)),
    "sum and mean": form(lambda x: (x.sum(), x.sum((0, 2)), x.mean(1), x.nansum(1)), (2, 3, 2)),
    "prod": form(lambda x: (x.prod(1), (x * HIDDEN).prod(1)), (2, 3)),
    "extrema": form(lambda x: (x.amax(1), x.amin((0, 2)), x.max(), x.min(1).values, *x.aminmax(dim=0)), (2, 3, 2)),
    "variance": form(lambda x: (x.var(1), x.std((0, 2)), *torch.var_mean(x, 1, correction=0)), (2, 3, 2)),
    "vector norms": form(
        lambda x: tuple(torch.linalg.vector_norm(x, p, 1) for p in (0.5, 1, 2, 3, math.inf, -math.inf)), (2, 3)
    ),
    "logsumexp": form(lambda x: (x.logsumexp(1), x.logsumexp((0, 2))), (2, 3, 2)),
    "cosine_similarity": form(F.cosine_similarity, (2, 4), (2, 4)),
    "softmax": form(lambda x: (x.softmax(1), x.masked_fill(HIDDEN, -math.inf).softmax(-1)), (2, 2, 3)),
    "log_softmax": form(lambda x: x.log_softmax(1), (2, 3, 2)),
    "layer_norm": form(lambda x, w, b: F.layer_norm(x, (2, 3), w, b), (3, 2, 3), (2, 3), (2, 3)),
    "rms_norm": form(lambda x, w: (F.rms_norm(x, (4,), w), F.rms_norm(x, (4,))), (3, 4), (4,)),
    "group_norm": form(lambda x, w, b: F.group_norm(x, 2, w, b), (2, 4, 3), (4,), (4,)),
    "instance_norm": form(F.instance_norm, (2, 2, 4)),
    "batch_norm in training": form(_batch_norm(True), (3, 2, 2), (2,), (2,)),
    "batch_norm in evaluation": form(_batch_norm(False), (3, 2, 2), (2,), (2,)),
    "cumsum": form(lambda x: x.cumsum(1), (2, 4)),
    "cumprod": form(lambda x: (x.cumprod(1), (x * HIDDEN).cumprod(1)), (2, 3)),
    "logcumsumexp": form(lambda x: x.logcumsumexp(1), (2, 4)),
    "cummax": form(lambda x: x.cummax(1).values, (2, 4)),
    "index_add": form(lambda x, y: x.index_add(0, AT, y, alpha=2), (3, 2), (4, 2)),
    "scatter_add": form(lambda x, y: x.scatter_add(1, AT.expand(2, 4), y), (2, 3), (2, 4)),
    **{f"scatter_reduce {name}": _scatter_reduce(name) for name in "sum prod mean amax amin".split()},
    "index_put, accumulating": form(lambda x, y: x.index_put((AT,), y, accumulate=True), (3, 2), (4, 2)),
    "index_put": form(lambda x, y: x.index_put((CLASSES[1:],), y), (3, 2), (2, 2)),
    "scatter": form(lambda x, y: x.scatter(1, CLASSES.expand(2, 3), y), (2, 3), (2, 3)),
    "index_copy": form(lambda x, y: x.index_copy(0, CLASSES[1:], y), (3, 2), (2, 2)),
    "masked_scatter": form(lambda x, y: x.masked_scatter(HIDDEN.expand(2, 3), y), (2, 3), (3,)),
    "embedding": form(lambda w: F.embedding(AT, w), (3, 2)),
    "gather": form(lambda x: (x.gather(1, AT.expand(2, 4)), x[:, AT], x.take(AT), x.index_select(1, AT)), (2, 3)),
    "sort and topk": form(lambda x: (x.sort(1).values, x.topk(2, 1).values), (2, 4)),
    "conv1d": form(F.conv1d, (2, 2, 4), (3, 2, 3), (3,), padding=1),
    "conv2d": form(F.conv2d, (1, 2, 4, 5), (4, 1, 2, 2), (4,), stride=2, dilation=(1, 2), groups=2),
    "conv3d": form(F.conv3d, (1, 1, 2, 3, 2), (2, 1, 2, 2, 1)),
    "conv_transpose1d": form(F.conv_transpose1d, (2, 2, 3), (2, 3, 3), (3,), stride=2, output_padding=1),
    "conv_transpose2d": form(F.conv_transpose2d, (1, 2, 2, 3), (2, 1, 2, 2), groups=2),
    "unfold and fold": form(lambda x: F.fold(F.unfold(x, 2, padding=1), (3, 3), 2, padding=1), (1, 2, 3, 3)),
    "avg_pool": form(lambda x: (F.avg_pool2d(x, (2, 3)), F.avg_pool1d(x[:, 0], 2)), (1, 2, 4, 5)),
    "max_pool": form(lambda x: (F.max_pool2d(x, 2), F.max_pool1d(x[:, 0], 2)), (1, 2, 4, 5)),
    "adaptive_pool": form(lambda x: (F.adaptive_avg_pool2d(x, 3), F.adaptive_max_pool2d(x, 3)), (1, 1, 4, 5)),
    "lp_pool": form(lambda x: F.lp_pool1d(x, 2.0, 2), (1, 2, 4)),
    "interpolate nearest": _interpolate("nearest", 2, 3),
    "interpolate linear": _interpolate("linear", 4),
    "interpolate bilinear": _interpolate("bilinear", 2, 3),
    "interpolate bicubic": _interpolate("bicubic", 2, 3),
    "cross_entropy": form(_cross_entropy, (3, 4)),
    "cross_entropy of probabilities": form(lambda x, p: F.cross_entropy(x, p.softmax(1)), (3, 4), (3, 4)),
    "nll_loss": form(lambda x: F.nll_loss(x, CLASSES), (3, 4)),
    **{name: _loss(name) for name in "l1_loss mse_loss huber_loss binary_cross_entropy_with_logits".split()},
    "kl_div": form(lambda x: F.kl_div(x.log_softmax(1), _target(x), reduction="batchmean"), (2, 3)),
    "triplet_margin_loss": form(F.triplet_margin_loss, (2, 3), (2, 3), (2, 3)),
    "elementwise": form(
        lambda x: (x.exp(), x.tanh(), x.erf(), F.gelu(x), F.silu(x), F.softplus(x), x.sin(), x.sigmoid()), (2, 3)
    ),
    "powers": form(lambda x, y: (x.exp().pow(y), x.exp().log(), x.exp().rsqrt(), torch.logaddexp(x, y)), (3,), (3,)),
    # Of matrices in either layout: PyTorch's gradients take their factors for those of the transpose, or not.
    "det": form(lambda x: (torch.det(x), torch.linalg.det(x.mT)), (2, 3, 3)),
    "slogdet": form(lambda x: (torch.slogdet(x)[1], torch.linalg.slogdet(x.mT)[1]), (2, 3, 3)),
    "solve": form(lambda a, b: (torch.linalg.solve(a, b), torch.linalg.solve(a.mT, b)), (2, 3, 3), (2, 3, 1)),
    "factors": form(lambda x: (torch.linalg.cholesky(_definite(x)), torch.linalg.inv(x.mT)), (2, 3, 3)),
    "eigenvalues": form(lambda x: (torch.linalg.eigvalsh(_definite(x)), torch.linalg.svdvals(x)), (2, 3, 3)),
    "bilinear": form(F.bilinear, (2, 3), (2, 4), (2, 3, 4), (2,)),
    "resizing with antialiasing": form(
        lambda x: F.interpolate(x, size=(2, 3), mode="bilinear", antialias=True), (1, 2, 4, 5)
    ),
    "erfinv": form(lambda x: torch.erfinv(x.tanh()), (2, 3)),
    "complex products": form(
        lambda x, y: torch.view_as_real(torch.view_as_complex(x) * torch.view_as_complex(y)), (2, 3, 2), (3, 2)
    ),
    "rfft": form(lambda x: torch.view_as_real(torch.fft.rfft(x)), (2, 5)),
}


# Of these PyTorch itself has no second derivative.
ONCE: dict[str, Form] = {
    "distances": form(lambda x, y: (torch.cdist(x, y), torch.cdist(x, y, 3.0), F.pdist(x)), (3, 4), (2, 4)),
    "embedding_bag": form(lambda w: [F.embedding_bag(AT[None], w, mode=m) for m in ("sum", "mean", "max")], (3, 4)),
}


def leaves_of(shapes: tuple[tuple[int, ...], ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("name", FORMS)
def test_first_and_second_derivatives_are_those_of_finite_differences(name: str):
    fn, shapes = FORMS[name]
    with bicompile.eager(allow=_CHECKERS):
        assert torch.autograd.gradcheck(fn, leaves_of(shapes), fast_mode=True)
        assert torch.autograd.gradgradcheck(fn, leaves_of(shapes), fast_mode=True)


@pytest.mark.parametrize("name", ONCE)
def test_first_derivatives_are_those_of_finite_differences(name: str):
    fn, shapes = ONCE[name]
    with bicompile.eager(allow=_CHECKERS):
        assert torch.autograd.gradcheck(fn, leaves_of(shapes), fast_mode=True)


def test_second_derivative_of_attention_is_refused():
    """As PyTorch's fused attention has none.  Its first derivative: tests/test_attention_function.py."""
    q = leaves_of(((1, 2, 3, 4),))[0]
    with bicompile.eager():
        (gradient,) = torch.autograd.grad(F.scaled_dot_product_attention(q, q, q).square().sum(), q, create_graph=True)
        with pytest.raises(UnsupportedOpError, match=r"sdpa_backward.*second derivative.*softmax"):
            gradient.sum().backward()


# Errors of gradients, in the dtypes that models have.

SEEDS = range(12)
EMBEDDED = torch.arange(300) % 7


def _batch_norm_in_training(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, weight, bias, training=True)


ERRORS: dict[str, Form] = {
    "linear": form(F.linear, (300, 210), (64, 210), (64,)),
    "bmm": form(torch.bmm, (2, 40, 210), (2, 210, 30)),
    "conv_transpose2d": form(F.conv_transpose2d, (4, 24, 8, 8), (24, 16, 3, 3), (16,), stride=2),
    "layer_norm": form(lambda x, w, b: F.layer_norm(x, (210,), w, b), (300, 210), (210,), (210,)),
    "rms_norm": form(lambda x, w: F.rms_norm(x, (210,), w, 1e-6), (300, 210), (210,)),
    "group_norm": form(lambda x, w, b: F.group_norm(x, 4, w, b), (5, 16, 50), (16,), (16,)),
    "batch_norm": form(_batch_norm_in_training, (5, 16, 50), (16,), (16,)),
    "batch_norm, long channels": form(_batch_norm_in_training, (16, 8, 256), (8,), (8,)),
    "softmax": form(lambda x: x.softmax(-1), (40, 210)),
    "log_softmax": form(lambda x: x.log_softmax(-1), (40, 210)),
    "logsumexp": form(lambda x: x.logsumexp(-1), (40, 210)),
    "mean": form(lambda x: x.mean(-1), (40, 210)),
    "var": form(lambda x: x.var(-1), (40, 210)),
    "vector_norm": form(lambda x: torch.linalg.vector_norm(x, 3, -1), (40, 210)),
    "cumsum": form(lambda x: x.cumsum(-1), (40, 210)),
    "logcumsumexp": form(lambda x: x.logcumsumexp(-1), (40, 210)),
    "embedding": form(lambda w: F.embedding(EMBEDDED, w), (7, 30)),
    "interpolate bilinear": form(F.interpolate, (2, 3, 9, 11), scale_factor=2.3, mode="bilinear"),
    "gelu": form(F.gelu, (40, 210)),
}


def gradients_of(fn: Callable[..., Tensor], leaves: list[Tensor], incoming: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The gradients of all ``leaves`` in ``dtype``, for the gradient ``incoming`` of the result."""
    leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
    return list(torch.autograd.grad(fn(*leaves), leaves, incoming.to(dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ERRORS)
def test_errors_of_gradients_are_not_above_stocks(name: str, dtype: torch.dtype):
    """Against float64, over many draws; up to a tenth more, for the errors of two orders scatter, and stock's orders
    follow the processor.

    The most is 1.04, of the weight of ``linear``: a sum over 300 rows, for us a chain of 192 and one of 108, for MKL
    two of 150.  Squared errors of chains are as the squares of their lengths: sqrt((192**2 + 108**2) / (2 * 150**2)).
    """
    fn, shapes = ERRORS[name]
    ours, stock = [0.0] * len(shapes), [0.0] * len(shapes)
    for seed in SEEDS:
        leaves = [leaf.to(dtype) for leaf in leaves_of(shapes, seed)]
        (incoming,) = leaves_of((fn(*leaves).shape,), seed + 100)
        given = fn, leaves, incoming.to(dtype)
        exact, theirs = gradients_of(*given, torch.float64), gradients_of(*given, dtype)
        with bicompile.eager():
            mine = gradients_of(*given, dtype)
        for i, truth in enumerate(exact):
            ours[i] += (mine[i].double() - truth).norm().item()
            stock[i] += (theirs[i].double() - truth).norm().item()
    assert all(a <= 1.1 * b for a, b in zip(ours, stock, strict=True)), (ours, stock)
