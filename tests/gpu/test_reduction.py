"""Reductions on the GPU: the bits of their references, under every schedule, whatever surrounds a row."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import bicompile.lowering.reduction.op  # noqa: F401 (registers the ops)
from bicompile.lowering.gpu import plans
from bicompile.lowering.gpu.admission import equal_bits
from bicompile.lowering.reduction import gpu, gpu_statistics, reference
from bicompile.lowering.reduction.schedule import ColumnsSchedule, RowSchedule
from bicompile.testing.layouts import LAYOUTS, lay_out

ops = torch.ops.bicompile
Reduction = Callable[[Tensor, list[int]], object]
REDUCTIONS: dict[str, Reduction] = {
    "sum": lambda x, d: ops.sum(x, d, False, x.dtype),
    "amax": lambda x, d: ops.amax(x, d, False, x.dtype),
    "norm2.5": lambda x, d: ops.vector_norm(x, 2.5, d, False, x.dtype),
    "var": lambda x, d: ops.var(x, d, 1.0, False, False),
    "logsumexp": lambda x, d: ops.logsumexp(x, d, False),
}


def spread(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Normal values over 12 binades, on the GPU."""
    g = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(shape, generator=g, dtype=torch.float64, device="cuda")
    return (x * torch.exp2(torch.randint(-6, 6, shape, generator=g, device="cuda").double())).to(dtype)


def leaves(result: object) -> list[Tensor]:
    return list(result) if isinstance(result, tuple | list) else [result]


