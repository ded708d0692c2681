"""The pytest plugin, as its users meet it: a fixture, a script for each failure, and ``--soak``."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]
ROOT = Path(__file__).resolve().parent.parent

MODELS = """
    import torch

    def depends_on_its_batch(x):
        return x / 3.0 if len(x) > 1 else x * (1.0 / 3.0)

    def test_first_is_fine_and_second_is_not(batch_invariance):
        batch_invariance.check(torch.abs, torch.randn(3, 8))
        batch_invariance.check(depends_on_its_batch, torch.randn(3, 8))
"""


@pytest.fixture
def checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)


def test_a_failure_prints_a_script_that_fails_too(pytester: pytest.Pytester, checkout: None):
    pytester.makepyfile(test_models=MODELS)
    result = pytester.runpytest_inprocess(
        "-p", "bicompile.pytest_plugin", "-p", "no:cacheprovider"
    )  # torch is imported here
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*row 0 of *has other bits*", "*To see it again, run this script:*"])
    lines = [line[1:].strip("\n").removeprefix("       ") for line in result.outlines if line.startswith("E")]
    start = lines.index("import sys, pytest")
    script = pytester.path / "again.py"
    script.write_text("\n".join(lines[start : start + 5]) + "\n")
    assert "check=1" in script.read_text()
    again = subprocess.run([sys.executable, script], cwd=pytester.path.parent, capture_output=True, text=True)
    assert again.returncode == 1, again.stdout + again.stderr
    assert re.search(r"BatchInvarianceError: .*depends_on_its_batch.*row 0 of", again.stdout)


DRAWING = """
    from hypothesis import given, strategies as st

    seen = set()

    @given(st.integers(0, 2**40))
    def test_draws(x):
        seen.add(x)

    def test_plain():
        assert False, "draws nothing: the same each time"

    @given(st.integers(0, 2**40))
    def test_rare(x):
        assert len(seen) < 150 or x < 1000
"""


def test_soak_repeats_what_draws_from_new_seeds_and_says_how_to_see_a_failure_again(
    pytester: pytest.Pytester, checkout: None
):
    pytester.makepyfile(test_drawing=DRAWING)
    pytester.makeconftest(
        "from hypothesis import settings\n"
        "settings.register_profile('same', derandomize=True, deadline=None, max_examples=100)\n"
        "settings.load_profile('same')\n"
    )
    arguments = ("-p", "bicompile.pytest_plugin", "-p", "no:cacheprovider")
    # The same numbers in each round would never be 150, and then the minute would pass without a failure.
    result = pytester.runpytest_subprocess(*arguments, "-x", "--soak", "1", "--soak-seed", "7")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*soak: round 1, seed 7, 2 tests, 0.* of 1 minutes, 0 failed*", "*1 deselected*"])
    assert re.search(
        r"FAILED, again with: pytest --soak 0 --soak-seed \d+ 'test_drawing.py::test_rare'", result.stdout.str()
    )


def test_soak_runs_one_round_at_least_and_succeeds_if_nothing_fails(pytester: pytest.Pytester, checkout: None):
    pytester.makepyfile(test_drawing=DRAWING)
    arguments = ("-p", "bicompile.pytest_plugin", "-p", "no:cacheprovider")
    result = pytester.runpytest_subprocess(*arguments, "--soak", "0", "-k", "test_draws")
    assert result.ret == 0
    result.stdout.fnmatch_lines(["*soak: round 1, seed *, 1 tests, 0.0 of 0 minutes, 0 failed*"])
    result = pytester.runpytest_subprocess(*arguments, "--soak", "0", "-k", "test_plain")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*no test that draws from Hypothesis is selected*"])
