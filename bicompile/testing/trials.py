"""``search``: look for a batch in which a row's bits move, and say how to see it again.

Where ``assert_batch_invariant`` runs a fixed list of situations on one batch, Hypothesis draws here both batches that a
row is run in, and shrinks what fails to the fewest rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from torch import Tensor

from ..errors import BatchInvarianceError
from ..explaining import uncompiled
from .invariance import _room_for_recompiles, _Runner
from .situations import Situation
from .strategies import Trial, scattered_values, trials
from .structure import Path, leaves, map_tensors

# Which trial the next searches run instead of drawing any, and of which search in the test it is.
_replayed: list[tuple[Trial, int]] = []


def search(
    fn: Callable[..., Any],
    *args: Any,
    backend: str | Callable[..., Any] | None = None,
    batch_dim: int = 0,
    seq_dim: int | None = None,
    check_input_grad: bool = False,
    new_values: bool = True,
    min_rows: int = 1,
    max_rows: int = 8,
    max_examples: int | None = None,
    seed: int | None = None,
    trial: Trial | None = None,
    **kwargs: Any,
) -> None:
    """Look for a row of ``fn(*args, **kwargs)`` whose bits follow its batch.

    Every trial runs a batch made of the rows given (some left out, some repeated) and a second one made of rows of the
    first: reordered, left out, repeated, among NaN, Inf, huge, denormal or zero rows, at another alignment or stride,
    with another number of CPU threads, compiled for static or dynamic shapes.  A row that both hold must have the same
    bits in both.

    Args:
        fn: a function or module; what is batched among its inputs and outputs is found as by
            ``assert_batch_invariant``.
        backend: None: ``fn`` as it is.  ``"eager"``: ``fn`` as it is, and what it was before if it is compiled.
            ``"inductor"``, ``"batch_invariant"`` or another of torch.compile's: ``fn`` compiled by it, for static and
            for dynamic shapes.
        batch_dim: the dim that holds the rows, in inputs and outputs.
        seq_dim: the dim that holds the positions of a sequence.  If given, the second batch is padded there too, on
            either side, with zeros in every batched input as long as the first; outputs are compared without.  One
            of the inputs must be the mask by which ``fn`` tells padding, and one the positions if it uses any.
        check_input_grad: compare the gradients of batched floating-point inputs too.
        new_values: also draw the values of batched floating-point inputs, over many binades.
        min_rows, max_rows: the fewest and the most rows in a batch; from 2 on, no graph is compiled for a row alone.
        max_examples: how many trials; Hypothesis's current setting, or 20 of it where ``fn`` is compiled.
        seed: of the trials; else the current Hypothesis profile decides.
        trial: run this one alone.

    Raises:
        BatchInvarianceError: a row's bits moved; the message holds the smallest trial that shows it.
        ValueError: there is nothing to compare.
    """
    __tracebackhide__ = True
    subject = _Subject(fn, args, kwargs, backend, batch_dim, seq_dim, check_input_grad)
    if trial is not None:
        subject.run(trial)
        return
    chosen = settings().max_examples if max_examples is None else max_examples
    if max_examples is None and subject.is_compiled:
        chosen = min(chosen, 20)

    # Without Phase.explain, which runs the function many times more; and without a database, whose key all tests share.
    @settings(
        max_examples=chosen,
        deadline=None,
        database=None,
        print_blob=False,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(
        drawn=trials(
            subject.num_rows,
            subject.sizes(min_rows, max_rows),
            floats=subject.floats,
            new_values=new_values,
            compiled=subject.is_compiled,
            max_padding=0 if seq_dim is None else 4,
        )
    )
    def attempt(drawn: Trial) -> None:
        subject.run(drawn)

    (attempt if seed is None else seeded(seed)(attempt))()


class BatchInvariance:
    """What the fixture ``batch_invariance`` of the pytest plugin gives to a test; see ``check``.

    Args:
        test: the path and name of the test, for the script that a failure prints; empty outside pytest.
        seed: of the trials, or None.
    """

    def __init__(self, test: str = "", seed: int | None = None) -> None:
        self.test, self.seed, self.checks = test, seed, 0

    def check(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Fail if a row of ``fn(*args)`` has other bits in another batch.  Arguments are those of :func:`search`.

        The failure's message ends with a script that shows the smallest batch that was found to fail.
        """
        __tracebackhide__ = True
        number, self.checks = self.checks, self.checks + 1
        if _replayed:
            trial, wanted = _replayed[-1]
            if number == wanted:
                search(fn, *args, trial=trial, **kwargs)
            return
        try:
            search(fn, *args, **{"seed": self.seed, **kwargs})
        except BatchInvarianceError as error:
            vars(error).pop("__notes__", None)  # Hypothesis's own words for the trial
            error.args = (f"{error}\n\n{self._script(error.trial, number)}",)
            raise

    def _script(self, trial: object, number: int) -> str:
        if not self.test:
            return f"To see it again, pass trial={trial!r}."
        return (
            "To see it again, run this script:\n\n"
            "import sys, pytest\n"
            "from bicompile.testing.trials import Trial, replay\n\n"
            f"with replay({trial!r}, check={number}):\n"
            f"    sys.exit(pytest.main(['-p', 'bicompile.pytest_plugin', {self.test!r}]))\n"
        )


