"""Cross entropy, which keeps two statistics of each row instead of the log-softmax of all classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from test_reduction import DTYPES, tensors
from torch import Tensor

import bicompile
from bicompile.lowering.reduction.reference import canonical
from bicompile.lowering.softmax import reference
from bicompile.testing import same_bits

ops = torch.ops.bicompile
FORMS: tuple[dict[str, Any], ...] = (
    {},
    {"reduction": "none"},
    {"reduction": "sum", "weight": torch.linspace(0.2, 1.4, 97)},
    {"weight": torch.linspace(0.2, 1.4, 97), "ignore_index": 5},
)


def scores_and_classes(num_rows: int, dtype: torch.dtype, *more: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(num_rows, 97, *more, generator=g) * 4).to(dtype)
    target = torch.randint(0, 97, (num_rows, *more), generator=g)
    target[1], target[2] = -100, 5
    return x, target


def in_eager(*args: Any, **kwargs: Any) -> Tensor:
    with bicompile.eager():
        return F.cross_entropy(*args, **kwargs)


def value_and_gradient(fn: Any, x: Tensor, target: Tensor, **form: Any) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    loss = fn(x, target, **form)
    (gradient,) = torch.autograd.grad(loss, x, torch.ones_like(loss))
    return loss.detach(), gradient


@given(x=tensors(), data=st.data())
def test_statistics_have_the_bits_of_their_reference_and_of_log_softmax(x: Tensor, data: st.DataObject):
    if not x.dim():
        x = x.reshape(1)
    dim = data.draw(st.integers(-x.dim(), x.dim() - 1), label="dim")
    shift, log_total = ops.softmax_statistics(x, dim)
    if x.numel():
        assert same_bits((shift, log_total), reference.softmax_statistics(x, dim))
    whole = ops.softmax(x, dim, True, shift.dtype)
    assert same_bits(canonical((x.to(shift.dtype) - shift.unsqueeze(dim)) - log_total.unsqueeze(dim)), whole)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(form) or "mean")
@pytest.mark.parametrize("more", [(), (2, 3)])
def test_values_and_gradients_are_stocks(form: dict[str, Any], more: tuple[int, ...]):
    for dtype in DTYPES:
        x, target = scores_and_classes(9, dtype, *more)
        if "ignore_index" in form:
            target = target.where(target >= 0, 5)
        form = {name: v.to(dtype) if isinstance(v, Tensor) else v for name, v in form.items()}
        loss, gradient = value_and_gradient(in_eager, x, target, **form)
        wide = {name: v.double() if isinstance(v, Tensor) else v for name, v in form.items()}
        exact_loss, exact_gradient = value_and_gradient(F.cross_entropy, x.double(), target, **wide)
        stock_loss, stock_gradient = value_and_gradient(F.cross_entropy, x, target, **form)
        eps = 1e-14 if dtype == torch.float64 else torch.finfo(dtype).eps  # stock is then what is taken for exact
        for ours, stock, exact in ((loss, stock_loss, exact_loss), (gradient, stock_gradient, exact_gradient)):
            assert ours.dtype == dtype and ours.shape == exact.shape
            scale = exact.abs().max()
            error, theirs = ((t.double() - exact).abs().max() / scale for t in (ours, stock))
            assert error <= 2 * theirs + 2 * eps


def test_second_derivatives_are_right():
    x, target = scores_and_classes(3, torch.float64)
    x = x[:, :7].contiguous().requires_grad_()
    target = torch.tensor([3, -100, 5])
    seed = torch.ones((), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: in_eager(x, target), x)
    assert torch.autograd.gradgradcheck(lambda x: in_eager(x, target), x, grad_outputs=seed)


def test_what_is_not_plain_keeps_pytorchs_own_form():
    x, target = scores_and_classes(9, torch.float32)
    for form in ({"label_smoothing": 0.1}, {}):
        classes = target if form else torch.softmax(x.flip(0), 1)
        torch.testing.assert_close(in_eager(x, classes, **form), F.cross_entropy(x, classes, **form))
    with pytest.raises((ValueError, RuntimeError), match="target|batch_size"):
        in_eager(x, target[:4])


def test_vmap_gives_the_gradient_of_each_sample():
    x, target = scores_and_classes(4, torch.float32)
    target[1] = 7
    of_one = torch.func.grad(lambda x, t: F.cross_entropy(x, t))
    with bicompile.eager():
        ours = torch.func.vmap(of_one)(x, target)
    torch.testing.assert_close(ours, torch.func.vmap(of_one)(x, target))


@pytest.fixture
def head() -> Any:
    """Scores of a vocabulary as transformers' models make them, and their loss."""
    weight = torch.randn(97, 16, generator=torch.Generator().manual_seed(1)).bfloat16()

    def losses(hidden: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy((hidden @ weight.T).float(), target, reduction="none")

    return losses


def test_compiled_code_has_eagers_bits_and_rows_keep_theirs(head: Any):
    _, target = scores_and_classes(9, torch.bfloat16)
    hidden = torch.randn(9, 16, generator=torch.Generator().manual_seed(2)).bfloat16()
    compiled = torch.compile(head, backend="batch_invariant", dynamic=True)
    with bicompile.eager():
        loss, gradient = value_and_gradient(head, hidden, target)
        for rows in ([4], [0, 1, 2], [8, 3, 5, 3, 0, 1, 7]):
            assert same_bits(value_and_gradient(head, hidden[rows], target[rows]), (loss[rows], gradient[rows]))
    assert same_bits(value_and_gradient(compiled, hidden, target), (loss, gradient))
    assert same_bits(value_and_gradient(compiled, hidden[:4], target[:4]), (loss[:4], gradient[:4]))


def test_neither_log_softmax_nor_wide_scores_are_kept(head: Any):
    _, target = scores_and_classes(9, torch.bfloat16)
    hidden = torch.randn(9, 16, generator=torch.Generator().manual_seed(2)).bfloat16().requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        torch.compile(head, backend="batch_invariant")(hidden, target).sum().backward()
    of_all_classes = [t.dtype for t in kept if t.shape == (9, 97)]
    assert of_all_classes in ([], [torch.bfloat16])
    certificate = bicompile.explain(head, hidden, target)
    statistics = [node for node in certificate.lowered if node.op == "bicompile.softmax_statistics.default"]
    assert [node.operand for node in statistics] == ["bfloat16"]  # not what .float() made of it
    assert not any(node.op.startswith("bicompile.softmax.") for node in certificate.nodes)
