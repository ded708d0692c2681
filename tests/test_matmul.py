"""The matmul family on the CPU: the bits of its order, in every batch, layout, thread count and instruction set."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import bicompile.lowering.matmul.op  # noqa: F401  registers the ops
from bicompile.lowering.matmul import reference
from bicompile.lowering.matmul.order import order_for
from bicompile.testing import LAYOUTS, lay_out, same_bits

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KINDS = ("normal", "binades", "cancelling", "tiny", "special")
# Rows, k, columns: one tile and several, one block and several, odd k, ragged tails everywhere.
SHAPES = (
    *((1, 1, 1), (3, 17, 5), (1, 193, 70), (6, 191, 64), (7, 385, 33), (15, 192, 40), (29, 200, 97), (2, 576, 128)),
    *((520, 385, 41), (4097, 20, 35)),  # several tiles of rows; the last one a single row
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the CPU kernels are built on Linux")


def mm(a: Tensor, b: Tensor) -> Tensor:
    return torch.ops.bicompile.mm(a, b)


def bmm(a: Tensor, b: Tensor) -> Tensor:
    return torch.ops.bicompile.bmm(a, b)


def addmm(c: Tensor, a: Tensor, b: Tensor, beta: float = 1.0, alpha: float = 1.0) -> Tensor:
    return torch.ops.bicompile.addmm(c, a, b, beta, alpha)


def baddbmm(c: Tensor, a: Tensor, b: Tensor, beta: float = 1.0, alpha: float = 1.0) -> Tensor:
    return torch.ops.bicompile.baddbmm(c, a, b, beta, alpha)


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int, kind: str = "binades") -> Tensor:
    """Entries made to expose an order: over many binades, cancelling, around the smallest numbers, not finite."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    exponents = torch.randint(-12, 12, shape, generator=generator).double()
    if kind == "binades":
        x = x * 2.0**exponents
    elif kind == "cancelling":
        half = x[..., : shape[-1] // 2] * 2.0 ** exponents[..., : shape[-1] // 2]
        x[..., : half.shape[-1]], x[..., shape[-1] - half.shape[-1] :] = half, -half.flip(-1)
    elif kind == "tiny":
        # Squares of these lie around the smallest normal and denormal numbers of the accumulator.
        x = x * 2.0 ** (exponents / 3 - (510 if dtype == torch.float64 else 63))
    elif kind == "special":
        finfo = torch.finfo(dtype)
        odd = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, finfo.max, -finfo.max, finfo.tiny / 8])
        where = torch.rand(shape, generator=generator) < 0.01
        x = torch.where(where, odd[torch.randint(0, 8, shape, generator=generator)].double(), x)
    return x.to(dtype)


def canonical(x: Tensor) -> Tensor:
    """``x`` with one NaN: an addition in torch may give any."""
    return torch.where(x.isnan(), torch.nan, x)


