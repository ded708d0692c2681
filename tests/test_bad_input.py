"""Input that no lowering is for: a clear error or the right result, never a silent fallback."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bicompile.errors import OptionError, UnsupportedOpError
from bicompile.testing import assert_batch_invariant, same_bits


def compiled(fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return torch.compile(fn, backend="batch_invariant", fullgraph=True, **options)


def rows(num_rows: int = 3, columns: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, columns, generator=torch.Generator().manual_seed(seed))


# Refused by name: op, user's line, what to do.

UNSUPPORTED = {
    "pseudoinverse": (lambda x: torch.linalg.pinv(x), "pinv"),
    "complex numbers": (lambda x: torch.fft.rfft(x).abs(), "abs"),
    "mode": (lambda x: x.mode(1).values, "mode"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_an_unsupported_reduction_is_refused_by_name(name: str):
    fn, op = UNSUPPORTED[name]
    with pytest.raises(UnsupportedOpError, match=op) as caught:
        compiled(fn)(rows())
    message = str(caught.value)
    assert "test_bad_input.py" in message, "the user's line is missing"
    assert "allow" in message, "the way out is missing"


def test_a_refused_op_may_be_allowed_by_name():
    x = rows()

    def fn(x: Tensor) -> Tensor:
        return torch.linalg.pinv(x) * 2.0

    allowed = compiled(fn, options={"allow": ["aten.linalg_pinv"]})
    torch.testing.assert_close(allowed(x), fn(x))


def test_a_refused_op_may_be_warned_about():
    x = rows()
    warned = compiled(lambda x: torch.linalg.pinv(x), options={"on_refused": "warn"})
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.testing.assert_close(warned(x), torch.linalg.pinv(x))
    assert any("linalg_pinv" in str(w.message) for w in seen)


def test_unknown_options_are_refused_with_the_nearest_name():
    with pytest.raises(OptionError, match="allow"):
        compiled(torch.abs, options={"alow": []})(rows())


# Right or refused.


def right_or_refused(fn: Callable[..., Any], *args: Any, invariant: bool = True) -> None:
    """``fn`` compiled gives eager's values, and invariant rows; or it raises an ``UnsupportedOpError``."""
    expected = fn(*args)
    try:
        got = compiled(fn)(*args)
    except UnsupportedOpError as error:
        assert "allow" in str(error)
        return
    torch.testing.assert_close(got, expected)
    if invariant:
        assert_batch_invariant(compiled(fn), *args, situations=["again", "permuted", "alone"])


COMPLEX = {
    "linear": lambda x: x @ torch.ones(8, 3, dtype=x.dtype),
    "sum": lambda x: x.sum(-1),
    "mean": lambda x: x.mean(-1),
    "norm": lambda x: torch.linalg.vector_norm(x, dim=-1),
    "cumsum": lambda x: x.cumsum(-1),
    "product": lambda x: x * x.conj(),
    "exp": lambda x: x.exp(),
    "absolute value": lambda x: x.abs(),
}


@pytest.mark.parametrize("name", COMPLEX)
def test_complex_numbers_are_right_or_refused(name: str):
    right_or_refused(COMPLEX[name], torch.complex(rows(), rows().flip(0)))


@pytest.mark.parametrize("name", ["linear", "sum", "mean", "cumsum"])
def test_integers_are_right_or_refused(name: str):
    fn = COMPLEX[name] if name != "mean" else lambda x: x.mean(-1, dtype=torch.float32)
    right_or_refused(fn, (rows() * 10).long())


def test_booleans_are_counted():
    mask = rows() > 0
    assert same_bits(compiled(lambda m: m.sum(-1))(mask), mask.sum(-1))


