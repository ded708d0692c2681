"""The op map: what becomes of every op of PyTorch's own test database, OpInfo, on the CPU.

Each op runs on its sample inputs inside ``bicompile.eager()``, which holds the lowerings that compiled code has, and on
request compiled too.  It is *refused* by name, or its values are those of stock PyTorch, and where a dim of its inputs
holds rows (slicing the inputs slices the result), every row has the same bits alone, permuted and in part of the batch.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from .. import eager_mode
from ..errors import GraphBreakError, UnsupportedOpError
from ..passes.op_classes import exact_by_name, is_view, op_name
from ..testing import assert_batch_invariant

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
KINDS = ("exact", "elementwise", "lowered", "refused", "wrong")
"""From the best to the worst; an op is what the worst of its samples is."""

SITUATIONS = ("alone", "permuted", "sub-batch")
# How far values may be from stock's, as a share of the largest in the tensor, beyond twice stock's own error.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
# What stays in memory from before is nobody's to compare.
_UNDEFINED = ("empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided")


@dataclass
class Entry:
    """What became of one op in one dtype.

    Attributes:
        op: its name in OpInfo, with its variant.
        dtype: as text.
        kind: one of ``KINDS``.
        samples: how many sample inputs were tried.
        rows: in how many of them rows were found, and compared.
        compiled: whether compiled code was tried too.
        detail: our ops that ran; for ``refused``, why; for ``wrong``, what is.
    """

    op: str
    dtype: str
    kind: str = "exact"
    samples: int = 0
    rows: int = 0
    compiled: bool = False
    detail: list[str] = field(default_factory=list)

    def note(self, kind: str, detail: Iterable[str] = ()) -> None:
        """Make the entry at least as bad as ``kind``; the details are those of the worst kind met."""
        if KINDS.index(kind) > KINDS.index(self.kind):
            self.kind, self.detail = kind, []
        if kind == self.kind:
            self.detail = list(dict.fromkeys([*self.detail, *detail]))


def op_infos(dtype: torch.dtype) -> list[Any]:
    """The entries of PyTorch's database that support ``dtype`` on the CPU and run without a GPU's compiler."""
    from torch.testing._internal.common_methods_invocations import op_db

    return [op for op in op_db if op.supports_dtype(dtype, "cpu") and not op.name.startswith("jiterator")]


def name_of(info: Any) -> str:
    """The op's name, with its variant."""
    return f"{info.name}.{info.variant_test_name}" if info.variant_test_name else str(info.name)


def entry_of(info: Any, dtype: torch.dtype, max_samples: int, compiled: bool = False) -> Entry:
    """Try up to ``max_samples`` sample inputs of one op; with ``compiled``, one of them compiled too."""
    entry = Entry(name_of(info), str(dtype).removeprefix("torch."))
    to_compile: tuple[Any, Any, Stock] | None = None
    for args, kwargs in _samples(info, dtype, max_samples):
        stock = _stock(info.op, args, kwargs)
        if stock is None:  # PyTorch refuses its own sample
            continue
        entry.samples += 1
        with _faults_into(entry):
            with _Recorder() as ran, eager_mode.eager():
                ours = _run(info.op, args, kwargs)
            entry.note(*ran.kind())
            if entry.op in _UNDEFINED:
                continue
            stock.compare(ours, dtype)
            covered = _in_eager(info.op)
            has_rows = _compare_rows(covered, covered if stock.drawn else info.op, args, kwargs, dtype)
            if to_compile is None or (has_rows and not entry.rows):
                to_compile = args, kwargs, stock
            entry.rows += has_rows
    if compiled and to_compile is not None:
        entry.compiled = True
        with _faults_into(entry):
            try:
                _try_compiled(info.op, *to_compile, dtype)
            except GraphBreakError:  # such as for a generator among the arguments
                entry.compiled = False
    return entry


@contextlib.contextmanager
def _faults_into(entry: Entry) -> Iterator[None]:
    """Note what is raised as a refusal, or, whatever it is, as a fault of ours."""
    try:
        yield
    except UnsupportedOpError as error:
        entry.note("refused", [refused_op(str(error))])
    except Exception as error:
        entry.note("wrong", [f"{type(error).__name__}: {str(error).strip()[:300]}"])


def refused_op(message: str) -> str:
    """The op that a refusal names, of eager code (``aten.x: no ...``) or of a graph (``  aten.x -> float32...``)."""
    found = re.search(r"(\w+\.\w+\.\w+)(?:: | -> )", message)
    return found[1] if found else message.partition(":")[0]


