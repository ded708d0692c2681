"""``assert_batch_invariant``: run a function on the same rows in other company, and compare every row's bits."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from ..errors import BatchInvarianceError
from .bits import difference, same_bits
from .layouts import lay_out
from .situations import SITUATIONS, Situation, fill_rows, situations_for
from .structure import Path, leaves, map_tensors, path_name

# Named tensors of one run: outputs, and gradients of inputs.
Results = dict[str, Any]
_GRADIENT = "gradient of "


def assert_batch_invariant(
    fn: Callable[..., Any],
    *args: Any,
    batch_dim: int = 0,
    check_input_grad: bool = False,
    situations: Sequence[str] | None = None,
    **kwargs: Any,
) -> None:
    """Check that ``fn(*args, **kwargs)`` gives each row the same bits whatever batch the row is in.

    The batch is the size at ``batch_dim`` of the first tensor among ``args`` and ``kwargs``, nested ones included.
    Every tensor with that size at ``batch_dim`` is a batch of rows, except an ``nn.Parameter``; all else is passed on
    as it is.  Outputs are found the same way.  ``fn`` runs on the whole batch, then with each row alone, with rows
    permuted, left out, repeated, next to NaN, Inf, huge, denormal and zero rows, at other memory alignments and
    strides, and once more unchanged.  Integer and boolean inputs of the neighbours are only ever permuted or zero.

    Args:
        fn: a function or module, compiled or not; its outputs may be nested in lists, dicts, dataclasses, objects.
        batch_dim: the dim that holds the rows, in inputs and outputs.
        check_input_grad: also compare gradients with respect to batched floating-point inputs (those that require
            grad, or all if none does), and the forward with autograd against the one without.
        situations: names out of ``SITUATIONS`` to try; all of them by default.

    Raises:
        BatchInvarianceError: a row's bits moved; names output, row, situation and first differing element.
        ValueError: there is nothing to compare, for example no output has the batch at ``batch_dim``.

    The caller's random state is left as it was, and every run starts from it.
    """
    runner = _Runner(fn, args, kwargs, batch_dim, check_input_grad)
    with _room_for_recompiles():
        rows = tuple(range(runner.num_rows))
        whole = runner.run(Situation("again", "in the whole batch", rows))
        runner.require_batched(whole)
        chosen = SITUATIONS if situations is None else tuple(situations)
        for situation in situations_for(runner.num_rows, chosen):
            if runner.can_run(situation):
                runner.compare(whole, situation, runner.run(situation))


class _Runner:
    """Runs one function on rearranged rows of its inputs, and compares what comes out."""

    def __init__(self, fn: Callable[..., Any], args: Any, kwargs: Any, batch_dim: int, check_input_grad: bool) -> None:
        self.fn = fn
        self.name = getattr(fn, "__qualname__", type(fn).__name__)
        self.inputs = (args, kwargs)
        self.batch_dim = batch_dim
        self.check_input_grad = check_input_grad
        self.num_rows = self._find_num_rows()
        batched = [t for t in _tensors(self.inputs) if self._is_batched_input(t)]
        differentiable = [t for t in batched if t.is_floating_point() or t.is_complex()]
        asked = [t for t in differentiable if t.requires_grad]
        if check_input_grad and not differentiable:
            raise ValueError(
                f"assert_batch_invariant({self.name}): check_input_grad needs a floating-point batched input"
            )
        self.grad_ids = {id(t) for t in asked or differentiable} if check_input_grad else set()
        self.dtypes = {t.dtype for t in batched}
        self.cotangents: dict[str, Tensor] = {}

    def run(self, situation: Situation) -> Results:
        """Outputs, and gradients if they are checked, of ``fn`` on the rows of ``situation``."""
        with_grad = situation.name != "autograd"
        sources: list[tuple[str, Tensor]] = []

        def place(path: Path, t: Tensor) -> Tensor:
            if not self._is_batched_input(t):
                return t
            made = self._rows_of(t, situation)
            if with_grad and id(t) in self.grad_ids:
                sources.append((_input_name(path), made))
            return made.requires_grad_(with_grad and (t.requires_grad or id(t) in self.grad_ids))

        args, kwargs = map_tensors(place, self.inputs)
        grad_mode = torch.enable_grad() if sources else contextlib.nullcontext() if with_grad else torch.no_grad()
        with self._same_random_state(), grad_mode:
            outputs = {path_name("output", path): leaf for path, leaf in leaves(self.fn(*args, **kwargs))}
            results = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in outputs.items()}
            if sources:
                results |= self._gradients(outputs, sources, situation)
        return results

    def compare(self, whole: Results, situation: Situation, results: Results) -> None:
        """Raise on the first result whose bits are not those that its rows had in the whole batch."""
        if situation.name == "autograd":
            whole = {name: value for name, value in whole.items() if not name.startswith(_GRADIENT)}
        if whole.keys() != results.keys():
            missing = ", ".join(sorted(whole.keys() ^ results.keys()))
            raise BatchInvarianceError(
                f"assert_batch_invariant({self.name}): {situation.description}, the outputs are others than in the "
                f"whole batch: {missing} in one only",
                situation=situation.name,
            )
        for name, got in results.items():
            expected = whole[name]
            if self._is_per_row(expected, got, situation):
                self._compare_rows(name, expected, got, situation)
            elif situation.name in ("again", "autograd") and not same_bits(expected, got):
                raise BatchInvarianceError(
                    f"assert_batch_invariant({self.name}): {name}, which has no rows, changes {situation.description}: "
                    f"{_shown(expected)} first, then {_shown(got)}",
                    output=name,
                    situation=situation.name,
                )

    def require_batched(self, whole: Results) -> None:
        """Raise if no output has the batch: then every check would pass."""
        if not any(isinstance(v, Tensor) and self._has_size(v, self.num_rows) for v in whole.values()):
            shapes = ", ".join(f"{name}: {_shown(value)}" for name, value in whole.items())
            raise ValueError(
                f"assert_batch_invariant({self.name}): expected an output of size {self.num_rows} at dim "
                f"{self.batch_dim}, got {shapes or 'no output'}; give batch_dim or return per-row results"
            )

    def can_run(self, situation: Situation) -> bool:
        """Whether the inputs can be put into ``situation``: gradients to leave out, dtypes that hold the filling."""
        if situation.name == "autograd":
            return self.check_input_grad
        can_hold = any(dtype.is_floating_point or dtype.is_complex for dtype in self.dtypes)
        return situation.fill in (None, "zero") or can_hold

    def _gradients(self, outputs: Results, sources: list[tuple[str, Tensor]], situation: Situation) -> Results:
        """Gradients of ``sources``, from one fixed random cotangent per output row."""
        ends, cotangents = [], []
        for name, output in outputs.items():
            if not isinstance(output, Tensor) or not output.requires_grad:
                continue
            if not self._has_size(output, len(situation.rows)):
                continue
            if name not in self.cotangents:
                # numpy's: bicompile.eager(), in which this may run, refuses to draw.
                noise = numpy.random.default_rng(len(self.cotangents)).standard_normal(output.shape, numpy.float32)
                self.cotangents[name] = torch.from_numpy(noise).to(output)
            ends.append(output)
            cotangents.append(self.cotangents[name].index_select(self.batch_dim, _index(situation.rows, output)))
        if not ends:
            raise ValueError(f"assert_batch_invariant({self.name}): no output with rows requires grad")
        grads = torch.autograd.grad(ends, [t for _, t in sources], cotangents, allow_unused=True)
        return {_GRADIENT + name: grad for (name, _), grad in zip(sources, grads, strict=True)}

    def _compare_rows(self, name: str, expected: Tensor, got: Tensor, situation: Situation) -> None:
        kept = [position for position, is_kept in enumerate(situation.kept_flags) if is_kept]
        if got.dtype != expected.dtype:
            raise BatchInvarianceError(
                f"assert_batch_invariant({self.name}): {name} is {_shown(expected)} in the whole batch, "
                f"{_shown(got)} {situation.description}",
                output=name,
                situation=situation.name,
            )
        want = expected.index_select(self.batch_dim, _index([situation.rows[k] for k in kept], expected))
        have = got.index_select(self.batch_dim, _index(kept, got))
        if same_bits(want, have):
            return
        pairs = list(zip(want.unbind(self.batch_dim), have.unbind(self.batch_dim), strict=True))
        differing = [i for i, (a, b) in enumerate(pairs) if not same_bits(a, b)]
        row = situation.rows[kept[differing[0]]]
        first = difference(*pairs[differing[0]])
        assert first is not None, "same_bits and difference disagree"
        raise BatchInvarianceError(
            f"assert_batch_invariant({self.name}): {name}, row {row} of {self.num_rows}, has other bits "
            f"{situation.description} than in the whole batch.\n"
            f"  first differing element of the row: index {first.index}, {first.expected!r} ({first.expected_bits}) in "
            f"the whole batch, {first.got!r} ({first.got_bits}) {situation.description}\n"
            f"  in this row {first.elements} of {pairs[0][0].numel()} elements and {first.bits} bits differ; "
            f"{len(differing)} of {len(pairs)} rows compared in this situation differ",
            output=name,
            row=row,
            situation=situation.name,
            index=first.index,
            expected=first.expected,
            got=first.got,
            differing_elements=first.elements,
            differing_bits=first.bits,
        )

    def _is_per_row(self, expected: Any, got: Any, situation: Situation) -> bool:
        """Whether a result has one entry per row.  One that keeps its shape while the batch changes has none."""
        if not isinstance(expected, Tensor) or not isinstance(got, Tensor):
            return False
        if not self._has_size(expected, self.num_rows):
            return False
        followed = list(expected.shape)
        followed[self.batch_dim] = len(situation.rows)
        if list(got.shape) == followed:
            return True
        if got.shape == expected.shape:
            return False
        raise BatchInvarianceError(
            f"assert_batch_invariant({self.name}): expected shape {followed} {situation.description}, after "
            f"{list(expected.shape)} in the whole batch; got {list(got.shape)}",
            situation=situation.name,
        )

    def _rows_of(self, t: Tensor, situation: Situation) -> Tensor:
        """The rows of ``t`` as ``situation`` wants them: chosen, neighbours filled, laid out."""
        rows = t.detach().index_select(self.batch_dim, _index(situation.rows, t))
        if situation.fill is not None:
            neighbours = [i for i, kept in enumerate(situation.kept_flags) if not kept]
            fill_rows(rows, self.batch_dim, neighbours, situation.fill)
        if situation.layout == "expanded":
            return rows.narrow(self.batch_dim, 0, 1).expand_as(rows)
        return lay_out(rows, situation.layout)

    def _find_num_rows(self) -> int:
        for t in _tensors(self.inputs):
            if not isinstance(t, torch.nn.Parameter):
                if not -t.dim() <= self.batch_dim < t.dim():
                    raise ValueError(
                        f"assert_batch_invariant({self.name}): expected a first tensor with dim {self.batch_dim}, "
                        f"got shape {list(t.shape)}; give batch_dim"
                    )
                return int(t.shape[self.batch_dim])
        raise ValueError(f"assert_batch_invariant({self.name}): expected a tensor among the arguments, got none")

    def _is_batched_input(self, t: Tensor) -> bool:
        return not isinstance(t, torch.nn.Parameter) and self._has_size(t, self.num_rows)

    def _has_size(self, t: Tensor, size: int) -> bool:
        return -t.dim() <= self.batch_dim < t.dim() and t.shape[self.batch_dim] == size

    @contextlib.contextmanager
    def _same_random_state(self) -> Iterator[None]:
        """Start from the caller's random state and leave it alone: the CPU's, and that of CUDA arguments."""
        devices = sorted({t.get_device() for t in _tensors(self.inputs) if t.is_cuda})
        with torch.random.fork_rng(devices=devices):
            yield


def _tensors(value: Any) -> Iterator[Tensor]:
    return (leaf for _, leaf in leaves(value) if isinstance(leaf, Tensor))


def _input_name(path: Path) -> str:
    """``args[0]`` or the keyword's name, from a path into ``(args, kwargs)``."""
    return path_name("args", path[1:]) if path[0] == 0 else path_name(str(path[1]), path[2:])


def _index(rows: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(rows, dtype=torch.long, device=like.device)


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        kind = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        return f"{kind} = {value.item()!r}" if value.numel() == 1 else kind
    return repr(value)


@contextlib.contextmanager
def _room_for_recompiles() -> Iterator[None]:
    """A statically compiled ``fn`` sees more shapes here than Dynamo's limit; it must not fall back to eager."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    from torch._dynamo import config

    with config.patch(recompile_limit=max(config.recompile_limit, 64)):
        yield
