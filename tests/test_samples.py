"""Linear algebra and Fourier transforms, one sample at a time: neighbours, layout and threads do not show."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import bicompile
from bicompile.errors import BatchInvarianceError
from bicompile.lowering.samples.op import OPS
from bicompile.testing import assert_batch_invariant, same_bits

SIZE = 37  # blocked algorithms, and a tail
SITUATIONS = ("again", "alone", "permuted", "nan", "offset", "strided", "transposed")


def definite(x: Tensor) -> Tensor:
    return x @ x.mT + SIZE * torch.eye(SIZE, dtype=x.dtype)


FUNCTIONS: dict[str, Callable[[Tensor], object]] = {
    "inverse": lambda x: torch.linalg.inv(x),
    "solve": lambda x: torch.linalg.solve(x, x.mT),
    "solve one vector": lambda x: torch.linalg.solve(x, x[..., 0]),
    "determinant": lambda x: torch.linalg.slogdet(x),
    "cholesky": lambda x: torch.linalg.cholesky(definite(x)),
    "cholesky solve": lambda x: torch.cholesky_solve(x, definite(x)),
    "eigenvalues": lambda x: torch.linalg.eigvalsh(x + x.mT),
    "singular values": lambda x: torch.linalg.svdvals(x),
    "qr": lambda x: torch.linalg.qr(x),
    "exponential": lambda x: torch.linalg.matrix_exp(x / SIZE),
    "spectrum": lambda x: torch.view_as_real(torch.fft.rfft(x)),
    "spectrum and back": lambda x: torch.fft.irfft(torch.fft.rfft(x), n=SIZE),
    "spectrum of two dims": lambda x: torch.view_as_real(torch.fft.fft2(x)),
    "spectrum of a dim before": lambda x: torch.view_as_real(torch.fft.rfft(x, dim=1)),
}


def covered(fn: Callable[[Tensor], object]) -> Callable[[Tensor], object]:
    def run(x: Tensor) -> object:
        with bicompile.eager():
            return fn(x)

    return run


@pytest.mark.parametrize("name", FUNCTIONS)
def test_sample_has_the_same_bits_in_any_batch(name: str):
    x = torch.randn(5, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    situations = [s for s in SITUATIONS if s != "nan" or name.startswith("spectrum")]  # LAPACK refuses NaN
    assert_batch_invariant(covered(FUNCTIONS[name]), x, situations=situations)
    torch.testing.assert_close(covered(FUNCTIONS[name])(x), FUNCTIONS[name](x), rtol=1e-3, atol=1e-3)


def test_the_same_check_catches_stock_pytorch():
    x = torch.randn(5, SIZE, SIZE, generator=torch.Generator().manual_seed(0))

    def varies(fn: Callable[[Tensor], object]) -> bool:
        try:
            assert_batch_invariant(fn, x, situations=("alone", "permuted"))
        except BatchInvarianceError:
            return True
        return False

    assert any(varies(fn) for fn in FUNCTIONS.values())


def test_number_of_threads_does_not_show():
    x, threads = torch.randn(2, 200, 200), torch.get_num_threads()
    many = [covered(fn)(x) for fn in (torch.linalg.inv, torch.linalg.svdvals, torch.fft.rfft)]
    try:
        torch.set_num_threads(1)
        assert same_bits([covered(fn)(x) for fn in (torch.linalg.inv, torch.linalg.svdvals, torch.fft.rfft)], many)
    finally:
        torch.set_num_threads(threads)
    assert torch.get_num_threads() == threads


def test_compiled_code_has_the_bits_of_eager_code_and_gradients():
    def fn(x: Tensor) -> Tensor:
        same = torch.fft.irfft(torch.fft.rfft(x), n=SIZE)
        return torch.linalg.solve(definite(x), x).sum(-1) + same.sum(-1)

    x = torch.randn(3, SIZE, SIZE, requires_grad=True)
    compiled = torch.compile(fn, backend="batch_invariant", fullgraph=True)
    y = compiled(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    with bicompile.eager():
        assert same_bits(fn(x.detach()), y.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(fn(x).sum(), x)[0], rtol=1e-3, atol=1e-3)
    certificate = bicompile.explain(fn, x)
    assert certificate.ok
    assert {"bicompile._linalg_solve_ex.default", "bicompile._fft_r2c.default"} <= {n.op for n in certificate.lowered}


class FourierMixing(torch.nn.Module):
    """What FNet has in attention's place."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = torch.nn.LayerNorm(48), torch.nn.Linear(48, 96)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.norm(x + torch.fft.fft(torch.fft.fft(x, dim=-1), dim=-2).real))


def test_rows_of_a_fourier_mixing_layer_keep_their_bits_compiled():
    torch.manual_seed(0)
    compiled = torch.compile(FourierMixing(), backend="batch_invariant", fullgraph=True)
    x = torch.randn(4, 21, 48)
    assert_batch_invariant(compiled, x, check_input_grad=True, situations=("again", "alone", "permuted", "nan"))


def test_shapes_and_strides_are_those_that_a_graph_expects():
    """A graph is traced on tensors without data; PyTorch's own strides of an SVD are others."""
    for shape in ((2, 4, 4), (4, 4), (0, 4, 4), (2, 3, 4, 4)):
        x = torch.randn(shape)
        for fn in (torch.linalg.inv, torch.linalg.qr, torch.linalg.svd, torch.fft.rfft, torch.linalg.slogdet):
            with bicompile.eager():
                ours = fn(x)
            traced = fn(x.to("meta"))
            pairs = [(ours, traced)] if isinstance(ours, Tensor) else zip(ours, traced, strict=True)
            assert all((a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype) for a, b in pairs), fn


@pytest.mark.parametrize(
    ("fn", "shape", "is_crossed"),
    [
        (torch.linalg.svdvals, (5, 3), True),
        (torch.linalg.svdvals, (5, 4, 3), False),
        (lambda x: torch.view_as_real(torch.fft.rfft(x, dim=0)), (5, 8), True),
        (lambda x: torch.view_as_real(torch.fft.rfft(x, dim=1)), (5, 8), False),
        (lambda x: torch.linalg.solve(torch.eye(3) + 1, x.t()), (5, 3), True),
        (lambda x: torch.linalg.solve(x, x[..., 0]), (5, 3, 3), False),
    ],
    ids=["svd of the batch", "svd", "fft over the batch", "fft", "right-hand sides", "vectors"],
)
def test_certificate_tells_whether_a_sample_holds_rows_of_the_batch(fn, shape: tuple[int, ...], is_crossed: bool):
    certificate = bicompile.explain(fn, torch.randn(shape))
    assert certificate.ok and bool(certificate.cross_batch) == is_crossed
    assert bool(certificate.lowered) != is_crossed


def test_every_op_has_the_schema_of_atens():
    for name in OPS:
        ours, aten = (getattr(getattr(torch.ops, library), name).default for library in ("bicompile", "aten"))
        assert str(ours._schema).partition("::")[2] == str(aten._schema).partition("::")[2]