# Mistakes of the caller.


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x @ torch.ones(8, 3, dtype=torch.bfloat16),
        lambda x: F.linear(x, torch.ones(3, 8, dtype=torch.float64)),
        lambda x: torch.bmm(x[None], torch.ones(1, 8, 3, dtype=torch.float16)),
    ],
    ids=["matmul", "linear", "bmm"],
)
def test_mixed_dtypes_are_refused(fn: Callable[[Tensor], Tensor]):
    with pytest.raises(Exception, match=r"(?i)dtype|same type|float|half"):
        compiled(fn)(rows())


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x @ torch.ones(7, 3),
        lambda x: F.linear(x, torch.ones(3, 9)),
        lambda x: torch.bmm(x[None], torch.ones(2, 8, 3)),
        lambda x: F.layer_norm(x, (7,)),
        lambda x: F.scaled_dot_product_attention(x[None], x[None], torch.ones(1, 4, 8)),
    ],
    ids=["matmul", "linear", "bmm", "layer_norm", "attention"],
)
def test_shapes_that_do_not_match_are_refused(fn: Callable[[Tensor], Tensor]):
    with pytest.raises(Exception, match=r"(?i)shape|size|dimension|expected|match"):
        compiled(fn)(rows())


def test_meta_tensors_give_meta_tensors_or_an_error():
    def fn(x: Tensor) -> Tensor:
        return F.softmax(x @ x.T, dim=-1)

    try:
        y = compiled(fn)(rows().to("meta"))
    except UnsupportedOpError as error:
        assert "meta" in str(error)
    else:
        assert y.device.type == "meta" and y.shape == (3, 3)


def test_a_sparse_tensor_is_right_or_refused():
    dense = torch.ones(8, 3)
    x = torch.where(rows() > 0, rows(), 0.0)
    expected = x @ dense
    try:
        got = torch.compile(lambda s: torch.sparse.mm(s, dense), backend="batch_invariant", fullgraph=True)(
            x.to_sparse()
        )
    except Exception as error:
        assert "sparse" in str(error).lower()
    else:
        torch.testing.assert_close(got, expected)


def test_random_numbers_are_refused():
    with pytest.raises(UnsupportedOpError, match="random"):
        compiled(lambda x: x + torch.rand_like(x))(rows())


# Autocast: outside and inside the compiled function.


def _attend(x: Tensor) -> Tensor:
    q = F.linear(x, torch.ones(8, 8) / 3).unflatten(-1, (2, 4)).transpose(-2, -3)
    return F.layer_norm(F.scaled_dot_product_attention(q, q, q).transpose(-2, -3).flatten(-2), (8,))


def _attend_inside(x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return _attend(x)


def test_autocast_around_a_compiled_function_is_followed():
    fn = compiled(lambda x: F.linear(x, torch.ones(5, 8) / 3) * 2)
    x = rows(4)
    full = fn(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fn(x).dtype == torch.bfloat16
        assert_batch_invariant(fn, x, situations=["again", "permuted", "nan", "alone"])
    assert same_bits(fn(x), full)


def test_autocast_inside_a_compiled_function_is_followed():
    x = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))
    fn = compiled(_attend_inside)
    torch.testing.assert_close(fn(x), _attend_inside(x), atol=0.05, rtol=0.05)
    assert fn(x).dtype == _attend_inside(x).dtype
    assert_batch_invariant(fn, x, situations=["again", "permuted", "nan", "alone"])


# Sizes at the edge.


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (1, 1), (0, 0)])
def test_empty_batches_and_rows_are_computed(shape: tuple[int, int]):
    def fn(x: Tensor) -> tuple[Tensor, ...]:
        return x @ torch.ones(x.shape[1], 3), x.sum(-1), F.softmax(x, -1), x.cumsum(-1)

    x = torch.ones(shape)
    torch.testing.assert_close(compiled(fn)(x), fn(x))


def test_too_many_shapes_raise_instead_of_running_eager():
    fn = torch.compile(lambda x: x.sum(-1), backend="batch_invariant", dynamic=False)
    with pytest.raises(Exception, match="(?i)recompile"):
        for n in range(1, 40):
            fn(rows(n))