@contextlib.contextmanager
def replay(trial: Trial, check: int = 0) -> Iterator[None]:
    """Let tests try ``trial`` alone meanwhile, in their ``check``-th call of ``batch_invariance.check``."""
    _replayed.append((trial, check))
    try:
        yield
    finally:
        _replayed.pop()


class _Subject:
    """One function and the rows it was given, run in the batches of a trial."""

    def __init__(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        backend: str | Callable[..., Any] | None,
        batch_dim: int,
        seq_dim: int | None,
        check_input_grad: bool,
    ) -> None:
        self.name = getattr(fn, "__qualname__", type(fn).__name__)
        plain = fn if backend is None else uncompiled(fn)
        self.modes = {False: plain, True: plain}
        self.is_compiled = backend is not None and backend != "eager"
        if backend is not None and self.is_compiled:
            self.modes = {dynamic: torch.compile(plain, backend=backend, dynamic=dynamic) for dynamic in (False, True)}
        self.inputs = (args, kwargs)
        self.batch_dim, self.seq_dim, self.check_input_grad = batch_dim, seq_dim, check_input_grad
        runner = self._runner(plain, self.inputs)
        self.num_rows = runner.num_rows
        given = [leaf for _, leaf in leaves(self.inputs) if isinstance(leaf, Tensor)]
        self.batched = {id(t) for t in given if runner._is_batched_input(t)}
        self.floats = any(t.is_floating_point() for t in given if id(t) in self.batched)
        outputs = runner.run(Situation("again", "in the batch given", tuple(range(self.num_rows))))
        runner.require_batched(outputs)
        others = [t for t in given if id(t) not in self.batched]
        others += [t for t in outputs.values() if isinstance(t, Tensor) and not runner._has_size(t, self.num_rows)]
        # A batch of one of these sizes could not be told from what holds no rows.
        self.taken = {t.shape[batch_dim] for t in others if -t.dim() <= batch_dim < t.dim()}
        self.length = 0
        if seq_dim is not None:
            first = next(t for t in given if id(t) in self.batched)
            if not seq_dim < first.dim() or seq_dim == batch_dim:
                raise ValueError(
                    f"search({self.name}): expected seq_dim to be a dim of the first tensor other than its batch, got "
                    f"{seq_dim} of shape {list(first.shape)}"
                )
            self.length = first.shape[seq_dim]
            self.sequences = {
                path
                for path, t in leaves(self.inputs)
                if id(t) in self.batched and t.dim() > seq_dim and t.shape[seq_dim] == self.length
            }

    def sizes(self, min_rows: int, max_rows: int) -> list[int]:
        """The batch sizes that a trial may have."""
        found = [n for n in range(min_rows, max_rows + 1) if n not in self.taken]
        if not found:
            raise ValueError(
                f"search({self.name}): expected a batch size from {min_rows} to {max_rows}, and there is none that no "
                "other tensor has; give others"
            )
        return found

    def run(self, trial: Trial) -> None:
        """Run both batches of ``trial`` and compare.

        Raises:
            BatchInvarianceError: a row's bits differ.
        """
        __tracebackhide__ = True
        runner = self._runner(self.modes[trial.dynamic[0]], self._batch(trial))
        with _room_for_recompiles(), _threads(trial.threads[0]):
            whole = runner.run(Situation("again", "in the whole batch", tuple(range(len(trial.rows)))))
        runner.fn = self._padding(self.modes[trial.dynamic[1]], *trial.padding)
        situation = trial.situation()
        try:
            with _room_for_recompiles(), _threads(trial.threads[1]):
                results = runner.run(situation)
            runner.compare(whole, situation, results)
        except BatchInvarianceError as error:
            error.trial = trial
            raise

    def _runner(self, fn: Callable[..., Any], inputs: Any) -> _Runner:
        args, kwargs = inputs
        runner = _Runner(fn, args, kwargs, self.batch_dim, self.check_input_grad)
        runner.name = self.name
        return runner

    def _batch(self, trial: Trial) -> Any:
        """The inputs with the rows of ``trial`` in the place of those given."""

        def choose(_: object, t: Tensor) -> Tensor:
            if id(t) not in self.batched:
                return t
            rows = t.detach().index_select(self.batch_dim, torch.tensor(trial.rows, device=t.device))
            if trial.values is not None and t.is_floating_point():
                rows = scattered_values(rows.shape, t.dtype, trial.values).to(t.device)
            return rows.requires_grad_(t.requires_grad)

        return map_tensors(choose, self.inputs)

    def _padding(self, fn: Callable[..., Any], left: int, right: int) -> Callable[..., Any]:
        """``fn`` on longer sequences; what it returns for the positions that were there."""
        dim, length = self.seq_dim, self.length
        if dim is None or not left + right:
            return fn

        def pad(path: Path, t: Tensor) -> Tensor:
            return F.pad(t, (0, 0) * (t.dim() - 1 - dim) + (left, right)) if path in self.sequences else t

        def cut(_: object, t: Tensor) -> Tensor:
            is_longer = t.dim() > max(dim, 1) and t.shape[dim] == left + length + right
            return t.narrow(dim, left, length) if is_longer else t

        def padded(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = map_tensors(pad, (args, kwargs))
            return map_tensors(cut, fn(*args, **kwargs))

        return padded


@contextlib.contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
