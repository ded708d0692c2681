"""Reductions over any dims: their order, whatever surrounds the row and wherever it lies."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import bicompile.lowering.reduction.op  # noqa: F401 (registers the ops)
from bicompile.lowering.reduction import reference
from bicompile.lowering.reduction.order import order_for
from bicompile.testing import same_bits
from bicompile.testing.layouts import LAYOUTS, lay_out

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SUMS = ("sum", "mean", "sum_square", "mean_square", "prod", "amax", "amin")
ORDS = (0.0, 1.0, 2.0, math.inf, -math.inf, 2.5)
ops = torch.ops.bicompile

Reduction = Callable[[Tensor, list[int], bool], object]
REDUCTIONS: dict[str, Reduction] = {
    **{name: (lambda x, d, k, name=name: getattr(ops, name)(x, d, k, x.dtype)) for name in SUMS},
    **{f"norm{p}": (lambda x, d, k, p=p: ops.vector_norm(x, p, d, k, x.dtype)) for p in ORDS},
    "var": lambda x, d, k: ops.var(x, d, 1.0, k, False),
    "std": lambda x, d, k: ops.var(x, d, 0.0, k, True),
    "logsumexp": lambda x, d, k: ops.logsumexp(x, d, k),
}


def spread(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Normal values over 16 binades."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    return (x * torch.exp2(torch.randint(-8, 8, shape, generator=g).double())).to(dtype)


def poison(x: Tensor, seed: int) -> Tensor:
    """``x`` with a few NaN, infinities and zeros of both signs."""
    g = torch.Generator().manual_seed(seed)
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0], dtype=x.dtype)
    chosen = special[torch.randint(0, 5, x.shape, generator=g)]
    return torch.where(torch.rand(x.shape, generator=g) < 0.05, chosen, x)


@st.composite
def tensors(draw: st.DrawFn, min_rank: int = 0) -> Tensor:
    """A tensor of any rank, dtype and layout, ragged and empty sizes among them, special values in some."""
    sizes = st.sampled_from([0, 1, 2, 3, 5, 33, 70, 100])
    shape = tuple(draw(st.lists(sizes, min_size=min_rank, max_size=3), label="shape"))
    seed = draw(st.integers(0, 2**31), label="seed")
    x = spread(shape, draw(st.sampled_from(DTYPES), label="dtype"), seed)
    if draw(st.booleans(), label="special values"):
        x = poison(x, seed)
    layout = draw(st.sampled_from([*LAYOUTS, "expanded", "permuted"]), label="layout")
    if layout == "expanded":
        return x[:1].expand(shape) if x.dim() and x.shape[0] else x
    if layout == "permuted":
        return x.permute(*range(1, x.dim()), 0).contiguous().permute(-1, *range(x.dim() - 1)) if x.dim() else x
    return lay_out(x, layout)


@st.composite
def dim_lists(draw: st.DrawFn, rank: int) -> list[int]:
    """Some of the dims in any sequence, counted from either end."""
    dims = draw(st.permutations(range(rank)), label="dims")[: draw(st.integers(0, rank))]
    return [d - rank if draw(st.booleans()) else d for d in dims]


def reduced_length(x: Tensor, dim: list[int]) -> int:
    return math.prod(x.shape[d] for d in dim or range(x.dim()))


# --- the order -----------------------------------------------------------------------------------------------------


def test_order_sees_one_row_only():
    assert list(inspect.signature(order_for).parameters) == ["n", "dtype"]


@given(x=tensors(), dtype=st.sampled_from(DTYPES), keepdim=st.booleans(), data=st.data())
def test_every_sum_has_the_bits_of_its_reference(x: Tensor, dtype: torch.dtype, keepdim: bool, data: st.DataObject):
    dim = data.draw(dim_lists(x.dim()))
    for name in SUMS:
        if name in ("amax", "amin") and reduced_length(x, dim) == 0:
            continue
        ours = getattr(ops, name)(x, dim, keepdim, dtype)
        assert same_bits(ours, getattr(reference, name)(x, dim, keepdim, dtype)), name
        assert ours.is_contiguous()


@given(x=tensors(), keepdim=st.booleans(), root=st.booleans(), data=st.data())
def test_var_std_and_logsumexp_have_the_bits_of_their_references(
    x: Tensor, keepdim: bool, root: bool, data: st.DataObject
):
    dim = data.draw(dim_lists(x.dim()))
    correction = data.draw(st.sampled_from([0.0, 1.0, 2.5, 1000.0]))
    assert same_bits(ops.var(x, dim, correction, keepdim, root), reference.var(x, dim, correction, keepdim, root))
    assert same_bits(ops.logsumexp(x, dim, keepdim), reference.logsumexp(x, dim, keepdim))


@given(x=tensors(), dtype=st.sampled_from(DTYPES), ord=st.sampled_from(ORDS), data=st.data())
def test_every_vector_norm_has_the_bits_of_its_reference(
    x: Tensor, dtype: torch.dtype, ord: float, data: st.DataObject
):
    dim = data.draw(dim_lists(x.dim()))
    if reduced_length(x, dim):
        assert same_bits(ops.vector_norm(x, ord, dim, True, dtype), reference.vector_norm(x, ord, dim, True, dtype))


@given(x=tensors(), data=st.data())
def test_squares_are_rounded_before_they_are_added(x: Tensor, data: st.DataObject):
    dim, wide = data.draw(dim_lists(x.dim())), x.to(order_for(0, x.dtype).compute)
    for name in ("sum", "mean"):
        whole = getattr(ops, f"{name}_square")(x, dim, True, wide.dtype)
        assert same_bits(whole, getattr(ops, name)(wide * wide, dim, True, wide.dtype))


# --- what must not show --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REDUCTIONS)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), n=st.sampled_from([1, 3, 31, 32, 33, 64, 300]))
def test_row_has_the_same_bits_in_any_batch(name: str, data: st.DataObject, dtype: torch.dtype, n: int):
    """Trap 9, rows per task chosen from M; trap 20, a row split at batch 1."""
    reduce, rows = REDUCTIONS[name], data.draw(st.integers(1, 40), label="rows")
    x = spread((rows, n), dtype, data.draw(st.integers(0, 2**31)))
    whole = reduce(x, [1], False)
    row = data.draw(st.integers(0, rows - 1), label="row")
    order = torch.tensor(data.draw(st.permutations(range(rows))))
    poisoned = torch.full_like(x, math.nan)
    poisoned[row] = x[row]

    def pick(result: object, rows: object) -> list[Tensor]:
        return [t[rows] for t in (result if isinstance(result, tuple) else (result,))]

    assert same_bits(pick(reduce(x[row : row + 1], [1], False), 0), pick(whole, row))
    assert same_bits(pick(reduce(x[order], [1], False), slice(None)), pick(whole, order))
    assert same_bits(pick(reduce(poisoned, [1], False), row), pick(whole, row))


@pytest.mark.parametrize("name", REDUCTIONS)
@given(data=st.data(), dtype=st.sampled_from(DTYPES))
def test_memory_layout_does_not_show(name: str, data: st.DataObject, dtype: torch.dtype):
    """Trap 13, a slice at an odd offset."""
    shape = tuple(data.draw(st.lists(st.sampled_from([1, 2, 7, 40, 65]), min_size=1, max_size=3), label="shape"))
    x, dim = spread(shape, dtype, data.draw(st.integers(0, 2**31))), data.draw(dim_lists(len(shape)))
    expected = REDUCTIONS[name](x, dim, False)
    for layout in LAYOUTS:
        assert same_bits(REDUCTIONS[name](lay_out(x, layout), dim, False), expected), layout
    for permutation in ((0, 2, 1), (1, 0, 2), (2, 1, 0), (1, 2, 0), (2, 0, 1)) if len(shape) == 3 else ():
        inverse = sorted(range(3), key=permutation.__getitem__)
        moved = x.permute(permutation).contiguous().permute(inverse)
        assert same_bits(REDUCTIONS[name](moved, dim, False), expected), permutation


@pytest.mark.parametrize("name", REDUCTIONS)
def test_threads_do_not_show(name: str, set_threads: Callable[[int], None]):
    """Trap 20."""
    x = spread((65, 1031), torch.float32, 0)
    found = []
    for threads in (1, 2, 4):
        set_threads(threads)
        found.append([REDUCTIONS[name](x, dim, False) for dim in ([1], [0], [])])
    assert same_bits(found[0], found[1])
    assert same_bits(found[0], found[2])


def results_on_any_processor() -> list[object]:
    """For tests/test_instruction_sets.py."""
    xs = [spread((7, 5, 133), dtype, 3) for dtype in DTYPES]
    return [
        reduce(y, dim, False)
        for x in xs
        for reduce in REDUCTIONS.values()
        for dim in ([2], [0], [1], [0, 2], [])
        for y in (x, x.transpose(1, 2))
    ]


# --- values --------------------------------------------------------------------------------------------------------


def worst_error(result: Tensor, exact: Tensor, scale: Tensor) -> float:
    return ((result.double() - exact).abs() / scale).max().item()


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float64])
@pytest.mark.parametrize("dim", [[1], [0], [0, 1]])
def test_values_are_nearly_as_good_as_torchs(dtype: torch.dtype, dim: list[int]):
    """Half a unit is rounding; beyond it torch's var, which runs in float64, may be a little better."""
    x = spread((300, 2000), dtype, 1)
    wide, eps = x.double(), torch.finfo(dtype).eps
    scale = wide.abs().sum(dim)
    for ours, stock, exact, size in (
        (ops.sum(x, dim, False, dtype), x.sum(dim), wide.sum(dim), scale),
        (ops.mean(x, dim, False, dtype), x.mean(dim), wide.mean(dim), scale / reduced_length(x, dim)),
        (ops.var(x, dim, 1.0, False, False)[0], x.var(dim), wide.var(dim), wide.var(dim)),
        (ops.vector_norm(x, 2, dim, False, dtype), x.norm(2, dim), wide.norm(2, dim), wide.norm(2, dim)),
        (ops.logsumexp(x, dim, False), x.logsumexp(dim), wide.logsumexp(dim), wide.logsumexp(dim).abs()),
    ):
        assert worst_error(ours, exact, size) <= 2 * worst_error(stock, exact, size) + eps