def test_order_sees_one_output_only():
    assert list(inspect.signature(order_for).parameters) == ["length", "dtype"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_mm_has_the_bits_of_its_order(shape: tuple[int, int, int], kind: str, dtype: torch.dtype):
    m, k, n = shape
    if dtype == torch.float64:
        m, n = min(m, 7), min(n, 17)  # the reference counts in fractions
    a, b = values((m, k), dtype, 1, kind), values((n, k), dtype, 2, kind).t()
    assert same_bits(mm(a, b), reference.mm(a, b))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beta, alpha", [(1.0, 1.0), (0.3, 1.0), (1.0, -0.7), (0.0, 1.3), (2.5, 0.1)])
def test_addmm_has_the_bits_of_its_order(dtype: torch.dtype, beta: float, alpha: float):
    a, b, c = values((5, 201), dtype, 1), values((201, 17), dtype, 2), values((17,), dtype, 3)
    assert same_bits(addmm(c, a, b, beta, alpha), reference.addmm(c, a, b, beta, alpha))
    a, b, c = values((2, 3, 33), dtype, 1), values((2, 33, 18), dtype, 2), values((2, 1, 18), dtype, 3)
    assert same_bits(baddbmm(c, a, b, beta, alpha), reference.baddbmm(c, a, b, beta, alpha))


@pytest.mark.parametrize("dtype", DTYPES)
def test_denormal_outputs_and_addends_survive(dtype: torch.dtype):
    tiny = torch.finfo(dtype).tiny
    c = torch.full((2, 3), tiny / 4, dtype=dtype)
    zero = torch.zeros(2, 2, dtype=dtype)
    assert same_bits(addmm(c, zero, torch.zeros(2, 3, dtype=dtype)), c)
    if dtype != torch.bfloat16:  # whose order takes denormal numbers as zero
        a = torch.tensor([[tiny / 2]], dtype=dtype)
        assert same_bits(mm(a, torch.tensor([[0.5]], dtype=dtype)), a / 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ("binades", "special"))
@pytest.mark.parametrize("m, k, n", [(1, 576, 200), (4, 200, 64), (37, 450, 130), (300, 64, 65)])
def test_addmm_is_mm_and_a_sum(m: int, k: int, n: int, kind: str, dtype: torch.dtype):
    a, b, full = values((m, k), dtype, 1, kind), values((k, n), dtype, 2, kind), values((m, n), dtype, 3, kind)
    product = mm(a, b)
    for c in (full, full[0], full[:, :1], full[:1, :1], full.t().contiguous().t(), full[0, 0]):
        assert same_bits(addmm(c, a, b), canonical(product + c))
    assert same_bits(addmm(torch.full_like(full, torch.nan), a, b, 0.0, 1.0), product)
    scaled = canonical(product * 0.7 + full * -0.3)
    assert same_bits(addmm(full, a, b, -0.3, 0.7), scaled)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch, m, k, n", [(1, 5, 70, 20), (3, 1, 193, 40), (9, 33, 40, 70), (2, 400, 30, 33)])
def test_bmm_is_mm_of_each(batch: int, m: int, k: int, n: int, dtype: torch.dtype):
    a, b, c = values((batch, m, k), dtype, 1), values((batch, k, n), dtype, 2), values((batch, m, n), dtype, 3)
    whole, added = bmm(a, b), baddbmm(c, a, b)
    assert same_bits(whole, torch.stack([mm(x, y) for x, y in zip(a, b, strict=True)]))
    assert same_bits(added, whole + c)
    assert same_bits(bmm(a[:1].expand(batch, m, k), b)[-1], mm(a[0], b[-1]))


@given(
    shape=st.tuples(st.sampled_from([2, 7, 16, 33, 70, 300]), st.sampled_from([1, 50, 193, 500]), st.integers(1, 140)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
    transposed=st.booleans(),
    data=st.data(),
)
def test_row_has_same_bits_in_any_batch(shape, dtype, seed, transposed, data):
    m, k, n = shape
    a, b = values((m, k), dtype, seed), values((k, n), dtype, seed + 1)
    if transposed:
        b = b.t().contiguous().t()
    row = data.draw(st.integers(0, m - 1), label="row")
    whole = mm(a, b)
    assert same_bits(mm(a[row : row + 1], b)[0], whole[row])  # alone
    order = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
    assert same_bits(mm(a[order], b), whole[order])  # reordered
    poisoned = torch.full_like(a, torch.nan)
    poisoned[row] = a[row]
    assert same_bits(mm(poisoned, b)[row], whole[row])  # among NaNs
    few = data.draw(st.integers(1, n), label="columns")
    assert same_bits(mm(a, b[:, :few]), whole[:, :few])  # with fewer columns
    assert same_bits(mm(a, b), whole)  # again


@given(
    m=st.sampled_from([1, 3, 20, 40, 300]),
    n=st.sampled_from([1, 20, 64, 150]),
    k=st.sampled_from([1, 33, 200]),
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    turned=st.tuples(st.booleans(), st.booleans()),
)
def test_layout_and_alignment_do_not_show(m, n, k, dtype, layouts, turned):
    a, b = values((m, k), dtype, 1), values((k, n), dtype, 2)
    moved = []
    for x, layout, turn in zip((a, b), layouts, turned, strict=True):
        moved.append(lay_out(x.t(), layout).t() if turn else lay_out(x, layout))
    assert same_bits(mm(*moved), mm(a, b))


@pytest.mark.parametrize("dtype", DTYPES)
def test_expanded_operands_work(dtype: torch.dtype):
    a, b = values((1, 300), dtype, 1), values((300, 1), dtype, 2)
    expected = mm(a, b).expand(9, 50)
    assert same_bits(mm(a.expand(9, 300), b.expand(300, 50)), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m, k, n", [(0, 4, 5), (3, 0, 5), (3, 4, 0), (0, 0, 0), (600, 0, 40)])
def test_empty_sizes_work(m: int, k: int, n: int, dtype: torch.dtype):
    a, b, c = torch.ones(m, k, dtype=dtype), torch.ones(k, n, dtype=dtype), torch.ones(n, dtype=dtype)
    expected = torch.zeros(m, n, dtype=dtype) + k
    assert same_bits(mm(a, b), expected)
    assert same_bits(addmm(c, a, b), expected + 1)
    assert bmm(a.expand(0, m, k), b.expand(0, k, n)).shape == (0, m, n)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m, k, n", [(1, 1000, 600), (5, 700, 515), (90, 300, 700), (500, 200, 130)])
def test_threads_do_not_show(m: int, k: int, n: int, dtype: torch.dtype, set_threads: Callable[[int], None]):
    a, b = values((m, k), dtype, 1), values((n, k), dtype, 2).t()
    results = []
    for threads in (1, 2, 4):
        set_threads(threads)
        results.append(mm(a, b))
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])


def test_flushing_denormals_in_the_calling_thread_does_not_show():
    a, b = values((9, 300), torch.float32, 1, "tiny"), values((300, 40), torch.float32, 2, "tiny")
    expected = mm(a, b)
    assert torch.set_flush_denormal(True)
    try:
        flushed = mm(a, b)
    finally:
        torch.set_flush_denormal(False)
    assert same_bits(flushed, expected)


def results_on_any_processor() -> list[Tensor]:
    """For tests/test_instruction_sets.py: products of many shapes, layouts, dtypes and kinds of values."""
    results = []
    for dtype in DTYPES:
        for kind in KINDS:
            for m, k, n in (*SHAPES, (65, 400, 150)):
                a, b = values((m, k), dtype, 1, kind), values((n, k), dtype, 2, kind).t()
                for right in (b, b.contiguous()):
                    results.append(addmm(right[:1, :1], a, right, 0.5, 1.5) if m > 10 else mm(a, right))
    return results


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [300, 4096])
def test_error_is_not_much_above_that_of_torch(k: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(k)
    a = torch.randn(16, k, generator=generator, dtype=torch.float64).to(dtype)
    b = torch.randn(k, 64, generator=generator, dtype=torch.float64).to(dtype)
    if dtype == torch.float64:
        # Half the digits: then the exact product fits.
        a, b = a.float().bfloat16().double(), b.float().bfloat16().double() + b * 2.0**-30
        exact = (a @ b.float().double()) + (a @ (b - b.float().double()))
    else:
        exact = a.double() @ b.double()

    def error(y: Tensor) -> float:
        return (y.double() - exact).norm().item() / exact.norm().item()

    assert error(mm(a, b)) <= 1.5 * error(a @ b) + 4 * torch.finfo(dtype).eps / 4096


@pytest.mark.parametrize("dtype", DTYPES)
def test_ops_pass_opcheck(dtype: torch.dtype):
    a, b, c = values((3, 4), dtype, 1), values((4, 5), dtype, 2), values((5,), dtype, 3)
    ops = torch.ops.bicompile
    torch.library.opcheck(ops.mm.default, (a, b))
    torch.library.opcheck(ops.addmm.default, (c, a, b, 0.5, 2.0))
    torch.library.opcheck(ops.bmm.default, (a[None], b[None]))
    torch.library.opcheck(ops.baddbmm.default, (c, a[None], b[None], 1.0, 1.0))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bad_operands_raise(device: str):
    def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.ones(shape, dtype=dtype, device=device)

    with pytest.raises(RuntimeError, match="bicompile::mm.* do not fit"):
        mm(ones(2, 3), ones(4, 5))
    with pytest.raises(RuntimeError, match="bicompile::mm.*expected one dtype"):
        mm(ones(2, 3), ones(3, 4, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match="bicompile::mm: expected float32"):
        mm(ones(2, 3, dtype=torch.int64), ones(3, 4, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="bicompile::mm.*2-D"):
        mm(ones(3), ones(3, 4))
    with pytest.raises(RuntimeError, match="bicompile::bmm"):
        bmm(ones(2, 3, 4), ones(3, 4, 5))
    with pytest.raises(RuntimeError, match="bicompile::addmm.*one dtype"):
        addmm(ones(4, dtype=torch.float64), ones(2, 3), ones(3, 4))
    with pytest.raises(RuntimeError):
        addmm(ones(3), ones(2, 3), ones(3, 4))
