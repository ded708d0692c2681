"""Scatters on a GPU: the bits of the reference, and so of the CPU, under every schedule."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bicompile.lowering.scatter.op  # noqa: F401 (registers the ops)
from bicompile.lowering.scatter import gpu, reference
from bicompile.lowering.scatter.schedule import REFERENCE, ElementSchedule, RowSchedule
from bicompile.testing import same_bits

ROOT = Path(__file__).resolve().parents[2]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
REDUCTIONS = ("sum", "prod", "mean", "amax", "amin")
ops = torch.ops.bicompile
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def spread(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Normal values over 16 binades."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    return (x * torch.exp2(torch.randint(-8, 8, shape, generator=g).double())).to(dtype)


def indices(shape: tuple[int, ...], count: int, seed: int = 0, least: int = 0) -> Tensor:
    return torch.randint(least, count, shape, generator=torch.Generator().manual_seed(seed))


def on_gpu(x: Any) -> Any:
    """``x`` on the GPU with its strides, tensors in lists too."""
    if isinstance(x, Tensor):
        once = x[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in x.stride())]
        y = torch.empty_strided(once.shape, once.stride(), dtype=x.dtype, device="cuda").copy_(once)
        return y.expand(x.shape)
    return [on_gpu(item) for item in x] if isinstance(x, list) else x


def assert_is_reference(name: str, *args: Any) -> None:
    result = getattr(ops, name)(*map(on_gpu, args))
    assert result.is_cuda and result.is_contiguous()
    assert same_bits(result.cpu(), getattr(reference, name)(*args))


@every_dtype
@pytest.mark.parametrize("shape", [(5, 70), (3, 5, 7), (2, 5, 90), (5,)], ids=str)
def test_index_add_is_that_of_the_reference(shape: tuple[int, ...], dtype: torch.dtype):
    dim = max(len(shape) - 2, 0)
    for n, alpha in ((0, 1.0), (1, 1.0), (60, 0.3)):
        self, at = spread(shape, dtype, 0), indices((n,), 5)
        source = spread((*shape[:dim], n, *shape[dim + 1 :]), dtype, 1)
        assert_is_reference("index_add", self, dim, at, source, alpha)
        if len(shape) > 1:
            across = source.transpose(0, -1).contiguous().transpose(0, -1)
            assert_is_reference("index_add", self, dim, at.int(), across, alpha)


@pytest.mark.parametrize(
    ("reduce", "include_self", "dtype"),
    [
        *((reduce, include_self, torch.float32) for reduce in REDUCTIONS for include_self in (True, False)),
        *(("mean", False, dtype) for dtype in DTYPES[1:]),
    ],
    ids=str,
)
def test_scatter_reduce_is_that_of_the_reference(reduce: str, include_self: bool, dtype: torch.dtype):
    self, src = spread((6, 3, 4), dtype, 0), spread((40, 3, 4), dtype, 1)
    for at in (indices((39, 2, 4), 6), indices((39, 1, 1), 6).expand(39, 3, 4), indices((0, 3, 4), 6)):
        assert_is_reference("scatter_reduce", self, 0, at, src, reduce, include_self)
    assert_is_reference("scatter_reduce", self, -1, indices((6, 2, 4), 4), src[:6], reduce, include_self)
    assert_is_reference("scatter_reduce", self[0, 0, 0], 0, indices((), 1), src[0, 0, 0], reduce, include_self)


@every_dtype
def test_other_ops_are_those_of_the_reference(dtype: torch.dtype):
    self, src = spread((60,), dtype, 0), spread((50,), dtype, 1)
    assert_is_reference("scatter_add", self, 0, indices((50,), 60), src)
    grid = spread((4, 5, 6), dtype, 2)
    for at in (
        [indices((70,), 4, 3, -4)],
        [None, indices((2, 6), 5, 4, -5)],
        [indices((8, 1), 4, 5), None, indices((3,), 6, 6)],
        [grid[..., 0] > 0],
    ):
        place = grid[tuple(slice(None) if i is None else i for i in at)].shape
        assert_is_reference("index_put_accumulate", grid, at, spread(place, dtype, 7))
        assert_is_reference("index_put_accumulate", grid, at, spread((1,), dtype, 8))
    for scale in (False, True):
        for shape, padding in (((30,), -1), ((4, 9), 2), ((0,), -1), ((), 0)):
            arguments = spread((*shape, 130), dtype, 0), indices(shape, 6, 1), 6, padding, scale
            assert_is_reference("embedding_dense_backward", *arguments)


@pytest.mark.parametrize(
    "schedule",
    [
        *(REFERENCE, RowSchedule(32, 1, 8, 16, 32, 4), RowSchedule(64, 2, 1, 8, 64, 8)),
        *(RowSchedule(256, 1, 8, 64, 128, 4), RowSchedule(1024, 4, 4, 128, 32, 8)),
    ],
    ids=str,
)
def test_every_row_schedule_has_the_same_bits(schedule: RowSchedule):
    """Segments of 1 to 1000 contributions: whole stretches, ragged ends, both."""
    at = torch.cat([torch.full((count,), d) for d, count in enumerate((1, 2, 7, 8, 9, 33, 100, 1000))])
    at = at[torch.randperm(len(at), generator=torch.Generator().manual_seed(0))]
    self, source = spread((9, 200), torch.float32, 0), spread((len(at), 200), torch.float32, 1)
    expected = reference.index_add(self, 0, at, source)
    assert same_bits(
        gpu.walk_rows(self[None].cuda(), at.cuda(), source[None].cuda(), 9, schedule=schedule)[0], expected
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("schedule", [("columns", 32, 1), ("columns", 64, 8), ("sorted", 128, 8)], ids=str)
def test_every_element_schedule_has_the_same_bits(schedule: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu, "element_schedule_for", lambda *sizes: ElementSchedule(*schedule))
    self, src = spread((4, 77), dtype, 0), spread((300, 77), dtype, 1)
    assert_is_reference("scatter_add", self, 0, indices((300, 77), 4), src)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_row_has_same_bits_in_any_batch(dtype: torch.dtype):
    """Alone, in any order, among NaN rows, and at an odd offset in memory."""
    self, src, at = spread((50, 9, 33), dtype, 0), spread((50, 40, 33), dtype, 1), indices((50, 40, 33), 9)
    self, src, at = self.cuda(), src.cuda(), at.cuda()
    order = torch.randperm(50, device="cuda")

    def call(self: Tensor, at: Tensor, src: Tensor) -> list[Tensor]:
        everything = [ops.scatter_reduce(self, 1, at, src, reduce, True) for reduce in REDUCTIONS]
        return [*everything, ops.index_add(self, 1, at[0, :, 0], src, 1.0)]

    whole = call(self, at, src)
    same_first = at.clone()
    same_first[:, :, 0] = at[0, :, 0]
    for row in (0, 17, 49):
        alone = call(self[row : row + 1], at[row : row + 1], src[row : row + 1])[:-1]
        assert same_bits(alone, [x[row : row + 1] for x in whole[:-1]])
        poisoned = torch.full_like(src, math.nan)
        poisoned[row] = src[row]
        assert same_bits([x[row] for x in call(self, at, poisoned)], [x[row] for x in whole])
    moved = call(self[order], at[order], src[order])[:-1]
    assert same_bits(moved, [x[order] for x in whole[:-1]])
    shifted = torch.cat([src.new_zeros(1), src.reshape(-1)])[1:].view(src.shape)
    assert same_bits(call(self, at, shifted), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_segment_has_same_bits_whatever_goes_elsewhere(dtype: torch.dtype):
    """Trap 30, in one index: another destination's contributions, between or before, do not enter a sum."""
    source, at = spread((6000, 200), dtype, 0).cuda(), indices((6000,), 4, 1).cuda()
    mine = at == 2
    whole = ops.embedding_dense_backward(source, at, 4, -1, False)
    assert same_bits(ops.embedding_dense_backward(source[mine], at[mine], 4, -1, False)[2], whole[2])
    zeros = torch.zeros(4, 200, dtype=dtype, device="cuda")
    assert same_bits(ops.index_add(zeros, 0, at, source, 1.0), whole)
    assert same_bits(ops.scatter_add(zeros, 0, at[:, None].expand(-1, 200), source), whole)
    assert same_bits(ops.scatter_add(zeros, 0, at[:, None].repeat(1, 200), source), whole)
    assert same_bits(ops.index_put_accumulate(zeros, [at], source), whole)