def test_values_in_float64_agree_with_torchs():
    x = spread((300, 2000), torch.float64, 1)
    for dim in ([1], [0], [0, 1]):
        assert worst_error(ops.sum(x, dim, False, x.dtype), x.sum(dim), x.abs().sum(dim)) < 1e-15
        assert worst_error(ops.var(x, dim, 1.0, False, False)[0], x.var(dim), x.var(dim)) < 1e-14
        assert worst_error(ops.logsumexp(x, dim, False), x.logsumexp(dim), x.logsumexp(dim).abs()) < 1e-15


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_reductions_equal_torchs(dtype: torch.dtype):
    x = spread((37, 130), dtype, 2)
    for dim in ([0], [1], [0, 1]):
        assert same_bits(ops.amax(x, dim, True, dtype), x.amax(dim, True))
        assert same_bits(ops.amin(x, dim, True, dtype), x.amin(dim, True))
        norm = torch.linalg.vector_norm
        assert same_bits(ops.vector_norm(x, math.inf, dim, False, dtype), norm(x, math.inf, dim))
        assert same_bits(ops.vector_norm(x, -math.inf, dim, False, dtype), norm(x, -math.inf, dim))
        assert same_bits(ops.vector_norm(x, 0, dim, False, dtype), norm(x, 0, dim))
    assert torch.allclose(ops.prod(x[:, :5], [1], False, dtype).double(), x[:, :5].double().prod(1), rtol=1e-2)


