"""Trees on a GPU: our kernels add as their orders say, in every batch and under every schedule; stock's do not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from matmul_cases import DEVICE, HALVES, admissions, in_processes, listed, tf32_allowed
from summing import (
    ATTENTION,
    POSITIVE,
    PRODUCTS,
    REDUCTIONS,
    SCANS,
    SCATTERS,
    Sum,
    assert_same_tree,
    attention_gradients,
    check_triples,
    counted,
    declared_tree,
    ones,
    tree_in_batch,
)
from torch import Tensor
from workers import once

from bicompile.lowering.attention import gpu as attention
from bicompile.lowering.attention import gpu_backward as attention_backward
from bicompile.lowering.attention.order import gpu_order_for as attention_order
from bicompile.lowering.attention.problem import problem_of as attention_problem
from bicompile.lowering.attention.schedule import (
    PLAIN_BACKWARD,
    REFERENCE_BACKWARD,
    BackwardSchedule,
    HopperSchedule,
    SplitSchedule,
    TileSchedule,
)
from bicompile.lowering.gpu import plans
from bicompile.lowering.matmul import gpu as matmul
from bicompile.lowering.matmul.order import gpu_order_for as matmul_order
from bicompile.lowering.matmul.problem import problem_of
from bicompile.lowering.matmul.schedule import LIBRARY, REFERENCES, OwnSchedule
from bicompile.lowering.norm import gpu as norm
from bicompile.lowering.norm import gpu_backward as norm_backward
from bicompile.lowering.reduction import gpu as reduction
from bicompile.lowering.reduction import gpu_statistics
from bicompile.lowering.reduction.schedule import ColumnsSchedule, RowSchedule
from bicompile.lowering.scan import gpu as scan
from bicompile.lowering.scan.schedule import ScanSchedule
from bicompile.lowering.scatter import gpu as scatter
from bicompile.lowering.scatter.schedule import REFERENCE as SCATTER_REFERENCE
from bicompile.lowering.scatter.schedule import ElementSchedule
from bicompile.lowering.scatter.schedule import RowSchedule as ScatterSchedule
from bicompile.lowering.softmax import gpu as softmax
from bicompile.testing import SummationTree, summation_tree
from bicompile.testing.declared import gpu_attention_trees, grouped

ops = torch.ops.bicompile
FLOATS = (torch.float32, torch.bfloat16)

Case = tuple[str, int, int, torch.dtype]  # a sum, its summands, rows of the batch
SUMS: dict[str, tuple[Sum, str]] = {
    **{name: (fn, "sum") for name, fn in REDUCTIONS.items()},
    **{name: (fn, "cumsum") for name, fn in SCANS.items()},
    **{name: (fn, "index_add") for name, fn in SCATTERS.items()},
    **{name: (fn, "mm") for name, fn in PRODUCTS.items()},
}
# Lanes in part and in full; one program of the reductions takes one row, or, of 1100, several.
ROW_CASES: list[Case] = [
    *((name, n, rows, torch.float32) for name in REDUCTIONS for n, rows in ((193, 1), (193, 1100), (1100, 3))),
    *((name, n, 17, torch.bfloat16) for name in ("sum", "sum over dim 0", "softmax_backward") for n in (193, 300)),
    *((name, n, rows, dtype) for name in SCANS for dtype in FLOATS for n, rows in ((50, 1), (193, 1100))),
    *((name, 4200, 3, torch.float32) for name in SCANS),  # totals of segments, and totals of these
    *((name, n, rows, torch.float32) for name in SCATTERS for n, rows in ((50, 17), (193, 1), (193, 300))),
]
PRODUCT_CASES: list[Case] = [
    *((name, n, rows, dtype) for name in PRODUCTS for dtype in HALVES for n, rows in ((5, 3), (193, 1), (193, 300))),
    *(("mm", n, rows, dtype) for dtype in FLOATS for n, rows in ((200, 16), (200, 64), (200, 1000))),
    *((name, 193, 33, torch.float32) for name in PRODUCTS),
    ("mm", 193, 33, torch.float64),
]
ROW_SCHEDULES = (RowSchedule(1, 1), RowSchedule(1, 16), RowSchedule(2, 4), RowSchedule(8, 8))
COLUMN_SCHEDULES = (ColumnsSchedule(8, 8, 1), ColumnsSchedule(32, 32, 4), ColumnsSchedule(64, 64, 8))
SCAN_SCHEDULES = (ScanSchedule(32, 1, 4), ScanSchedule(256, 8, 16), ScanSchedule(64, 4, 1))
SCATTER_SCHEDULES = (
    *(SCATTER_REFERENCE, ScatterSchedule(32, 1, 8, 16, 32, 4), ScatterSchedule(64, 2, 1, 8, 64, 8)),
    *(ScatterSchedule(256, 1, 8, 64, 128, 4), ScatterSchedule(1024, 4, 4, 128, 32, 8)),
)
ELEMENT_SCHEDULES = (("columns", 32, 1), ("columns", 64, 8), ("sorted", 128, 8))
ATTENTION_SCHEDULES: tuple[Any, ...] = (
    *(TileSchedule(16, 4, 1), TileSchedule(64, 8, 1), TileSchedule(128, 8, 2, tma=True)),
    *(SplitSchedule(16, 4, 1), SplitSchedule(16, 4, 3, tma=True), SplitSchedule(32, 8, 2, span=0)),
    HopperSchedule(stages=2, overlap=True),
)
BACKWARD_SCHEDULES = (REFERENCE_BACKWARD, PLAIN_BACKWARD)
NEEDS_HOPPER = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="a kernel of sm_90"
)


# --- compiling beforehand --------------------------------------------------------------------------------------------


def _run_case(case: Case) -> None:
    name, n, rows, dtype = case
    SUMS[name][0](ops, torch.zeros(rows, n, dtype=dtype, device=DEVICE))


def _attend(schedule: Any) -> None:
    values_under(schedule, torch.zeros(2, 1024, dtype=torch.bfloat16, device=DEVICE))


def _compile_beforehand() -> None:
    jobs: list[Any] = [(_run_case, case) for case in (*ROW_CASES, *PRODUCT_CASES)]
    jobs += [(_attend, s) for s in ATTENTION_SCHEDULES if not isinstance(s, HopperSchedule) or _is_hopper()]
    in_processes([*admissions(), *jobs])


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    once(_compile_beforehand, "trees")


@pytest.fixture
def no_plans() -> Iterator[None]:
    """Forget the plans before and after: a test changes how they are made."""
    plans._PLANS.clear()
    yield
    plans._PLANS.clear()


def _is_hopper() -> bool:
    return torch.cuda.get_device_capability() == (9, 0)


# --- in every batch --------------------------------------------------------------------------------------------------


def assert_refined(declared: SummationTree, found: SummationTree, what: str, exactly: bool) -> None:
    """Every sum that is declared is there; what a tensor core does inside a group of k is its own affair.

    With ``exactly`` it adds each group as one, as Hopper's do with 16 elements of 2 bytes.
    """
    if exactly:
        return assert_same_tree(declared, found, what)
    missing = _sums_in(declared) - _sums_in(found)
    shown = f"{what}: the sum of {min(missing, key=len, default=())} is missing"
    assert not missing, f"{shown}\n  declared: {declared}\n  found:    {found}"


def _sums_in(tree: SummationTree) -> set[tuple[int, ...]]:
    stack, found = [tree], set()
    while stack:
        node = stack.pop()
        found.add(node.leaves)
        stack += [child for child in node.children if isinstance(child, SummationTree)]
    return found


def check(case: Case, what: str = "") -> None:
    name, n, rows, dtype = case
    fn, op = SUMS[name]
    found = tree_in_batch(lambda x: fn(ops, x), n, rows, dtype, DEVICE)
    declared = declared_tree(op, n, dtype, "cuda")
    shown = f"{name} of {rows} rows of {n} {dtype} {what}"
    assert_refined(declared, found, shown, exactly=op != "mm" or dtype.itemsize > 2 or _is_hopper())


@pytest.mark.parametrize("case", ROW_CASES, ids=str)
def test_rows_are_added_as_declared_in_every_batch(case: Case):
    check(case)


@pytest.mark.parametrize("case", PRODUCT_CASES, ids=str)
def test_products_are_added_as_declared_in_every_batch(case: Case):
    with tf32_allowed(False):
        check(case)


def test_tf32_products_are_added_as_declared_in_every_batch():
    n = 200
    declared = grouped(range(n), matmul_order(n, torch.float32, tf32=True).group)
    assert isinstance(declared, SummationTree)
    with tf32_allowed(True):
        found = {rows: tree_in_batch(lambda x: PRODUCTS["addmm"](ops, x), n, rows, device=DEVICE) for rows in (1, 300)}
    for rows, tree in found.items():
        assert_refined(declared, tree, f"TF32, {rows} rows", exactly=False)
        assert_same_tree(found[1], tree, f"TF32, 1 row and {rows}")


@pytest.mark.parametrize("n", [193, 1100, 20_000])
@pytest.mark.parametrize("name", POSITIVE)
def test_of_three_positive_summands_those_two_meet_first_that_the_order_says(name: str, n: int):
    tree = declared_tree("sum", n, torch.float32, "cuda")
    check_triples(lambda x: POSITIVE[name](ops, x), tree, (1, 17, 300), "cuda", name)


# --- under every schedule --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ROW_SCHEDULES, ids=str)
def test_no_schedule_along_rows_changes_a_tree(schedule: RowSchedule, monkeypatch: pytest.MonkeyPatch, no_plans: None):
    for module in (reduction, gpu_statistics, softmax, norm, norm_backward):
        monkeypatch.setattr(module, "row_schedule_for", lambda *_: schedule)
    for name in ("sum", "mean", "var", "layer_norm", "softmax_backward", "log_softmax_backward"):
        check((name, 193, 11, torch.float32), str(schedule))
    for name in POSITIVE:
        tree = declared_tree("sum", 193, torch.float32, "cuda")
        check_triples(lambda x, name=name: POSITIVE[name](ops, x), tree, (300,), "cuda", f"{name} {schedule}")
    if schedule.rows == 1:
        for warps in (None, schedule.warps):  # section by section, and a row in one program
            plans._PLANS.clear()
            monkeypatch.setattr(softmax, "long_row_warps_for", lambda *_, warps=warps: warps)
            tree = declared_tree("sum", 20_000, torch.float32, "cuda")
            for name in ("softmax", "log_softmax"):
                fn = POSITIVE[name]
                check_triples(lambda x, fn=fn: fn(ops, x), tree, (300,), "cuda", f"{name} {schedule}, warps {warps}")


@pytest.mark.parametrize("schedule", COLUMN_SCHEDULES, ids=str)
def test_no_schedule_across_rows_changes_a_tree(
    schedule: ColumnsSchedule, monkeypatch: pytest.MonkeyPatch, no_plans: None
):
    for module in (reduction, norm_backward):
        monkeypatch.setattr(module, "columns_schedule_for", lambda *_: schedule)
    for name in ("sum over dim 0", "layer_norm_backward_params"):
        check((name, 193, 40, torch.float32), str(schedule))


@pytest.mark.parametrize("schedule", SCAN_SCHEDULES, ids=str)
def test_no_schedule_of_a_scan_changes_its_tree(
    schedule: ScanSchedule, monkeypatch: pytest.MonkeyPatch, no_plans: None
):
    monkeypatch.setattr(scan, "schedule_for", lambda *_: schedule)
    for dtype in FLOATS:
        check(("cumsum", 193, 7, dtype), str(schedule))


@pytest.mark.parametrize("schedule", SCATTER_SCHEDULES, ids=str)
def test_no_schedule_of_a_scatter_changes_its_tree(schedule: ScatterSchedule, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scatter, "row_schedule_for", lambda *_: schedule)
    for name in ("index_add", "embedding_dense_backward"):
        check((name, 193, 40, torch.float32), str(schedule))


@pytest.mark.parametrize("schedule", ELEMENT_SCHEDULES, ids=str)
def test_no_schedule_of_elements_changes_their_tree(schedule: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scatter, "element_schedule_for", lambda *_: ElementSchedule(*schedule))

    def to_one(x: Tensor) -> Tensor:
        at = torch.ones(x.shape, dtype=torch.int64, device=x.device)  # an index for each element
        return ops.scatter_add(ones(x, len(x), 2) * 0, 1, at, x)[:, 1]

    found = tree_in_batch(to_one, 193, 40, device=DEVICE)
    assert_same_tree(declared_tree("index_add", 193, torch.float32, "cuda"), found, str(schedule))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("schedule", [*listed(), REFERENCES[torch.bfloat16]], ids=str)
def test_no_schedule_of_a_product_changes_its_tree(schedule: OwnSchedule, dtype: torch.dtype):
    """The sizes of ``listed_problem``, but for k: whole blocks too, so the kernels are the same."""
    k, m, n = max(256, schedule.block_k), 150, 416
    w = torch.ones(n, k, dtype=dtype, device=DEVICE).t()
    problem = problem_of(torch.zeros(m, k, dtype=dtype, device=DEVICE), w, dtype, tf32=False, add=False)
    runner = matmul.admitted_runner(schedule, problem, DEVICE)
    assert runner is not None, f"{schedule} is not admitted"

    def product(x: Tensor) -> Tensor:
        out = torch.empty(m, n, dtype=dtype, device=DEVICE)
        runner(x, w, None, out)
        return out[:, 1]

    found = tree_in_batch(product, k, m, dtype, DEVICE)
    assert_refined(declared_tree("mm", k, dtype, "cuda"), found, str(schedule), exactly=_is_hopper())


@pytest.mark.parametrize("m", [64, 1024])
def test_cublaslts_admitted_algorithms_have_the_declared_tree(m: int):
    k, n, dtype = 256, 416, torch.bfloat16
    w = torch.ones(n, k, dtype=dtype, device=DEVICE).t()
    problem = problem_of(torch.zeros(m, k, dtype=dtype, device=DEVICE), w, dtype, tf32=False, add=False)
    for number, runner in enumerate(matmul.library_runners(LIBRARY, problem, DEVICE)):

        def product(x: Tensor, runner: Any = runner) -> Tensor:
            out = torch.empty(m, n, dtype=dtype, device=DEVICE)
            runner(x, w, None, out)
            return out[:, 1]

        found = tree_in_batch(product, k, m, dtype, DEVICE)
        shown = f"suggestion {number} for {m} rows"
        assert_refined(declared_tree("mm", k, dtype, "cuda"), found, shown, exactly=_is_hopper())


# --- attention -------------------------------------------------------------------------------------------------------


def values_under(schedule: Any, x: Tensor) -> Tensor:
    """Sums of values with equal weights: one sequence for each row of ``x``, with 130 queries in heads of 64.

    A result in bfloat16 counts to 256, so each column has 256 of the ones, and all of what is huge.
    """
    rows, n = x.shape
    q, k = ones(x, rows, 1, 130, 64) * 0, ones(x, rows, 1, n, 64)
    mine = torch.arange(n, device=x.device)[:, None] // 256 == torch.arange(64, device=x.device)
    v = torch.where(mine | (x[:, None, :, None].abs() > 1), x[:, None, :, None], 0)
    out, _ = attention.run(attention_problem("sdpa", q, k, v, None, False, 1.0), schedule)
    return counted(out[:, 0, 129].float(), n)[:, : n // 256].sum(1)


def weights_under(schedule: Any, x: Tensor) -> Tensor:
    """Whether the sum of the weights is above that of the first key."""
    rows, n = x.shape
    q, k = (torch.zeros(rows, 1, size, 64, dtype=x.dtype, device=x.device) for size in (130, n))
    q[..., 0], k[:, 0, :, 0] = 1.0, x
    _, lse = attention.run(attention_problem("sdpa", q, k, torch.zeros_like(k), None, False, 1.0), schedule)
    return lse[:, 0, 129] > 0


def trees_of_attention(n: int, depth: int, dtype: torch.dtype) -> dict[str, SummationTree]:
    return gpu_attention_trees(attention_order(depth, dtype), matmul_order(n, dtype).group, n)


@pytest.mark.parametrize(
    "schedule",
    [pytest.param(s, marks=NEEDS_HOPPER) if isinstance(s, HopperSchedule) else s for s in ATTENTION_SCHEDULES],
    ids=str,
)
def test_attention_adds_values_and_weights_as_declared_under_every_schedule(schedule: Any):
    dtype = torch.bfloat16
    n = 1024  # several splits; 1 / n is exact
    found = tree_in_batch(lambda x: values_under(schedule, x), n, 2, dtype, DEVICE)
    declared = trees_of_attention(n, 64, dtype)
    assert_refined(declared["weighted values"], found, f"values, {schedule}", exactly=_is_hopper())
    for keys in (n, 1337):
        tree = trees_of_attention(keys, 64, dtype)["weights"]
        check_triples(lambda x: weights_under(schedule, x.to(dtype)), tree, (1, 300), "cuda", f"weights, {schedule}")


@pytest.mark.parametrize("rows", [1, 17, 300])
def test_attention_adds_as_declared_in_every_batch(rows: int):
    with tf32_allowed(False):
        found = tree_in_batch(lambda x: ATTENTION["sdpa's values"](ops, x), 600, rows, device=DEVICE)
    declared = trees_of_attention(600, 1, torch.float32)["weighted values"]
    assert_same_tree(declared, found, f"values of {rows} rows")
    for dtype in FLOATS:
        found = tree_in_batch(lambda x: ATTENTION["sdpa's scores"](ops, x), 193, rows, dtype, DEVICE)
        declared = declared_tree("mm", 193, dtype, "cuda")
        exactly = dtype == torch.float32 or _is_hopper()
        assert_refined(declared, found, f"scores of {rows} rows, {dtype}", exactly)


def gradients_under(schedule: BackwardSchedule) -> Callable[..., Any]:
    def backward(grad: Any, q: Any, k: Any, v: Any, mask: Any, out: Any, lse: Any, *rest: Any) -> Any:
        p = attention_problem("sdpa_backward", q, k, v, mask, False, 1.0)
        return attention_backward.run(p, grad, out, lse, schedule)

    return backward


class _Under:
    """Our ops, with a backward pass of attention under one schedule."""

    sdpa = staticmethod(ops.sdpa)

    def __init__(self, schedule: BackwardSchedule) -> None:
        self.sdpa_backward = gradients_under(schedule)


@pytest.mark.parametrize("which, n", [("dq", 256), ("dk", 193), ("dv", 193)])
def test_attention_adds_its_gradients_as_declared_in_every_batch_under_every_schedule(which: str, n: int):
    dtype = torch.bfloat16
    declared = declared_tree("mm", n, dtype, "cuda")
    for called, rows in ((ops, 1), (ops, 17), *((_Under(s), 2) for s in BACKWARD_SCHEDULES)):
        found = tree_in_batch(lambda x, called=called: attention_gradients(called, x, which), n, rows, dtype, DEVICE)
        assert_refined(declared, found, f"{which} of {rows} rows", exactly=_is_hopper())


# --- control ---------------------------------------------------------------------------------------------------------

STOCK: dict[str, Callable[[Tensor], Tensor]] = {
    "mm": lambda x: torch.mm(x, ones(x, x.shape[1], 64))[:, 0],
    "linear": lambda x: F.linear(x, ones(x, 4096, x.shape[1]))[:, 0],
}


def test_stock_products_change_their_tree_with_the_batch():
    def tree(fn: Callable[[Tensor], Tensor], dtype: torch.dtype, rows: int) -> str:
        x = torch.zeros(rows, 512, dtype=dtype, device=DEVICE)

        def last_row(summands: Tensor) -> Tensor:
            x[-1] = summands
            return fn(x)[-1]

        try:
            return str(summation_tree(last_row, 512, dtype=dtype, device=DEVICE))
        except ValueError as no_tree:  # a sum of another kind
            return str(no_tree)

    found = {
        (name, dtype): {rows: tree(fn, dtype, rows) for rows in (1, 2, 16, 256)}
        for name, fn in STOCK.items()
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert any(len(set(trees.values())) > 1 for trees in found.values()), found