def test_large_scatter_is_the_same_twice_and_that_of_the_reference():
    """Trap 17: no atomics.  Half of the contributions go to one destination."""
    at = torch.where(torch.rand(20_000) < 0.5, 7, indices((20_000,), 1000))
    grad = spread((20_000, 264), torch.bfloat16, 0)
    expected = reference.embedding_dense_backward(grad, at, 1000, -1, False)
    for _ in range(3):
        assert same_bits(ops.embedding_dense_backward(grad.cuda(), at.cuda(), 1000, -1, False).cpu(), expected)


def test_nothing_waits_for_the_gpu_and_all_can_be_captured():
    self, source, at = (
        spread((9, 70), torch.float32, 0).cuda(),
        spread((50, 70), torch.float32, 1).cuda(),
        indices((50,), 9),
    )
    at = at.cuda()
    everywhere = indices((50, 70), 9).cuda()
    calls: list[Callable[[], Tensor]] = [
        lambda: ops.index_add(self, 0, at, source, 1.0),
        lambda: ops.scatter_reduce(self, 0, everywhere, source, "mean", False),
        lambda: ops.index_put_accumulate(self, [at], source),
        lambda: ops.embedding_dense_backward(source, at, 9, 3, True),
    ]
    expected = [call() for call in calls]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for call in calls:
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [call() for call in calls]
    graph.replay()
    assert same_bits(captured, expected)