def test_mean_over_several_dims_is_one_reduction():
    """Trap 4: it must not become a plain sum."""
    x = spread((4, 6, 50), torch.float32, 4)
    assert same_bits(
        ops.mean(x, [0, 2], False, x.dtype), ops.mean(x.transpose(0, 1).reshape(6, 200), [1], False, x.dtype)
    )
    assert torch.allclose(ops.mean(x, [0, 2], False, x.dtype), x.mean((0, 2)), rtol=1e-4)


def test_dtype_keepdim_and_correction_are_obeyed():
    """Trap 23."""
    x = spread((6, 40), torch.bfloat16, 5)
    assert same_bits(ops.sum(x, [1], False, torch.float32), ops.sum(x.float(), [1], False, torch.float32))
    assert ops.sum(x, [1], False, torch.float64).dtype == torch.float64
    assert ops.mean(x, [1], True, torch.float32).shape == (6, 1)
    for correction in (0, 1, 3.5):
        exact = torch.var(x.double(), 1, correction=correction)
        assert torch.allclose(ops.var(x.float(), [1], correction, False, False)[0].double(), exact, rtol=1e-5)


def test_special_rows_come_out_as_in_torch():
    x = torch.tensor([[-math.inf, -math.inf], [math.inf, 1], [math.nan, 1], [-0.0, 0.0], [-0.0, -0.0]])
    for name, stock in (("sum", torch.sum), ("amax", torch.amax), ("amin", torch.amin)):
        ours, theirs = getattr(ops, name)(x, [1], False, x.dtype), stock(x, 1)
        assert torch.equal(ours.nan_to_num(7), theirs.nan_to_num(7)), name
    assert torch.equal(ops.logsumexp(x, [1], False).nan_to_num(7), x.logsumexp(1).nan_to_num(7))
    assert not ops.amax(x, [1], False, x.dtype)[3].signbit()
    assert ops.amin(x, [1], False, x.dtype)[3].signbit()