class _Recorder(TorchDispatchMode):
    """Which ops run in the end, seen from below ``eager()``."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: dict[Any, bool] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        real = any(t.is_floating_point() or t.is_complex() for t in _tensors((args, kwargs)))
        self.ops[func] = self.ops.get(func, False) or real
        return func(*args, **(kwargs or {}))

    def kind(self) -> tuple[str, list[str]]:
        """The worst kind among the ops that ran, and our ops among them."""
        ours = sorted(op_name(op) for op in self.ops if op.namespace == "bicompile")
        lowered = [name for name in ours if name not in ("bicompile.unary", "bicompile.binary")]
        if lowered:
            return "lowered", lowered
        computes = any(real and not exact_by_name(op) and not is_view(op) for op, real in self.ops.items())
        return ("elementwise" if computes else "exact"), ours


def _samples(info: Any, dtype: torch.dtype, count: int) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    with _same_random_numbers(), contextlib.suppress(NotImplementedError):
        # Not info.sample_inputs(), which looks through the whole stack for the test that asks.
        for sample in itertools.islice(info.sample_inputs_func(info, "cpu", dtype, requires_grad=False), count):
            yield (sample.input, *sample.args), sample.kwargs


def _run(op: Callable[..., Any], args: Any, kwargs: Any, seed: int = 0) -> Any:
    """``op`` on copies of its arguments, which it may change, from one random state."""
    args, kwargs = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, (args, kwargs))
    with _same_random_numbers(seed):
        return op(*args, **kwargs)


@contextlib.contextmanager
def _same_random_numbers(seed: int = 0) -> Iterator[None]:
    """Start from one random state of the CPU and put the caller's back; ``torch.manual_seed`` asks for every device.

    The database's ops that draw start from one of their own: this one counts.
    """
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        with mock.patch.object(torch, "manual_seed", lambda seed: torch.default_generator):
            yield
    finally:
        torch.set_rng_state(state)


@dataclass(frozen=True)
class Stock:
    """What stock PyTorch gives, how far each of its tensors is from the same computed in float64, and that if known.

    ``drawn``: it draws random numbers, which ours are not.
    """

    tensors: list[Tensor]
    errors: list[float]
    exact: list[Tensor] = field(default_factory=list)
    drawn: bool = False

    def compare(self, ours: Any, dtype: torch.dtype) -> None:
        """Raise unless shapes, dtypes and values are stock's; all else in a result follows from its tensors."""
        if self.drawn:
            forms = [[(t.shape, t.dtype) for t in tensors] for tensors in (_tensors(ours), self.tensors)]
            assert forms[0] == forms[1], f"expected tensors of {forms[1]}, got {forms[0]}"
            return
        for i, (a, b) in enumerate(zip(_tensors(ours), self.tensors, strict=True)):
            if not (self.exact and _no_further(a, b, self.exact[i])):
                _compare(a, b, dtype, 2 * self.errors[i])


def _stock(op: Callable[..., Any], args: Any, kwargs: Any) -> Stock | None:
    """What stock PyTorch gives; None where it raises."""
    try:
        tensors = _tensors(_run(op, args, kwargs))
    except Exception:
        return None
    again = _tensors(_run(op, args, kwargs, seed=1))
    if not all(map(_equal, tensors, again)):
        return Stock(tensors, [], drawn=True)
    try:
        wide = tree_map(_widened, (args, kwargs))
        exact = _tensors(_run(op, *wide))
        errors = [distance(a, b) for a, b in zip(tensors, exact, strict=True)]
    except Exception:  # not an op of float64
        return Stock(tensors, [0.0] * len(tensors))
    return Stock(tensors, errors, exact)


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.layout != torch.strided:
        return a.shape == b.shape
    a, b = (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in (a, b))
    return torch.equal(a.nan_to_num(), b.nan_to_num()) if a.is_floating_point() else torch.equal(a, b)


def _no_further(a: Tensor, b: Tensor, exact: Tensor) -> bool:
    """Whether finite ``a`` is as near to ``exact`` as stock's ``b``, all numbers together: stock's kernel may be rough.

    Together, not the worst of them: a function that jumps is far from itself in float64 in a place or two.
    """
    alike = (a.shape, a.dtype) == (b.shape, b.dtype) and a.shape == exact.shape and a.layout == torch.strided
    if not alike or not a.is_floating_point() or not bool(a.isfinite().all() and b.isfinite().all()):
        return False
    return bool((a.double() - exact).norm() <= (b.double() - exact).norm())


