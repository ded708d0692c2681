"""What every test shares: Hypothesis profiles, quiet threads, quick compilation, and a fresh Dynamo for each test."""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

# Before torch: idle OpenMP threads that spin starve each other on a machine with few cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What some tests draw follows the day.  Set here, it is the same for all workers, also over midnight.
os.environ.setdefault("BICOMPILE_SAMPLE_SEED", datetime.date.today().isoformat())

import pytest
import torch
from hypothesis import HealthCheck, settings

pytest_plugins = ["bicompile.pytest_plugin"]  # also where the package is not installed

# No deadline: the first example of a test compiles.  HYPOTHESIS_PROFILE picks one of the three.
_QUIET = (HealthCheck.too_slow, HealthCheck.function_scoped_fixture)
settings.register_profile("dev", deadline=None, suppress_health_check=_QUIET, max_examples=20)
settings.register_profile("ci", settings.get_profile("dev"), derandomize=True, print_blob=True)
settings.register_profile("soak", settings.get_profile("dev"), max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--all-schedules``: see tests/test_gpu_compiles.py."""
    parser.addoption("--all-schedules", action="store_true", help="compile every GPU schedule, not a sample")


def pytest_report_header() -> str:
    """How to repeat a day."""
    return f"BICOMPILE_SAMPLE_SEED={os.environ['BICOMPILE_SAMPLE_SEED']}"


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Before several workers start, compile the CPU kernels on all processors: else one compiles and the rest wait.

    Not beside a GPU, whose tests need few of them.
    """
    if session.config.getoption("numprocesses", None) and not torch.cuda.is_available():
        from bicompile.lowering import native

        native.load(*native.libraries())


@pytest.fixture(autouse=True)
def _quickly_compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Inductor's C++ kernels be compiled at level 1: a fifth faster, the same IEEE operations.

    Users have level 3; so do tests marked ``optimised`` and processes that tests start.
    """
    if request.node.get_closest_marker("optimised") is None:
        from torch._inductor import cpp_builder

        monkeypatch.setattr(cpp_builder, "_get_optimization_cflags", _at_level_1(cpp_builder._get_optimization_cflags))


def _at_level_1(stock: Callable[..., tuple[list[str], list[str]]]) -> Callable[..., tuple[list[str], list[str]]]:
    def flags(*args: Any, **kwargs: Any) -> tuple[list[str], list[str]]:
        compiler, linker = stock(*args, **kwargs)
        return ["O1" if flag == "O3" else flag for flag in compiler], linker

    return flags


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    """Forget what the test compiled: a test must not hit another's graphs, nor its recompilation limit."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """``set_threads(n)`` gives the rest of the test ``n`` CPU threads; the old number returns after it."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
