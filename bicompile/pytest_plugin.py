"""The pytest plugin of bicompile: the fixture ``batch_invariance``, and ``--soak``.

    def test_my_model(batch_invariance):
        batch_invariance.check(model, x)

draws batches with Hypothesis, and fails where a row of ``model(x)`` has other bits in one of them than in another, with
the smallest batch that shows it and a script to see it again.  ``backend="batch_invariant"``, ``"inductor"`` or
``"eager"`` says how the model is run; ``bicompile.testing.trials.search`` has all arguments.

    pytest --soak 60 tests

runs the selected tests that draw from Hypothesis again and again for 60 minutes, each round from another seed.

Every pytest of an environment imports this file, so it imports torch only where a test asks for it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .testing.trials import BatchInvariance

_SEED = pytest.StashKey[int]()
_FIXTURE = "batch_invariance"


@pytest.fixture
def batch_invariance(request: pytest.FixtureRequest) -> Iterator[BatchInvariance]:
    """``batch_invariance.check(fn, *args)`` fails if a row's bits follow the batch that the row is in.

    The arguments are those of ``bicompile.testing.trials.search``.  The test starts from one random state, so that a
    model made in it has the same weights each time.
    """
    torch = pytest.importorskip("torch")
    pytest.importorskip(
        "hypothesis", reason="batch_invariance draws its batches with Hypothesis: pip install hypothesis"
    )
    from .testing.trials import BatchInvariance

    with torch.random.fork_rng():
        torch.manual_seed(0)
        name = request.node.nodeid.partition("::")[2]
        yield BatchInvariance(f"{request.node.path}::{name}", request.node.stash.get(_SEED, None))


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--soak`` and ``--soak-seed``."""
    group = parser.getgroup("bicompile")
    group.addoption(
        "--soak",
        type=float,
        metavar="MINUTES",
        help="run the selected Hypothesis tests again and again for so long, each round from another seed",
    )
    group.addoption("--soak-seed", type=int, metavar="SEED", help="the first round's seed (default: a random one)")


def pytest_configure(config: pytest.Config) -> None:
    """Take over the test loop if ``--soak`` asks for it."""
    minutes = config.getoption("soak")
    if minutes is None:
        return
    if getattr(config.option, "numprocesses", None):
        raise pytest.UsageError("--soak runs in one process: leave out -n, or start it several times")
    first = config.getoption("soak_seed")
    config.pluginmanager.register(Soak(minutes, random.randrange(2**32) if first is None else first), "bicompile-soak")


class Soak:
    """Rounds over the selected tests that draw, until the time is up; at least one.

    Args:
        minutes: for how long.
        first_seed: round ``i`` has ``first_seed + i``; ``--soak 0 --soak-seed`` with a round's seed repeats it.
    """

    def __init__(self, minutes: float, first_seed: int) -> None:
        self.seconds, self.first_seed = 60 * minutes, first_seed
        self.rounds = self.tests = 0
        self.failures: list[tuple[str, int]] = []
        self.started = time.monotonic()

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Leave out the tests that draw nothing: they would do the same each time."""
        others = [item for item in items if not _draws(item)]
        if others:
            config.hook.pytest_deselected(items=others)
            items[:] = [item for item in items if _draws(item)]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        """Run rounds, with a line of progress for each."""
        if session.config.option.collectonly or session.testsfailed:
            return None
        if not session.items:
            raise pytest.UsageError("--soak: no test that draws from Hypothesis is selected")
        self.started = time.monotonic()
        while not self.rounds or time.monotonic() - self.started < self.seconds:
            self._round(session, self.first_seed + self.rounds)
            self.rounds += 1
            self._say(session.config, f" {self}")
        return True

    def _round(self, session: pytest.Session, seed: int) -> None:
        for item, following in zip(session.items, [*session.items[1:], None], strict=True):
            if self.tests and time.monotonic() - self.started >= self.seconds and self.rounds:
                following = None  # the last one: let it tear everything down
            _seed(item, seed)
            failed = session.testsfailed
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            self.tests += 1
            if session.testsfailed > failed:
                self.failures.append((item.nodeid, seed))
            if session.shouldfail:
                raise session.Failed(session.shouldfail)
            if session.shouldstop:
                raise session.Interrupted(session.shouldstop)
            if following is None:
                return

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """What ran, and how each failure is repeated."""
        terminalreporter.section("soak")
        terminalreporter.write_line(str(self))
        for nodeid, seed in self.failures:
            terminalreporter.write_line(f"FAILED, again with: pytest --soak 0 --soak-seed {seed} {nodeid!r}")

    def __str__(self) -> str:
        elapsed = (time.monotonic() - self.started) / 60
        return (
            f"soak: round {self.rounds}, seed {self.first_seed + max(self.rounds - 1, 0)}, {self.tests} tests, "
            f"{elapsed:.1f} of {self.seconds / 60:g} minutes, {len(self.failures)} failed"
        )

    def _say(self, config: pytest.Config, text: str) -> None:
        reporter: Any = config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            reporter.write_line(text)


def _draws(item: pytest.Item) -> bool:
    """Whether a test draws from Hypothesis, by itself or through the fixture."""
    return hasattr(getattr(item, "obj", None), "hypothesis") or _FIXTURE in getattr(item, "fixturenames", ())


def _seed(item: pytest.Item, seed: int) -> None:
    """Let the next run of ``item`` draw from ``seed``, also in a profile that derandomizes."""
    item.stash[_SEED] = seed
    test: Any = getattr(item, "obj", None)
    if hasattr(test, "hypothesis"):
        from hypothesis import seed as seeded

        seeded(seed)(getattr(test, "__func__", test))