def _widened(leaf: Any) -> Any:
    if isinstance(leaf, torch.dtype):
        return torch.float64 if leaf.is_floating_point else leaf
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference between finite numbers; 0 where there are none."""
    if not a.is_floating_point() or a.layout != torch.strided:
        return 0.0
    differences = (a.double() - b.double()).abs()
    return float(differences.nan_to_num(nan=0.0, posinf=0.0).max()) if differences.numel() else 0.0


def _in_eager(op: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with eager_mode.eager():
            return op(*args, **kwargs)

    return run


def _compare(a: Tensor, b: Tensor, dtype: torch.dtype, slack: float = 0.0) -> None:
    """Raise unless ``a`` is nearly ``b``; a statistic may be kept in more bits than stock keeps.

    ``slack`` counts up to a tenth of the largest number: a function that jumps, such as floor, is far from itself in
    float64, and must not be let off for it.
    """
    if a.is_floating_point() and torch.promote_types(a.dtype, b.dtype) == a.dtype:
        a = a.to(b.dtype)
    finite = b[b.isfinite()] if b.is_floating_point() or b.is_complex() else b.new_empty(0)
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    atol = _TOLERANCE[dtype] * largest + min(slack, 0.1 * largest)
    assert_close(a, b, rtol=0.0, atol=atol, equal_nan=True, check_stride=False)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _compare_rows(run: Callable[..., Any], op: Callable[..., Any], args: Any, kwargs: Any, dtype: torch.dtype) -> bool:
    """Whether dim 0 holds rows, by what stock PyTorch gives for slices; if so, raise unless rows keep their bits."""
    first = args[0]
    if not isinstance(first, Tensor) or first.dim() == 0 or first.shape[0] < 2 or first.layout != torch.strided:
        return False
    for batched in (lambda t: t is first, lambda t: t.dim() > 0 and t.shape[0] == first.shape[0]):
        if _has_rows(op, args, kwargs, batched, dtype):
            rows, rest = _split((args, kwargs), batched)

            def of_rows(*rows: Tensor, rest: Callable[..., Any] = rest) -> Any:
                return _run(run, *rest(rows))

            assert_batch_invariant(of_rows, *rows, situations=SITUATIONS)
            return True
    return False


def _split(arguments: Any, batched: Callable[[Tensor], bool]) -> tuple[list[Tensor], Callable[..., Any]]:
    """The tensors that hold rows, and a function that puts others in their places."""
    rows = [leaf for leaf in _tensors(arguments) if batched(leaf)]
    places = {id(leaf): index for index, leaf in enumerate(rows)}

    def with_rows(others: Any) -> Any:
        return tree_map(lambda leaf: others[places[id(leaf)]] if id(leaf) in places else leaf, arguments)

    return rows, with_rows


def _has_rows(
    op: Callable[..., Any], args: Any, kwargs: Any, batched: Callable[[Tensor], bool], dtype: torch.dtype
) -> bool:
    """Whether stock's results for each row alone, all reversed, and all but one are nearly rows of the whole result."""
    rows, rest = _split((args, kwargs), batched)
    count = rows[0].shape[0]
    try:
        whole = _tensors(_run(op, args, kwargs))
        if not whole or any(t.dim() == 0 or t.shape[0] != count for t in whole):
            return False
        everything = torch.arange(count)
        for chosen in (everything.flip(0), everything[1:], *everything.split(1)):
            part = _tensors(_run(op, *rest([t[chosen] for t in rows])))
            for a, b in zip(part, whole, strict=True):
                _compare(a, b[chosen], dtype)
    except Exception:  # not something that can be sliced
        return False
    return True


def _try_compiled(op: Callable[..., Any], args: Any, kwargs: Any, stock: Stock, dtype: torch.dtype) -> None:
    """Raise unless compiled code gives stock's values, and rows their bits."""
    torch._dynamo.reset()  # the function below has one code object for all ops
    compiled = torch.compile(lambda *args, **kwargs: op(*args, **kwargs), backend="batch_invariant")
    with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
        stock.compare(_run(compiled, args, kwargs), dtype)
        _compare_rows(compiled, compiled if stock.drawn else op, args, kwargs, dtype)


def sample_of(infos: list[Any], count: int, seed: int | str) -> list[Any]:
    """``count`` of the ops, others for every seed."""
    return random.Random(seed).sample(infos, min(count, len(infos)))
