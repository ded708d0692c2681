"""Mutants: one lowering, rule or pass is broken at a time, and a check of the kit must notice.

Controls with stock PyTorch are in test_power.py.  Here each check first passes with the part replaced by its plain
reference, or left alone, and then fails with the same part broken, so that nothing but the flaw is what it finds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bicompile
from bicompile.lowering import loading
from bicompile.lowering.attention import reference as attention
from bicompile.lowering.matmul import reference as matmul
from bicompile.lowering.reduction import reference as reduction
from bicompile.lowering.scan import reference as scan
from bicompile.lowering.scatter import reference as scatter
from bicompile.lowering.softmax import reference as softmax
from bicompile.passes import certify, lower_reductions, pipeline
from bicompile.passes.rewriting import Replacement
from bicompile.testing import assert_batch_invariant, same_bits, search, summation_tree, tree_difference
from bicompile.testing.declared import declared_order, declared_trees
from bicompile.testing.strategies import scattered_values

aten, ops = torch.ops.aten, torch.ops.bicompile
Patch = pytest.MonkeyPatch
pytestmark = pytest.mark.filterwarnings("ignore:Warning only once for all operators:UserWarning")  # kernel() means it
MUTANTS: dict[str, tuple[Callable[[Patch, bool], Any], Callable[[], None]]] = {}


def mutant(name: str, check: Callable[[], None]) -> Callable[..., Any]:
    """Name the decorated function: it puts a part in its place, broken or not, until its context is left."""

    def add(install: Callable[[Patch, bool], Any]) -> Callable[[Patch, bool], Any]:
        MUTANTS[name] = (install, check)
        return install

    return add


@contextlib.contextmanager
def kernel(op: str, fn: Callable[..., Any]) -> Iterator[None]:
    """``fn`` as the CPU kernel of one of our ops."""
    overload = getattr(ops, op).default
    loading.load(loading.LIBRARY_OF[f"bicompile::{op}"])  # or it would take the place of ``fn`` when it is
    library = torch.library.Library("bicompile", "IMPL")
    library.impl(op, fn, "CPU", allow_override=True)
    overload._dispatch_cache.clear()
    try:
        yield
    finally:
        library._destroy()
        overload._dispatch_cache.clear()


@contextlib.contextmanager
def order_of(module: ModuleType, **sizes: int) -> Iterator[None]:
    """Let the reference ``module`` follow its order with other ``sizes``."""
    original = module.order_for
    module.order_for = lambda *args: dataclasses.replace(original(*args), **sizes)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.order_for = original  # type: ignore[attr-defined]


def eagerly(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn`` with our lowerings, not compiled."""

    @functools.wraps(fn)
    def run(*args: Any) -> Any:
        with bicompile.eager():
            return fn(*args)

    return run


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return scattered_values(shape, dtype, seed)


# --- matrix products -----------------------------------------------------------------------------------------------

WEIGHT, HALF_WEIGHT = values(6, 40, seed=1), values(32, 40, seed=1, dtype=torch.bfloat16)
HALF_BIAS = values(32, seed=2, dtype=torch.bfloat16)


def linear_keeps_rows() -> None:
    assert_batch_invariant(eagerly(lambda x: F.linear(x, WEIGHT)), values(5, 40))


def bias_is_an_addition_of_its_own() -> None:
    """One layer traces to ``addmm`` in one batch and to a product and a sum in another."""

    def layer(x: Tensor) -> Tensor:
        if len(x) == 1:
            return F.linear(x, HALF_WEIGHT, HALF_BIAS)
        return x @ HALF_WEIGHT.T + HALF_BIAS

    assert_batch_invariant(eagerly(layer), values(5, 40, dtype=torch.bfloat16))


@mutant("the order of a product follows the number of rows", linear_keeps_rows)
def _product_follows_rows(patch: Patch, broken: bool) -> Any:
    def mm(a: Tensor, b: Tensor) -> Tensor:
        with order_of(matmul, block=16 if broken and len(a) == 1 else 8):
            return matmul.mm(a, b)

    return kernel("mm", mm)


@mutant("one row is multiplied and summed, as Inductor does", linear_keeps_rows)
def _one_row_is_summed(patch: Patch, broken: bool) -> Any:
    stock = pipeline.RULES[aten.mm.default]

    def rule(op: Any, args: dict[str, Any]) -> Replacement | None:
        a, b = args["self"], args["mat2"]
        if broken and len(a) == 1:
            return Replacement(ops.sum.default, (a.T * b, [0], True, a.dtype))
        return stock(op, args)

    patch.setitem(pipeline.RULES, aten.mm.default, rule)
    return contextlib.nullcontext()