def test_sums_are_no_worse_than_stock():
    for dtype in DTYPES:
        self, source, at = (
            spread((5, 30), dtype, 0).cuda(),
            spread((400, 30), dtype, 1).cuda(),
            indices((400,), 5).cuda(),
        )
        exact = torch.index_add(self.double(), 0, at, source.double())
        stock = torch.index_add(self, 0, at, source).double()
        ours = ops.index_add(self, 0, at, source, 1.0).double()
        floor = torch.finfo(torch.float64).eps * 80 * exact.abs().max()
        assert (ours - exact).abs().max() <= 2 * (stock - exact).abs().max() + floor


def test_wrong_arguments_are_named():
    x, at = torch.ones(3, 4, device="cuda"), torch.tensor([0, 1], device="cuda")
    for message, call in {
        "index_add: expected a source of shape": lambda: ops.index_add(x, 0, at, x, 1.0),
        "index_add: expected a source of dtype torch.float32": lambda: ops.index_add(x, 0, at, x[:2].double(), 1.0),
        "index_add: expected int64 or int32 indices": lambda: ops.index_add(x, 0, at.float(), x[:2], 1.0),
        r"index_add: expected a dim in \[-2, 2\) for shape \(3, 4\), got 2": lambda: ops.index_add(
            x, 2, at, x[:2], 1.0
        ),
        "scatter_add: expected an index no larger": lambda: ops.scatter_add(x, 0, at.expand(5, 2), x),
        "scatter_add: expected index and src of 2 dims": lambda: ops.scatter_add(x, 0, at, x),
        "scatter_add: expected float32, float64": lambda: ops.scatter_add(x.long(), 0, at[None], x.long()),
        "expected reduce to be": lambda: ops.scatter_reduce(x, 0, at[None], x, "median", True),
        "expected a grad of the shape": lambda: ops.embedding_dense_backward(x, at, 3, -1, False),
        "segment_add: expected self": lambda: ops.segment_add(x, at, x[:2]),
    }.items():
        with pytest.raises((RuntimeError, ValueError, IndexError), match=message):
            call()


_OUT_OF_RANGE = """
import torch
import bicompile.lowering.scatter.op
x, at = torch.ones(3, 4, device="cuda"), torch.tensor([0, 3], device="cuda")
torch.ops.bicompile.index_add(x, 0, at, x[:2], 1.0)
torch.cuda.synchronize()
"""


def test_index_out_of_range_fails_an_assertion_on_the_device():
    """In a process of its own: after such a failure no process can use the GPU any more."""
    command = [sys.executable, "-c", _OUT_OF_RANGE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "index out of range" in done.stderr + done.stdout