def same(a: object, b: object) -> bool:
    return all(equal_bits(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


def pick(result: object, rows: object) -> list[Tensor]:
    return [t[rows] for t in leaves(result)]


@pytest.fixture
def no_plans() -> Iterator[None]:
    """Forget the plans before and after: a test changes how they are made."""
    plans._PLANS.clear()
    yield
    plans._PLANS.clear()


# --- the order -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dim", "dtype"),
    [
        ((300, 77), [1], torch.float32),
        ((40, 4096), [1], torch.bfloat16),
        ((3, 50257), [1], torch.bfloat16),
        ((3, 20_000), [1], torch.float64),
        ((4096, 70), [0], torch.bfloat16),
        ((100_000, 9), [0], torch.float32),
        ((5, 600, 33), [1], torch.float16),
        ((4, 6, 7, 300), [0, 2], torch.float32),
        ((60, 50, 40), [], torch.bfloat16),
    ],
)
def test_sums_and_variances_have_the_bits_of_their_references(
    shape: tuple[int, ...], dim: list[int], dtype: torch.dtype
):
    x = spread(shape, dtype, 0)
    host = x.cpu()
    for name in ("sum", "mean_square"):
        expected = getattr(reference, name)(host, dim, False, dtype, reference.gpu_fold)
        assert same(getattr(ops, name)(x, dim, False, dtype).cpu(), expected), name
    ours = [t.cpu() for t in ops.var(x, dim, 1.0, True, True)]
    assert same(tuple(ours), reference.var(host, dim, 1.0, True, True, reference.gpu_moments))


def test_the_other_folds_have_the_bits_of_their_references():
    x = spread((200, 1500), torch.float32, 1)
    near_one = 1 + x * 1e-4
    for dim in ([0], [1]):
        for name, y in (("prod", near_one), ("amax", x), ("amin", x), ("mean", x), ("sum_square", x)):
            expected = getattr(reference, name)(y.cpu(), dim, False, y.dtype, reference.gpu_fold)
            assert same(getattr(ops, name)(y, dim, False, y.dtype).cpu(), expected), name
        for ord in (0.0, 1.0, 2.0, math.inf) if dim == [1] else ():
            expected = reference.vector_norm(x.cpu(), ord, dim, False, x.dtype, reference.gpu_fold)
            assert same(ops.vector_norm(x, ord, dim, False, x.dtype).cpu(), expected), ord


@pytest.mark.parametrize("n", [500, 20_000])
def test_no_schedule_along_rows_shows(n: int, monkeypatch: pytest.MonkeyPatch, no_plans: None):
    x = spread((37, n), torch.bfloat16, 2)

    def results() -> tuple[Tensor, ...]:
        plans._PLANS.clear()
        return (
            ops.sum(x, [1], False, torch.float32),
            *ops.var(x.float(), [1], 0.0, False, False),
            ops.logsumexp(x, [1], False),
        )

    expected = results()
    for schedule in (RowSchedule(1, 1), RowSchedule(1, 16), RowSchedule(2, 4), RowSchedule(8, 8)):
        if schedule.rows > 1 and n > 1024:
            continue
        for module in (gpu, gpu_statistics):
            monkeypatch.setattr(module, "row_schedule_for", lambda *_, schedule=schedule: schedule)
        assert same(results(), expected), schedule


@pytest.mark.parametrize("n", [5000, 80_000])
def test_no_schedule_across_rows_shows(n: int):
    x = spread((n, 50), torch.float32, 3)
    at = gpu.layout_of(x, {0})
    assert isinstance(at, gpu.Columns)
    expected = reference.sum(x.cpu(), [0], False, torch.float32, reference.gpu_fold)
    for schedule in (
        ColumnsSchedule(8, 8, 1),
        ColumnsSchedule(32, 32, 4),
        ColumnsSchedule(64, 32, 8),
        ColumnsSchedule(16, 1, 1),
    ):
        out = torch.empty(50, device="cuda")
        gpu.fold_columns(at, gpu.Fold(), torch.float32, n, schedule)(x, out)
        assert same(out.cpu(), expected), schedule


# --- what must not show --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize(("rows", "n"), [(3000, 50), (600, 4096), (17, 50257)])
def test_row_has_the_same_bits_in_any_batch(name: str, rows: int, n: int):
    """Traps 9, 10 and 11: rows per program, implementation or warps chosen from the number of rows."""
    reduce, x = REDUCTIONS[name], spread((rows, n), torch.bfloat16, 4)
    whole = reduce(x, [1])
    order = torch.randperm(rows, device="cuda")
    assert same(pick(reduce(x[order], [1]), slice(None)), pick(whole, order))
    for row in (0, rows // 2, rows - 1):
        poisoned = torch.full_like(x, math.nan)
        poisoned[row] = x[row]
        assert same(pick(reduce(x[row : row + 1], [1]), 0), pick(whole, row))
        assert same(pick(reduce(poisoned, [1]), row), pick(whole, row))
    assert same(pick(reduce(x[: rows // 3], [1]), slice(None)), pick(whole, slice(rows // 3)))
    assert same(reduce(x, [1]), whole)


@pytest.mark.parametrize("name", ["sum", "var", "logsumexp"])
def test_memory_layout_does_not_show(name: str):
    """Traps 13 and 14, a slice at an odd offset, of a wider buffer."""
    x = spread((3, 40, 96), torch.bfloat16, 5)
    for dim in ([2], [1], [0, 2]):
        expected = REDUCTIONS[name](x, dim)
        for layout in LAYOUTS:
            assert same(REDUCTIONS[name](lay_out(x, layout), dim), expected), (layout, dim)
    expanded = REDUCTIONS[name](x[:1].expand(3, 40, 96), [2])
    assert same(pick(expanded, 2), pick(REDUCTIONS[name](x, [2]), 0))


def test_columns_have_the_bits_of_rows():
    x = spread((20_000, 48), torch.bfloat16, 6)
    for reduce in REDUCTIONS.values():
        assert same(reduce(x, [0]), reduce(x.T.contiguous(), [1]))
    assert same(ops.sum(x[:, 3:9], [0], False, x.dtype), ops.sum(x, [0], False, x.dtype)[3:9])


def test_more_elements_than_32_bits_count():
    x = torch.zeros(2**31 // 65536 + 4, 65536, dtype=torch.bfloat16, device="cuda")
    x[-3:] = spread((3, 65536), torch.bfloat16, 7)
    whole = ops.sum(x, [1], False, torch.float32)
    assert same(whole[-3:], ops.sum(x[-3:].clone(), [1], False, torch.float32))
    assert same(ops.sum(x, [0], False, torch.float32)[:5], ops.sum(x[:, :5].contiguous(), [0], False, torch.float32))
    row = x.view(1, -1)
    exact = x[-3:].double().sum().item()
    assert math.isclose(ops.sum(row, [1], False, torch.float32).item(), exact, rel_tol=1e-3, abs_tol=1e-1)
    assert math.isclose(ops.var(row, [1], 0.0, False, False)[0].item(), row.float().var().item(), rel_tol=2e-2)


# --- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [[1], [0], [0, 1]])
def test_values_are_nearly_as_good_as_torchs(dtype: torch.dtype, dim: list[int]):
    x = spread((300, 30_000), dtype, 8)
    wide, eps = x.double(), torch.finfo(dtype).eps
    scale = wide.abs().sum(dim)
    for ours, stock, exact, size in (
        (ops.sum(x, dim, False, dtype), x.sum(dim), wide.sum(dim), scale),
        (ops.var(x, dim, 1.0, False, False)[0], x.var(dim), wide.var(dim), wide.var(dim)),
        (ops.vector_norm(x, 2, dim, False, dtype), x.norm(2, dim), wide.norm(2, dim), wide.norm(2, dim)),
        (ops.vector_norm(x, 2.5, dim, False, dtype), x.norm(2.5, dim), wide.norm(2.5, dim), wide.norm(2.5, dim)),
        (ops.logsumexp(x, dim, False), x.logsumexp(dim), wide.logsumexp(dim), wide.logsumexp(dim).abs()),
    ):
        error, theirs = (((t.double() - exact).abs() / size).max().item() for t in (ours, stock))
        assert error <= 2 * theirs + eps


def test_special_rows_come_out_as_in_torch():
    inf = math.inf
    x = torch.tensor([[-inf, -inf], [inf, 1], [math.nan, 1], [-0.0, 0.0], [-0.0, -0.0]], device="cuda")
    for name, stock in (("sum", torch.sum), ("amax", torch.amax), ("amin", torch.amin)):
        assert torch.equal(getattr(ops, name)(x, [1], False, x.dtype).nan_to_num(7), stock(x, 1).nan_to_num(7)), name
    assert torch.equal(ops.logsumexp(x, [1], False).nan_to_num(7), x.logsumexp(1).nan_to_num(7))
    for dtype in (torch.float32, torch.float64):
        assert not ops.amax(x.to(dtype), [1], False, dtype)[3].signbit()
        assert ops.amin(x.to(dtype), [1], False, dtype)[3].signbit()
        assert (
            ops.amax(x.to(dtype), [1], False, dtype)[2].isnan() and ops.amin(x.to(dtype), [1], False, dtype)[2].isnan()
        )


def test_they_run_under_cuda_graphs():
    x = spread((64, 50257), torch.bfloat16, 9)
    expected = [reduce(x, [1]) for reduce in REDUCTIONS.values()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = [reduce(x, [1]) for reduce in REDUCTIONS.values()]
    graph.replay()
    for ours, theirs in zip(found, expected, strict=True):
        assert same(ours, theirs)


def test_ops_pass_opcheck():
    x = spread((3, 40), torch.bfloat16, 10)
    torch.library.opcheck(ops.sum.default, (x, [-1], True, torch.float32))
    torch.library.opcheck(ops.var.default, (x, [0], 1.0, False, True))
    torch.library.opcheck(ops.vector_norm.default, (x, 3.0, [0, 1], False, torch.float64))
    torch.library.opcheck(ops.logsumexp.default, (x, [], True))