@mutant("the bias is added before rounding", bias_is_an_addition_of_its_own)
def _bias_before_rounding(patch: Patch, broken: bool) -> Any:
    def addmm(c: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> Tensor:
        if broken:
            return (a.float() @ b.float() + c.float()).to(a.dtype)
        return matmul.addmm(c, a, b, beta, alpha)

    return kernel("addmm", addmm)


@mutant("the bias is rounded twice", bias_is_an_addition_of_its_own)
def _bias_rounded_twice(patch: Patch, broken: bool) -> Any:
    def addmm(c: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> Tensor:
        return matmul.addmm(c.to(torch.float8_e5m2).to(c.dtype) if broken else c, a, b, beta, alpha)

    return kernel("addmm", addmm)


# --- reductions, scans, scatters -----------------------------------------------------------------------------------


def sum_keeps_rows() -> None:
    assert_batch_invariant(eagerly(lambda x: x.sum(-1)), values(5, 100), situations=["alone", "offset", "strided"])


def sum_ignores_threads() -> None:
    search(eagerly(lambda x: x.sum(-1)), values(3, 100), max_examples=30, seed=0)


def sum_has_its_tree() -> None:
    declared = declared_trees(declared_order("sum", 70, torch.float32), 70)["elements"]
    found = summation_tree(lambda x: ops.sum(x[None], [1], False, x.dtype)[0], 70)
    assert tree_difference(declared, found) is None


def scatter_has_its_tree() -> None:
    declared = declared_trees(declared_order("index_add", 12, torch.float32), 12)
    found = summation_tree(lambda x: ops.index_add(torch.zeros(2), 0, torch.ones(12).long(), x, 1.0)[1], 12)
    assert tree_difference(*declared.values(), found) is None


def scan_ignores_what_follows() -> None:
    search(eagerly(lambda x: x.cumsum(1)), values(3, 9), seq_dim=1, max_examples=30, seed=0)


def _sum_in(lanes: Callable[[Tensor], int]) -> Any:
    def total(x: Tensor, dim: list[int], keepdim: bool, dtype: torch.dtype) -> Tensor:
        with order_of(reduction, lanes=lanes(x)):
            return reduction.sum(x, dim, keepdim, dtype)

    return kernel("sum", total)


@mutant("the tree of a sum follows alignment", sum_keeps_rows)
def _sum_follows_alignment(patch: Patch, broken: bool) -> Any:
    return _sum_in(lambda x: 16 if broken and x.data_ptr() % 64 else 32)


@mutant("a sum is shared out among threads", sum_ignores_threads)
def _sum_follows_threads(patch: Patch, broken: bool) -> Any:
    return _sum_in(lambda x: 16 if broken and torch.get_num_threads() == 1 else 32)


@mutant("a sum goes through its row from the end", sum_has_its_tree)
def _sum_descends(patch: Patch, broken: bool) -> Any:
    return kernel("sum", lambda x, *rest: reduction.sum(x.flip(-1) if broken else x, *rest))


@mutant("a scatter adds its contributions in descending order", scatter_has_its_tree)
def _scatter_descends(patch: Patch, broken: bool) -> Any:
    def index_add(x: Tensor, dim: int, index: Tensor, source: Tensor, alpha: float) -> Tensor:
        return (
            scatter.index_add(x, dim, index.flip(0), source.flip(dim), alpha)
            if broken
            else scatter.index_add(x, dim, index, source, alpha)
        )

    return kernel("index_add", index_add)


@mutant("a scan is cut into halves of its length", scan_ignores_what_follows)
def _scan_in_halves(patch: Patch, broken: bool) -> Any:
    def cumsum(x: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
        if not broken:
            return scan.cumsum(x, dim, dtype)
        first, second = (scan.cumsum(part, dim, dtype) for part in x.tensor_split(2, dim))
        return torch.cat([first, first.narrow(dim, -1, 1) + second], dim)

    return kernel("cumsum", cumsum)


# --- softmax and elementwise functions -----------------------------------------------------------------------------


def softmax_keeps_rows() -> None:
    assert_batch_invariant(eagerly(lambda x: x.softmax(-1)), values(5, 33), situations=["alone", "sub-batch"])


def exp_keeps_rows() -> None:
    assert_batch_invariant(eagerly(torch.exp), values(5, 13), situations=["alone", "permuted"])


@mutant("a softmax subtracts the largest number of the batch", softmax_keeps_rows)
def _softmax_over_the_batch(patch: Patch, broken: bool) -> Any:
    if broken:
        patch.setattr(softmax, "largest", lambda rows: rows.amax())
    return kernel("softmax", softmax.softmax)


@mutant("the vector code of exp is not its scalar code", exp_keeps_rows)
def _exp_of_a_tail(patch: Patch, broken: bool) -> Any:
    def unary(x: Tensor, name: str) -> Tensor:
        y = torch.exp(x.double()).float()
        if broken:
            tail = y.view(-1)[y.numel() - y.numel() % 8 :]
            tail.copy_(torch.nextafter(tail, torch.tensor(0.0)))
        return y

    return kernel("unary", unary)


# --- attention -----------------------------------------------------------------------------------------------------
# Blocks of 4 keys, so that short rows have several.


def _attend(x: Tensor, seen: Tensor) -> Tensor:
    """Causal attention of ``[B, T, D]`` to the positions that ``seen`` [B, T] names."""
    q = x[:, None]
    mask = seen[:, None, None] & torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)[:, 0]


def attention_ignores_padding() -> None:
    inputs = torch.randn(2, 9, 3, generator=torch.Generator().manual_seed(0)), torch.ones(2, 9, dtype=torch.bool)
    search(eagerly(_attend), *inputs, seq_dim=1, new_values=False, max_rows=3, max_examples=25, seed=0)


def hidden_values_do_not_count() -> None:
    x, seen = values(1, 6, 3), torch.tensor([[True] * 5 + [False]])
    nan = x.clone()
    nan[:, 5] = float("nan")
    attend = eagerly(_attend)
    assert same_bits(attend(x, seen)[:, :5], attend(nan, seen)[:, :5])


def prefill_equals_decode() -> None:
    x = torch.randn(1, 1, 11, 3, generator=torch.Generator().manual_seed(0))
    attend = eagerly(functools.partial(F.scaled_dot_product_attention))
    whole = eagerly(lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True))(x)
    steps = [attend(x[:, :, t : t + 1], x[:, :, : t + 1], x[:, :, : t + 1]) for t in range(11)]
    assert same_bits(torch.cat(steps, 2), whole)


def _sdpa(sizes: Callable[[Tensor], dict[str, int]] = lambda q: {}, masked: bool = True) -> Any:
    def sdpa(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        with order_of(attention, **{"block": 4, "lanes": 2, **sizes(q)}):
            out, lse = attention.sdpa(q, k, v, mask if masked else None, causal, scale)
        return out.contiguous(), lse.contiguous()

    return kernel("sdpa", sdpa)


@mutant("the mask is ignored", attention_ignores_padding)
def _mask_ignored(patch: Patch, broken: bool) -> Any:
    return _sdpa(masked=not broken)


@mutant("blocks of keys are counted from key 0, not from the first that is seen", attention_ignores_padding)
def _blocks_from_key_0(patch: Patch, broken: bool) -> Any:
    if broken:
        patch.setattr(attention, "_first", lambda w: torch.zeros(w.shape[:-1], dtype=torch.int64))
    return _sdpa()


@mutant("padding is counted from the wrong side", attention_ignores_padding)
def _blocks_from_the_end(patch: Patch, broken: bool) -> Any:
    if broken:
        patch.setattr(attention, "_first", lambda w: torch.full(w.shape[:-1], w.shape[-1] % 4, dtype=torch.int64))
    return _sdpa()


@mutant("a key of weight zero is multiplied with its value", hidden_values_do_not_count)
def _zero_weights_count(patch: Patch, broken: bool) -> Any:
    if broken:
        patch.setattr(attention, "_weighted_sum", lambda weights, rows, order, first=None: weights @ rows)
    return _sdpa()


@mutant("the split of keys follows the number of queries", prefill_equals_decode)
def _split_follows_queries(patch: Patch, broken: bool) -> Any:
    return _sdpa(lambda q: {"block": 8} if broken and q.shape[2] == 1 else {})


# --- certify -------------------------------------------------------------------------------------------------------


def sums_over_the_batch_are_listed() -> None:
    with torch.no_grad():
        certificate = bicompile.explain(lambda x: x - x.mean(0), torch.randn(3, 4))
    assert [node.op for node in certificate.cross_batch] == ["bicompile.mean.default"]
    assert not certificate.lowered


def unknown_ops_are_refused() -> None:
    with torch.no_grad():
        assert bicompile.explain(lambda x: torch.linalg.pinv(x), torch.randn(3, 2, 2)).refused


def sums_of_rows_are_lowered() -> None:
    with torch.no_grad():
        certificate = bicompile.explain(lambda x: x.sum(-1), torch.randn(3, 4))
    assert certificate.ok and [node.op for node in certificate.lowered] == ["bicompile.sum.default"]


@mutant("certify ignores the batch symbol", sums_over_the_batch_are_listed)
def _batch_symbol_ignored(patch: Patch, broken: bool) -> Any:
    if broken:
        patch.setattr(certify, "mixes_batch", lambda node, batch: False)
    return contextlib.nullcontext()


@mutant("certify takes what it does not know for elementwise", unknown_ops_are_refused)
def _all_is_elementwise(patch: Patch, broken: bool) -> Any:
    if broken:
        patch.setattr(certify, "is_elementwise", lambda node: True)
    return contextlib.nullcontext()


@mutant("a pass is left out", sums_of_rows_are_lowered)
def _pass_left_out(patch: Patch, broken: bool) -> Any:
    if broken:
        others = tuple(p for p in pipeline.PIPELINE if p is not lower_reductions.lower_reductions_pass)
        patch.setattr(pipeline, "PIPELINE", others)
    return contextlib.nullcontext()


@pytest.mark.parametrize("name", MUTANTS)
def test_the_mutant_is_killed_and_nothing_else(name: str, monkeypatch: pytest.MonkeyPatch):
    install, check = MUTANTS[name]
    with monkeypatch.context() as patch, install(patch, False):
        check()
    with monkeypatch.context() as patch, install(patch, True):
        with pytest.raises(AssertionError):
            check()
    check()  # all is as it was