def test_empty_and_zero_dimensional_tensors_reduce_as_in_torch():
    empty = torch.empty(3, 0)
    assert torch.equal(ops.sum(empty, [1], False, torch.float32), torch.zeros(3))
    assert torch.equal(ops.prod(empty, [1], False, torch.float32), torch.ones(3))
    assert ops.mean(empty, [1], False, torch.float32).isnan().all()
    assert ops.var(empty, [1], 1.0, False, False)[0].isnan().all()
    assert ops.var(torch.ones(3, 1), [1], 1.0, False, False)[0].isnan().all()
    assert torch.equal(ops.logsumexp(empty, [1], False), empty.logsumexp(1))
    assert torch.equal(ops.vector_norm(empty, 2, [1], False, torch.float32), torch.zeros(3))
    assert ops.amax(empty, [0], False, torch.float32).shape == (0,)
    number = torch.tensor(3.0)
    for dim in ([], [0], [-1]):
        assert torch.equal(ops.sum(number, dim, False, torch.float32), number)
        assert torch.equal(ops.mean(number, dim, True, torch.float32), number)


# --- errors and registration ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: ops.sum(x, [2], False, x.dtype), r"sum: expected a dim in \[-2, 1\], got 2"),
        (lambda x: ops.sum(x, [0, -2], False, x.dtype), "sum: expected each dim once"),
        (lambda x: ops.sum(x.int(), [0], False, torch.float32), "sum: expected x in float32.*[Ii]nt"),
        (lambda x: ops.mean(x.to(torch.complex64), [0], False, torch.float32), "mean: expected x in .*[Cc]omplex"),
        (lambda x: ops.sum(x, [0], False, torch.int64), "sum: expected dtype in float32"),
        (lambda x: ops.var(x, [5], 1.0, False, False), "var: expected a dim in"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bad_arguments_are_named(call: Callable[[Tensor], object], message: str, device: str):
    with pytest.raises((RuntimeError, ValueError, TypeError, IndexError), match=message):
        call(torch.ones(2, 3, device=device))


def test_extremum_of_nothing_is_refused():
    with pytest.raises(RuntimeError, match="amax: expected at least one element"):
        ops.amax(torch.empty(2, 0), [1], False, torch.float32)
    with pytest.raises(RuntimeError, match="vector_norm: expected at least one element"):
        ops.vector_norm(torch.empty(2, 0), math.inf, [1], False, torch.float32)


def test_ops_pass_opcheck():
    x = spread((3, 40), torch.bfloat16, 6)
    for name in SUMS:
        torch.library.opcheck(getattr(ops, name).default, (x, [-1], True, torch.float32))
    torch.library.opcheck(ops.var.default, (x, [0], 1.0, False, True))
    torch.library.opcheck(ops.vector_norm.default, (x, 3.0, [0, 1], False, torch.float64))
    torch.library.opcheck(ops.logsumexp.default, (x, [], True))


def test_compiled_with_dynamic_sizes_they_keep_their_bits():
    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        return ops.mean_square(x, [-1], True, torch.float32), ops.var(x, [0], 1.0, False, True)[0]

    compiled = torch.compile(both, backend="eager", fullgraph=True, dynamic=True)
    for rows in (2, 9):
        x = spread((rows, 40), torch.float32, rows)
        assert same_bits(compiled(x), both(x))
