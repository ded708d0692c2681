"""The repository is clean under ruff and mypy, so a finding is always new."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def check(*command: str, cwd: Path) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"


def test_ruff_finds_nothing():
    pytest.importorskip("ruff")
    check("ruff", "check", "--no-cache", ".", cwd=ROOT)


def test_every_file_is_formatted():
    pytest.importorskip("ruff")
    check("ruff", "format", "--check", "--no-cache", ".", cwd=ROOT)


def test_mypy_finds_nothing(tmp_path: Path):
    pytest.importorskip("mypy")
    # mypy does not see the __path__ that joins passes/ and lowering/ to the package: assemble a copy.
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "bicompile", tmp_path / "bicompile", ignore=skip)
    for part in ("passes", "lowering"):
        shutil.copytree(ROOT / part, tmp_path / "bicompile" / part, ignore=skip)
    # The cache lies in the checkout: most of the time goes into torch itself, which seldom changes.
    cache = ("--cache-dir", str(ROOT / ".mypy_cache"))
    check("mypy", "--config-file", str(ROOT / "pyproject.toml"), *cache, "-p", "bicompile", cwd=tmp_path)
